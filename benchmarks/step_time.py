#!/usr/bin/env python
"""What the training loop costs over a bare loop that does the same forward and backward passes.

    python benchmarks/step_time.py --out benchmarks/results/step_time.json
    python benchmarks/step_time.py --methods dpo awm

Both train the same LoRA on the bundled model with batches of the same shape: the bare loop on tensors that are in
memory already, with nothing else around it. Steps are taken in turns, so both meet the same machine. A method on
rewards is compared in what it does after the images are drawn (drawing is in benchmarks/rollout.py); distillation has
benchmarks/distil_step.py. Records are added to the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_record import about, add_record
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.config import from_dict, load_yaml
from diffalign.pipelines import load_family
from diffalign.recipes import find
from diffalign.trainers import load_method

METHODS = ("dpo", "mapo", "sft", "ddpo", "awm")
"""One of each kind: pairs with a reference and without, single images, sampling steps, and images noised again."""
GROUP = 8


class BareLoop:
    """Loss, backward, clip, AdamW on a LoRA of a denoiser; written out with no abstraction."""

    def __init__(self, trainer: Any, batch: Any) -> None:
        config = trainer.config
        self.unet = load_family(config.pretrained_model_name_or_path).denoiser.train()
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets, init_lora_weights="gaussian")
        self.unet.add_adapter(lora)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        for mine, trainers in zip(self.parameters, trainer.policy.parameters.values(), strict=True):
            mine.data.copy_(trainers.data)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate)
        self.loss = OBJECTIVES[config.method](self, trainer, batch)

    def predict(self, x: Tensor, timesteps: Tensor, text: dict[str, Tensor], sizes: Tensor | None) -> Tensor:
        if sizes is None:
            side = 8 * x.shape[-1]
            sizes = torch.tensor([[side, side, 0.0, 0.0, side, side]]).expand(len(x), -1)
        own = {"text_embeds": text["pooled_prompt_embeds"], "time_ids": sizes}
        prediction: Tensor = self.unet(x, timesteps, text["prompt_embeds"], added_cond_kwargs=own).sample
        return prediction

    def frozen(self, weights: list[Tensor] | None, *inputs: Any) -> Tensor:
        """The prediction without gradient, with other adapters, or None at all."""
        mine = [p.data for p in self.parameters]
        if weights is None:
            self.unet.disable_adapters()
        for parameter, other in zip(self.parameters, weights or mine, strict=True):
            parameter.data = other
        with torch.no_grad():
            prediction = self.predict(*inputs)
        for parameter, own in zip(self.parameters, mine, strict=True):
            parameter.data = own
        if weights is None:
            self.unet.enable_adapters()
        return prediction

    def step(self) -> None:
        self.loss().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def dpo(bare: BareLoop, trainer: Any, batch: Any) -> Callable[[], Tensor]:
    """Diffusion-DPO: a policy and a reference pass."""
    x_t = trainer.family.noise_process.add_noise(batch.latents, batch.noise, batch.timesteps)
    inputs, beta = (x_t, batch.timesteps, batch.text(), batch.sizes), trainer.config.beta_dpo

    def loss() -> Tensor:
        reference = bare.frozen(None, *inputs)
        policy = bare.predict(*inputs)
        m_w, m_l = (policy - batch.noise).square().mean((1, 2, 3)).chunk(2)
        r_w, r_l = (reference - batch.noise).square().mean((1, 2, 3)).chunk(2)
        return -logsigmoid(-0.5 * beta * ((m_w - m_l) - (r_w - r_l))).mean()

    return loss


def mapo(bare: BareLoop, trainer: Any, batch: Any) -> Callable[[], Tensor]:
    """MaPO: a policy pass."""
    x_t = trainer.family.noise_process.add_noise(batch.latents, batch.noise, batch.timesteps)
    inputs, config = (x_t, batch.timesteps, batch.text(), batch.sizes), trainer.config

    def loss() -> Tensor:
        m = (bare.predict(*inputs) - batch.noise).square().mean((1, 2, 3))
        x = config.snr_value * m
        score_w, score_l = (x / torch.expm1(x)).chunk(2)
        margin = config.mapo_temperature * (score_w - score_l)
        return (m.chunk(2)[0] - config.beta_mapo * logsigmoid(margin)).mean()

    return loss


def sft(bare: BareLoop, trainer: Any, batch: Any) -> Callable[[], Tensor]:
    """The denoising loss: a policy pass."""
    x_t = trainer.family.noise_process.add_noise(batch.latents, batch.noise, batch.timesteps)
    inputs = x_t, batch.timesteps, batch.text(), batch.sizes
    return lambda: (bare.predict(*inputs) - batch.noise).square().mean()


def clipped(log_ratio: Tensor, a: Tensor, c: float) -> Tensor:
    ratio = log_ratio.exp()
    return torch.maximum(-a * ratio, -a * ratio.clamp(1 - c, 1 + c)).mean()


def ddpo(bare: BareLoop, trainer: Any, batch: Any) -> Callable[[], Tensor]:
    """DDPO: a policy pass at a sampling step, its log-probability and the clipped ratio."""
    steps, i = trainer.steps, batch.index
    alpha, sigma, std, c = (
        values[i].float().reshape(-1, 1, 1, 1) for values in (steps.alpha, steps.sigma, steps.std, steps.eps_coef)
    )
    alpha_next = steps.alpha[i + 1].float().reshape(-1, 1, 1, 1)
    inputs = batch.x, steps.timesteps[i], batch.given.text, batch.given.sizes

    def loss() -> Tensor:
        epsilon = bare.predict(*inputs)
        mean = alpha_next * (batch.x - sigma * epsilon) / alpha + c * epsilon
        log_prob = (-0.5 * ((batch.x_next - mean) / std).square() - std.log() - 0.9189385).mean((1, 2, 3))
        return clipped(log_prob - batch.log_probs, batch.advantages, trainer.config.clip_range)

    return loss


def awm(bare: BareLoop, trainer: Any, batch: Any) -> Callable[[], Tensor]:
    """AWM after its first update: passes of the policy, the policy that drew, the slow copy and the reference."""
    config, given = trainer.config, trainer.renoised(batch)
    inputs = given.x_t, given.timesteps, batch.given.text, batch.given.sizes
    old, ema = ([p.detach().clone() for p in bare.parameters] for _ in range(2))  # As a first rollout has them.
    a = batch.advantages / config.advantage_clip * config.advantage_max

    def log_prob(prediction: Tensor) -> Tensor:
        m = (prediction - given.target).square().mean((1, 2, 3))
        return -given.sigma * (m + 1e-10) ** config.ghuber_power / config.ghuber_power

    def loss() -> Tensor:
        s_old = log_prob(bare.frozen(old, *inputs))
        slow, reference = bare.frozen(ema, *inputs), bare.frozen(None, *inputs)
        policy = bare.predict(*inputs)
        slow_pull, pull = (policy - slow).square().mean(), (policy - reference).square().mean()
        matched = clipped(log_prob(policy) - s_old, a, config.clip_range)
        return matched + config.ema_beta * slow_pull + config.kl_beta * pull

    return loss


OBJECTIVES = {"dpo": dpo, "mapo": mapo, "sft": sft, "ddpo": ddpo, "awm": awm}


def make(method: str, folder: str, batch_size: int, steps: int) -> Any:
    """The trainer of the method's recipe, in batches of so many pairs or images and nothing beside the steps."""
    config_class, trainer_class = load_method(method)
    settings = load_yaml(find(f"shapes-{method}"))
    settings |= {"output_dir": folder, "report_to": ["none"], "train_batch_size": batch_size}
    if "prompts" in settings:
        # One rollout that every step is taken on.
        settings |= {"num_prompts_per_rollout": batch_size // GROUP, "num_images_per_prompt": GROUP}
        settings |= {"num_updates_per_rollout": 1, "num_inner_epochs": steps, "max_train_steps": steps}
        settings |= {"num_train_steps_per_image": 1, "heldout_prompts": None, "checkpointing_steps": 0}
    else:
        settings["gradient_accumulation_steps"] = 1
    return trainer_class(from_dict(config_class, settings, f"shapes-{method}"))


def measure(method: str, steps: int, warmup: int, batch_size: int) -> dict[str, float]:
    """Median seconds of a step of each, taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make(method, folder, batch_size, warmup + steps)
        bare = BareLoop(trainer, next(trainer.batches.stream(0, 1)))
        stream = trainer.batches.stream(0, warmup + steps)
        times: dict[str, list[float]] = {"bare": [], "loop": []}
        for _ in range(warmup + steps):
            for name, step in (("bare", bare.step), ("loop", lambda: trainer.training_step(stream))):
                start = time.perf_counter()
                step()
                times[name].append(time.perf_counter() - start)
    medians = {name: float(np.median(values[warmup:])) for name, values in times.items()}
    ratios = np.array(times["loop"][warmup:]) / np.array(times["bare"][warmup:])
    return {
        "bare_seconds": round(medians["bare"], 5),
        "loop_seconds": round(medians["loop"], 5),
        "ratio": round(medians["loop"] / medians["bare"], 4),
        "ratio_of_turns_median": round(float(np.median(ratios)), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=32, help="pairs, or images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file that the record is added to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = about(torch.device("cpu")) | {"batch_size": args.batch_size, "steps": args.steps}
    result["methods"] = {name: measure(name, args.steps, args.warmup, args.batch_size) for name in args.methods}
    print(json.dumps(result, indent=1))
    if args.out:
        add_record(args.out, result)


if __name__ == "__main__":
    main()

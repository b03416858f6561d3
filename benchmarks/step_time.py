#!/usr/bin/env python
"""What the training loop costs over a bare loop that does the same forward and backward passes.

    python benchmarks/step_time.py --out benchmarks/results/step_time.json

Both train the same LoRA on the bundled model by Diffusion-DPO with batches of the same shape: the bare loop on tensors
that are in memory already, with nothing else around it. Steps are taken in turns, so both meet the same machine.
Records are added to the file.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_record import about, add_record
from peft import LoraConfig
from torch.nn.functional import logsigmoid

from diffalign.config import from_dict, load_yaml
from diffalign.pipelines import load_family
from diffalign.recipes import find
from diffalign.trainers.dpo import DPOConfig, DPOTrainer
from diffalign.training.pairs import PairBatch


class BareLoop:
    """Policy forward, reference forward, loss, backward, clip, AdamW; written out with no abstraction."""

    def __init__(self, config: DPOConfig, batch: PairBatch) -> None:
        family = load_family(config.pretrained_model_name_or_path)
        self.unet = family.denoiser.train()
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        lora = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules=targets, init_lora_weights="gaussian")
        self.unet.add_adapter(lora)
        self.parameters = [p for p in self.unet.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.learning_rate)
        text = batch.text()
        self.x_t = family.noise_process.add_noise(batch.latents, batch.noise, batch.timesteps)
        self.inputs = {
            "timestep": batch.timesteps,
            "encoder_hidden_states": text["prompt_embeds"],
            "added_cond_kwargs": {"text_embeds": text["pooled_prompt_embeds"], "time_ids": batch.sizes},
        }
        self.noise, self.beta = batch.noise, config.beta_dpo

    def step(self) -> None:
        self.unet.disable_adapters()
        with torch.no_grad():
            reference = self.unet(self.x_t, **self.inputs).sample
        self.unet.enable_adapters()
        policy = self.unet(self.x_t, **self.inputs).sample
        m_w, m_l = (policy - self.noise).square().mean((1, 2, 3)).chunk(2)
        r_w, r_l = (reference - self.noise).square().mean((1, 2, 3)).chunk(2)
        loss = -logsigmoid(-0.5 * self.beta * ((m_w - m_l) - (r_w - r_l))).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(steps: int, warmup: int, batch_size: int) -> dict[str, Any]:
    """Median seconds of a step of each, taken in turns."""
    with tempfile.TemporaryDirectory() as folder:
        settings = load_yaml(find("shapes-dpo")) | {
            "output_dir": folder,
            "report_to": ["none"],
            "train_batch_size": batch_size,
            "gradient_accumulation_steps": 1,
        }
        trainer = DPOTrainer(from_dict(DPOConfig, settings, "shapes-dpo"))
        bare = BareLoop(trainer.config, next(trainer.batches.stream(0, 1)))
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
        "ratio_of_pairs_median": round(float(np.median(ratios)), 4),
        "batch_size": batch_size,
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="JSON file that the record is added to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = about(torch.device("cpu")) | measure(args.steps, args.warmup, args.batch_size)
    print(json.dumps(result, indent=1))
    if args.out:
        add_record(args.out, result)


if __name__ == "__main__":
    main()

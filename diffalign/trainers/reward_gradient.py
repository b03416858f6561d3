"""Reward gradients: ReFL, DRaFT-K, DRaFT-LV, DRaFT+ and AlignProp. The reward is differentiated through the sampler.

- ReFL: Xu et al., "ImageReward", NeurIPS 2023, arXiv 2304.05977. One step j, drawn among the last ones, is taken with
  gradient; its estimate of the clean image is scored: L = scale * mean relu(ceiling - R).
- DRaFT-K: Clark, Vicol, Swersky, Fleet, ICLR 2024, arXiv 2309.17400. The last K steps are taken with gradient: -R.
- DRaFT-LV: of the same paper. K = 1, the gradient averaged over n noisings of the final image to the last level.
- DRaFT+: of NeMo-Aligner. DRaFT-K with a pull to the reference's predictions on the steps with gradient.
- AlignProp: Prabhudesai et al. 2023, arXiv 2310.03739. DRaFT with K drawn anew each time.

What differs from the papers: steps before the last K run without a graph, which gives the same gradient as detaching
their predictions and costs no memory; K is drawn once for all images of a micro-batch. ReFL's extra pre-training loss
on image-caption pairs is not here: use ``kl_beta``, which holds the model by its own predictions instead. Steps and
VAE are differentiated with activation checkpointing, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.config import field
from diffalign.data.prompts import Prompt
from diffalign.diffusion.error import per_sample_mse
from diffalign.diffusion.random import key_seed, keyed_noise, keyed_uniform
from diffalign.errors import UserError
from diffalign.estimation.work import Work
from diffalign.training.groups import PromptOrder
from diffalign.training.loop import Batches
from diffalign.training.online_config import PromptConfig
from diffalign.training.prompted import PromptNeeds, PromptTrainer
from diffalign.training.rollout import Condition, guided_predict, starting_noise, step_noise
from diffalign.training.scoring import Scorer
from diffalign.training.work import gradient_work

Gradient = Literal["draft", "draft_lv", "refl", "alignprop"]


def reward_loss(rewards: Tensor, ceiling: float | None = None, scale: float = 1.0) -> Tensor:
    """``-scale * R``, or ``scale * relu(ceiling - R)`` where there is a ceiling (ReFL: 2), (N,) to (N,)."""
    return -scale * rewards if ceiling is None else scale * torch.relu(ceiling - rewards)


@dataclass(kw_only=True)
class RewardGradientConfig(PromptConfig):
    """Settings of reward gradients."""

    gradient: Gradient = field("draft", help="draft (the last K steps), draft_lv, refl or alignprop (K drawn anew).")
    gradient_steps: int = field(1, help="K: steps with gradient of draft; the largest K of alignprop.")
    lv_samples: int = field(2, help="Noisings of the final image that draft_lv averages over. Paper: 2.")
    refl_last_steps: int = field(10, help="refl takes its step among the last so many. Authors: 10 of 40.")
    reward_ceiling: float | None = field(None, help="Rewards above count no more: relu(ceiling - R). ReFL: 2.")
    reward_scale: float = field(1.0, help="Factor on the reward's loss. ReFL: 1e-3, AlignProp: 0.01.")
    kl_beta: float = field(
        0.0, help="Pull to the reference's predictions on the steps with gradient. DRaFT+: 0.1 to 1."
    )
    eta: float = field(0.0, help="Noise of the sampler; 0 is deterministic. AlignProp: 1.")
    checkpoint_steps: bool = field(
        True, help="Recompute each step in the backward pass: memory of one step, not of K."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("gradient_steps", "lv_samples", "refl_last_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("reward_scale", self.reward_scale > 0, "above 0")
        self._require("kl_beta", self.kl_beta >= 0, "0 or more")
        if self.gradient_steps > self.num_inference_steps:
            raise UserError(
                f"gradient_steps {self.gradient_steps} is more than num_inference_steps {self.num_inference_steps}"
            )
        if self.refl_last_steps >= self.num_inference_steps and self.gradient == "refl":
            raise UserError(
                f"refl_last_steps {self.refl_last_steps} must be below num_inference_steps {self.num_inference_steps}"
            )


@dataclass(frozen=True)
class PromptBatch:
    """B prompts to draw with gradient.

    Attributes:
        given: on the device.
        prompts, seeds: of each image.
        u: a number in [0, 1), the same for all images, for what is drawn once a micro-batch.
    """

    given: Condition
    prompts: list[Prompt]
    seeds: list[int]
    u: float


class PromptBatches(Batches[PromptBatch]):
    """Streams prompts, each pass over them in an order of its own, the same for any number of processes."""

    def __init__(self, trainer: RewardGradientTrainer) -> None:
        self.trainer = trainer
        self.samples = len(trainer.prompts)
        self.order = PromptOrder(self.samples, trainer.config.seed)

    def stream(self, start_step: int, stop_step: int) -> Iterator[PromptBatch]:
        trainer, config = self.trainer, self.trainer.config
        size, world = config.train_batch_size, trainer.accelerator.num_processes
        micro_batches = config.gradient_accumulation_steps
        for step in range(start_step, stop_step):
            for index in range(micro_batches):
                first = ((step * micro_batches + index) * world + trainer.accelerator.process_index) * size
                places = range(first, first + size)
                prompts = [trainer.prompts[self.order[place]] for place in places]
                yield PromptBatch(
                    given=trainer.condition(trainer.encode([p.text for p in prompts])),
                    prompts=prompts,
                    seeds=[key_seed(config.seed, "image", place) for place in places],
                    u=float(keyed_uniform([(config.seed, "steps with gradient", step, index)])[0]),
                )


class RewardGradientTrainer(PromptTrainer[RewardGradientConfig, PromptBatch]):
    """Trains by the gradient of a differentiable reward."""

    method = "reward_gradient"
    needs: ClassVar[PromptNeeds] = PromptNeeds(reference=True)
    paper = """@inproceedings{clark2024directly,
  title={Directly Fine-Tuning Diffusion Models on Differentiable Rewards},
  author={Clark, Kevin and Vicol, Paul and Swersky, Kevin and Fleet, David J.},
  booktitle={ICLR},
  year={2024}
}"""

    @classmethod
    def work(cls, config: RewardGradientConfig, processes: int = 1) -> Work:
        return gradient_work(
            config,
            frozen_passes=cls.frozen_passes(config),
            copies=cls.slow_copies(config),
            steps_with_gradient=config.gradient_steps if config.gradient in ("draft", "alignprop") else 1,
            times=config.lv_samples if config.gradient == "draft_lv" else 1,
        )

    @classmethod
    def needs_reference(cls, config: RewardGradientConfig) -> bool:
        return config.train_mode == "lora" or config.kl_beta > 0  # Beside a LoRA it costs nothing.

    @classmethod
    def frozen_passes(cls, config: RewardGradientConfig) -> int:
        return int(config.kl_beta > 0)

    def make_batches(self) -> PromptBatches:
        self.read_prompts()
        self.judge_by(Scorer(self.config, self.accelerator))
        if not self.scorer.training_rewards.differentiable:
            stuck = [m.name for m in self.scorer.training_rewards.members if not m.reward.differentiable]
            raise UserError(
                f"no gradient can pass through {', '.join(stuck) or 'this way to combine rewards'}: reward_gradient "
                "needs differentiable rewards (`diffalign rewards list` says which are); ddpo and awm take any"
            )
        return PromptBatches(self)

    def compute_loss(self, batch: PromptBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        latents, pull = self._latents(batch)
        images = self.family.decode_latents(latents, grad=True, chunk=config.decode_batch_size)
        texts, rows = [p.text for p in batch.prompts], [p.metadata for p in batch.prompts]
        groups = list(range(len(texts)))
        if len(latents) > len(texts):
            times = len(latents) // len(texts)
            texts, rows, groups = texts * times, rows * times, groups * times
        scores = self.scorer.training_rewards(images, texts, rows, group_ids=groups, grad=True, gather=gather_object)
        # An image without a reward moves nothing; it must not make the whole step NaN.
        known = scores.total[scores.valid]
        losses = reward_loss(known, config.reward_ceiling, config.reward_scale)
        loss = losses.sum() / max(len(losses), 1) + config.kl_beta * pull
        report = {f"reward/{name}": _sum_and_count(output.rewards) for name, output in scores.raw.items()}
        outside = ((images.detach() <= 0) | (images.detach() >= 1)).float().mean()
        return loss, {
            "reward": _sum_and_count(scores.total),
            **report,
            "images": images.new_tensor((self.step + 1) * self.plan.effective_batch).float(),
            "distance_to_reference": pull.detach(),
            "saturated_pixels": outside,
        }

    def _latents(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """Clean latents with a graph over the steps that are differentiated, and the pull to the reference there."""
        config = self.config
        first, last = self._span(batch.u)
        x = starting_noise(batch.seeds, self.latent_shape).to(self.accelerator.device)
        with torch.no_grad(), self.policy.evaluating():
            for i in range(first):
                x, _, _ = self._step(batch, x, i, reference=False)
        if config.gradient == "draft_lv":
            return self._low_variance(batch, x, first)
        pulls = []
        x0 = x
        for i in range(first, last):
            x, x0, pull = self._step(batch, x, i, reference=config.kl_beta > 0)
            pulls.append(pull)
        return (x0 if config.gradient == "refl" else x), torch.stack(pulls).mean()

    def _span(self, u: float) -> tuple[int, int]:
        """The steps with gradient: from the first, up to and without the second."""
        n, config = len(self.steps), self.config
        if config.gradient == "refl":
            first = n - config.refl_last_steps + int(u * config.refl_last_steps)
            return first, first + 1
        if config.gradient == "draft_lv":
            return n - 1, n
        k = config.gradient_steps if config.gradient == "draft" else 1 + int(u * config.gradient_steps)
        return n - k, n

    def _low_variance(self, batch: PromptBatch, x: Tensor, last: int) -> tuple[Tensor, Tensor]:
        """Estimates of the last step from n noisings of its own estimate, (n B, C, h, w)."""
        with torch.no_grad(), self.policy.evaluating():
            _, clean, _ = self._step(batch, x, last, reference=False)
        alpha, sigma = float(self.steps.alpha[last]), float(self.steps.sigma[last])
        estimates, pulls = [], []
        for index in range(self.config.lv_samples):
            noise = keyed_noise([("low variance", index, seed) for seed in batch.seeds], self.latent_shape).to(clean)
            _, x0, pull = self._step(batch, alpha * clean + sigma * noise, last, reference=self.config.kl_beta > 0)
            estimates.append(x0)
            pulls.append(pull)
        return torch.cat(estimates), torch.stack(pulls).mean()

    def _step(self, batch: PromptBatch, x: Tensor, i: int, *, reference: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Latents after step i, its estimate of the clean ones, and the distance of predictions to the reference's."""
        index = torch.full((len(x),), i)
        timesteps = self.steps.timesteps[index].to(x.device)

        # The second call is the recomputation within the backward pass, which must not go through the wrapper of
        # several processes: that takes every call for the start of a new step.
        networks = iter([self.policy.denoiser])

        def predict(x: Tensor) -> Tensor:
            network = next(networks, self.policy.modules[self.family.denoiser_part])
            return guided_predict(self.family, network, x, timesteps, batch.given)

        # Before the pass that is recomputed: adapters must not be switched inside it.
        frozen = None
        if reference:
            with self.policy.reference() as network:
                frozen = guided_predict(self.family, network, x.detach(), timesteps, batch.given)
        if torch.is_grad_enabled() and self.config.checkpoint_steps:
            pred: Tensor = checkpoint(predict, x, use_reentrant=False)
        else:
            pred = predict(x)
        step = self.steps.step(pred, x, index)
        noise = step_noise(batch.seeds, i, self.latent_shape) if bool(self.steps.std[i] > 0) else torch.zeros(1)
        pull = torch.zeros((), device=x.device) if frozen is None else per_sample_mse(pred, frozen).mean()
        return step.sample(noise.to(x.device)), step.x0, pull

    def facts(self) -> Mapping[str, str]:
        config = self.config
        what = {
            "draft": f"the last {config.gradient_steps} of {config.num_inference_steps} steps",
            "draft_lv": f"the last step, over {config.lv_samples} noisings",
            "refl": f"one of the last {config.refl_last_steps} of {config.num_inference_steps} steps",
            "alignprop": f"the last 1 to {config.gradient_steps} of {config.num_inference_steps} steps",
        }
        return {
            "data": f"{len(self.prompts):,} prompts of {config.prompts}",
            "steps": f"{self.plan.steps:,}, {self.plan.steps * self.plan.effective_batch:,} images",
            "gradient": f"{config.gradient}: {what[config.gradient]}, guidance {config.guidance_scale:g}",
            "network": self._passes(),
            "rewards": self.scorer.describe(),
        }

    def _passes(self) -> str:
        """How much goes through the network in a step, recomputation and reference left out."""
        config = self.config
        samples = self.plan.effective_batch * (2 if config.guidance_scale != 1 else 1)
        steps = {"draft": config.gradient_steps, "draft_lv": config.lv_samples, "refl": 1}
        with_gradient = steps.get(config.gradient, config.gradient_steps)
        whole = config.num_inference_steps + (config.lv_samples if config.gradient == "draft_lv" else 0)
        most = "at most " if config.gradient in ("refl", "alignprop") else ""
        return (
            f"{most}{samples * whole:,} samples through it a step, {samples * with_gradient:,} of them with gradient"
        )


def _sum_and_count(values: Tensor) -> Tensor:
    """Sum and number of the values that are known, (2,): a metric."""
    values = values.detach().float()
    return torch.stack([values.nansum(), values.isfinite().sum()])

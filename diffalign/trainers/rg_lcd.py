"""RG-LCD, reward guided latent consistency distillation: a few-step student that is aligned while it is distilled.

Li, Feng, Chen, Wang 2024, "Reward Guided Latent Consistency Distillation", TMLR, arXiv 2403.11027. With f the one-step
prediction of the student at the timestep that :mod:`diffalign.trainers.lcd` draws, R a reward and D the decoder,

    L = L_LCD - beta E R( D(f(x_t, t, w)), prompt )

or, with ``reward_ceiling``, + beta E relu(ceiling - R). One-step predictions at much noise are blurred means, and a
reward that is differentiated through the decoder adds fine noise to them. With ``proxy`` R is replaced by the latent
proxy S of :mod:`diffalign.training.latent_proxy`: L = L_LCD - beta E S(f, prompt). After each step the proxy learns to
rank the student's prediction, the target's and the real image as R ranks them, decoded without gradient: R can be
anything that scores, and nothing is differentiated through the decoder.

What differs from the authors' code: the proxy is divided by ``expert_scale`` in the student's loss, so that beta has
the reward's unit with and without it. Prompts and candidates are picked together (their code keeps the whole list of
prompts for some experts), a hard label is the argmax over its pair, and the proxy takes a step where the student does,
whatever is accumulated. Images whose prompt was dropped have no reward.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.config import field
from diffalign.data.prompts import Prompt
from diffalign.diffusion.random import keyed_permutation
from diffalign.errors import UserError
from diffalign.estimation.work import Work
from diffalign.rewards.combine import CombinedRewards
from diffalign.trainers.lcd import Distilled, LCDBatches, LCDConfig, LCDTrainer
from diffalign.trainers.reward_gradient import reward_loss
from diffalign.training.images import ImageBatch
from diffalign.training.judge import Judge
from diffalign.training.online_config import JudgedConfig
from diffalign.training.proxy_learner import Lesson, ProxyConfig, ProxyLearner, make_proxy
from diffalign.training.run_log import RunLog
from diffalign.training.scoring import Scorer
from diffalign.training.validation import draw_images
from diffalign.training.work import with_rewarded_images

_STATE = "rg_lcd_state.json"


def rg_lcd_losses(distillation: Tensor, rewards: Tensor, beta: float = 1.0, ceiling: float | None = None) -> Tensor:
    """``L_LCD - beta R`` of each image, or ``L_LCD + beta relu(ceiling - R)``: (B,) and (B,) to (B,).

    Where the reward is NaN (not scored), the loss is that of distillation alone; its mean over B is the loss.
    """
    known = rewards.isfinite()
    guided = reward_loss(torch.where(known, rewards, 0.0), ceiling, beta)
    return distillation + torch.where(known, guided, 0.0)


@dataclass(kw_only=True)
class RGLCDConfig(LCDConfig, JudgedConfig, ProxyConfig):
    """Settings of reward guided latent consistency distillation."""

    reward_scale: float = field(
        1.0, help="beta, the factor on the reward: about 1 where good and bad differ by 0.1 to 1. 0 is plain LCD."
    )
    reward_ceiling: float | None = field(
        None, help="Rewards above count no more: relu(ceiling - R). Authors, for imagereward: 2. Not with a proxy."
    )
    reward_max_timestep: int | None = field(
        None, help="Use the reward only of predictions from up to this timestep (0 to 1000). Default: of all."
    )
    evaluation_inference_steps: int | None = field(
        None, help="Sampling steps then. Default: validation_inference_steps."
    )
    evaluation_guidance_scale: float | None = field(None, help="Guidance then. Default: validation_guidance_scale.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("reward_scale", self.reward_scale >= 0, "0 or more")
        last = self.reward_max_timestep
        self._require("reward_max_timestep", last is None or last >= 0, "0 or more")
        steps, guidance = self.evaluation_inference_steps, self.evaluation_guidance_scale
        self._require("evaluation_inference_steps", steps is None or steps >= 1, "at least 1")
        self._require("evaluation_guidance_scale", guidance is None or guidance >= 1, "at least 1")
        if self.proxy and self.reward_ceiling is not None:
            raise UserError(
                "reward_ceiling is in the reward's unit, and a proxy learns only which image is better: a score of "
                "its own may be shifted. Leave reward_ceiling out, or train without proxy."
            )
        if self.train_text_encoder:
            raise UserError("train_text_encoder: what text encoders learn is not distilled. Leave it off.")


@dataclass(frozen=True)
class Candidates:
    """What the proxy can learn from a micro-batch: n images that count."""

    latents: Tensor
    """Of student, target and real image, (n, 3, C, h, w), detached."""
    prompts: list[str]
    places: Tensor
    """Of each image in the step, over all processes, int64 (n,)."""


class RGLCDTrainer(LCDTrainer[RGLCDConfig]):
    """Distils by a teacher and a reward."""

    method = "rg_lcd"
    paper = """@article{li2024reward,
  title={Reward Guided Latent Consistency Distillation},
  author={Li, Jiachen and Feng, Weixi and Chen, Wenhu and Wang, William Yang},
  journal={Transactions on Machine Learning Research},
  year={2024}
}"""
    judge: Judge | None = None
    learner: ProxyLearner | None = None

    @classmethod
    def work(cls, config: RGLCDConfig, processes: int = 1) -> Work:
        plain = super().work(config, processes)
        return plain if config.proxy or not config.reward_scale else with_rewarded_images(plain, config)

    def make_batches(self) -> LCDBatches:
        config = self.config
        self.scorer = Scorer(config, self.accelerator)
        self._check_gradient()
        batches = super().make_batches()
        prompts = sorted(set(batches.items.prompts))
        self.scorer.check([Prompt(text) for text in prompts], config.dataset_name)
        if config.heldout_prompts:
            self.judge = Judge(
                config, self.accelerator, self.scorer, set(prompts), self._draw, config.num_heldout_prompts
            )
        if config.proxy:
            self.learner = ProxyLearner(make_proxy(config, self.family, batches.items), config, self.accelerator)
        self._candidates: list[Candidates] = []
        self._micro_batches = 0
        return batches

    def _check_gradient(self) -> None:
        rewards = self.scorer.training_rewards
        if self.config.proxy or rewards.differentiable or not self.config.reward_scale:
            return
        stuck = [m.name for m in rewards.members if not m.reward.differentiable]
        raise UserError(
            f"no gradient can pass through {', '.join(stuck) or 'this way to combine rewards'}. Let a latent proxy "
            "learn it: proxy: openai/clip-vit-base-patch32 (or another CLIP of transformers), or proxy: shapes-clip "
            "for the bundled world. `diffalign rewards list` says which rewards have a gradient."
        )

    # The student ------------------------------------------------------------------------------------------------

    def compute_loss(self, batch: ImageBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config, distilled = self.config, self.distil(batch)
        rows = self._counted(distilled)
        report = self.report(distilled)
        losses = distilled.losses
        if config.reward_scale:
            rewards, own = self._rewards(distilled, rows)
            losses = rg_lcd_losses(losses, rewards, config.reward_scale, config.reward_ceiling)
            report |= own
        if self.learner:
            self._keep(distilled, rows)
        return losses.mean(), report

    def _counted(self, distilled: Distilled) -> Tensor:
        """The images that a reward is asked about, int64 (n,): they have a prompt, and not too much noise."""
        counts = torch.tensor([bool(prompt) for prompt in distilled.prompts], device=distilled.timesteps.device)
        if self.config.reward_max_timestep is not None:
            counts &= distilled.timesteps <= self.config.reward_max_timestep
        return counts.nonzero().flatten()

    def _rewards(self, distilled: Distilled, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Rewards of one-step predictions, or the proxy's, (B,) with graph, NaN where there is none; and metrics."""
        latents, prompts = distilled.student[rows], [distilled.prompts[i] for i in rows.tolist()]
        whole = torch.full_like(distilled.losses.detach(), torch.nan)
        if self.learner:
            with self.learner.proxy.frozen():
                own = self.learner.proxy(latents, prompts) if prompts else latents.new_zeros(0)
            scores = own / self.config.expert_scale
            return whole.index_put((rows,), scores.to(whole)), {"proxy_reward": _sum_and_count(scores)}
        images = self._decode(latents, grad=True)
        found = self._score(images, prompts, list(range(len(prompts))), grad=True)
        outside = ((images.detach() <= 0) | (images.detach() >= 1)).float()
        report = {
            **_metrics(found),
            "saturated_pixels": torch.stack([outside.sum(), torch.tensor(outside.numel()).to(outside)]),
        }
        return whole.index_put((rows,), found.total.to(whole)), report

    def _decode(self, latents: Tensor, *, grad: bool = False) -> Tensor:
        if not len(latents):
            return latents.new_zeros(0, 3, 8, 8)
        return self.family.decode_latents(latents, grad=grad, chunk=self.config.decode_batch_size)

    def _score(self, images: Tensor, prompts: list[str], groups: list[int], *, grad: bool = False) -> CombinedRewards:
        # Every process comes here equally often, images or not: running statistics are those of all.
        return self.scorer.training_rewards(images, prompts, group_ids=groups, grad=grad, gather=gather_object)

    # The proxy --------------------------------------------------------------------------------------------------

    def _keep(self, distilled: Distilled, rows: Tensor) -> None:
        """Remember the candidates of a micro-batch until the student has made its step."""
        accelerator, size = self.accelerator, self.config.train_batch_size
        first = (self._micro_batches * accelerator.num_processes + accelerator.process_index) * size
        self._micro_batches += 1
        latents = torch.stack([distilled.student.detach().float(), distilled.target, distilled.latents.float()], 1)
        prompts = [distilled.prompts[i] for i in rows.tolist()]
        self._candidates.append(Candidates(latents[rows], prompts, first + rows.cpu()))

    def training_step(self, stream: Iterator[ImageBatch]) -> dict[str, float]:
        self._candidates, self._micro_batches = [], 0
        metrics = super().training_step(stream)
        if self.learner:
            start = time.perf_counter()
            metrics |= self._teach(self.learner)
            seconds = time.perf_counter() - start
            metrics["proxy_seconds"] = seconds
            metrics["step_seconds"] += seconds
            metrics["samples_per_second"] = self.plan.effective_batch / metrics["step_seconds"]
        return metrics

    def _teach(self, learner: ProxyLearner) -> dict[str, float]:
        """Have the expert judge the candidates of the step just made, or some of them, and the proxy learn from it."""
        drawn = keyed_permutation(self.plan.effective_batch, self.config.seed, "proxy", self.step)
        chosen = drawn[: self.config.proxy_batch_size]
        rewards: list[Tensor] = []

        def lessons() -> Iterator[Lesson]:
            for kept in self._candidates:
                picked = torch.isin(kept.places, chosen)
                rows = picked.nonzero().flatten()
                latents = kept.latents[rows.to(kept.latents.device)]
                prompts = [kept.prompts[i] for i in rows.tolist()]
                with torch.no_grad():
                    images = self._decode(latents.flatten(0, 1))
                groups = [i for i in range(len(prompts)) for _ in range(3)]
                found = self._score(images, [prompts[i] for i in groups], groups).total.unflatten(0, (-1, 3))
                rewards.append(found)
                yield Lesson(latents, prompts, found * self.config.expert_scale)

        report = learner.step(lessons())
        table = torch.cat(rewards).double()
        local = torch.stack([*table.nansum(0), *table.isfinite().sum(0)])
        sums, counts = self.accelerator.reduce(local.to(self.accelerator.device, torch.float32), "sum").view(2, 3)
        names = ("reward", "reward_of_target", "reward_of_image")
        means = (sums / counts).tolist()
        return report | {name: mean for name, mean, count in zip(names, means, counts.tolist(), strict=True) if count}

    # The judge --------------------------------------------------------------------------------------------------

    def _draw(self, prompts: list[Prompt], seeds: list[int]) -> Tensor:
        config, plain = self.config, self.sampling()
        sampling = replace(
            plain,
            num_inference_steps=config.evaluation_inference_steps or plain.num_inference_steps,
            guidance_scale=config.evaluation_guidance_scale or plain.guidance_scale,
        )
        with self.policy.ema_weights(), self.accelerator.autocast():
            drawn = draw_images(
                self.family,
                self.family.denoiser,
                sampling,
                [prompt.text for prompt in prompts],
                seeds,
                config.train_batch_size,
            )
        return torch.from_numpy(np.stack([np.array(image) for image in drawn])).permute(0, 3, 1, 2).float() / 255

    def at_start(self, log: RunLog) -> None:
        super().at_start(log)
        if self.judge:
            self.judge.run(self.step, self.policy.export, log)

    def after_step(self, log: RunLog, metrics: Mapping[str, float]) -> None:
        if self.judge and self.judge.after_step(self.step, self.plan.steps, self.policy.export, log):
            self._end_early()

    def _end_early(self) -> None:
        self.done = True
        self.plan = replace(self.plan, steps=self.step)

    # Resuming ---------------------------------------------------------------------------------------------------

    def save_extra(self, folder: Path) -> None:
        super().save_extra(folder)
        heldout = self.judge.heldout.state_dict() if self.judge else None
        state = {"scorer": self.scorer.state_dict(), "heldout": heldout}
        (folder / _STATE).write_text(json.dumps(state), encoding="utf-8")
        if self.learner:
            self.learner.save(folder)

    def load_extra(self, folder: Path) -> None:
        super().load_extra(folder)
        if not (folder / _STATE).is_file():
            raise UserError(f"{folder} is no checkpoint of {self.method}: {_STATE} is missing")
        state: dict[str, Any] = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        self.scorer.load_state_dict(state["scorer"])
        if self.learner:
            self.learner.load(folder)
        if self.judge and state["heldout"] is not None:
            self.judge.heldout.load_state_dict(state["heldout"])
            if self.judge.heldout.should_stop:
                self._end_early()

    def facts(self) -> Mapping[str, str]:
        config = self.config
        facts = {**super().facts(), "rewards": self.scorer.describe(), "beta": f"{config.reward_scale:g}"}
        if self.learner:
            trained = sum(p.numel() for p in self.learner.parameters.values())
            facts["proxy"] = (
                f"{config.proxy}, {trained:,} parameters train, learning rate {config.proxy_learning_rate:g}"
            )
        return facts


def _metrics(found: CombinedRewards) -> dict[str, Tensor]:
    of_each = {f"reward/{name}": _sum_and_count(output.rewards) for name, output in found.raw.items()}
    return {"reward": _sum_and_count(found.total), **of_each}


def _sum_and_count(values: Tensor) -> Tensor:
    """Sum and number of the values that are known, (2,): a metric."""
    values = values.detach().float()
    return torch.stack([values.nansum(), values.isfinite().sum()])

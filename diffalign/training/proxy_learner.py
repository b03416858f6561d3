"""Teaching a latent proxy beside a run: its settings, its optimiser, its share of a checkpoint, several processes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.assets import resolve
from diffalign.config import field
from diffalign.data.items import Items
from diffalign.errors import UserError
from diffalign.pipelines import Family
from diffalign.rewards.encoders import load_encoder
from diffalign.training.config import TrainingConfig
from diffalign.training.latent_proxy import LatentProxy, ProxyLoss, fit_colours, proxy_agreement, proxy_loss
from diffalign.training.optimizers import build_optimizer

WEIGHTS_FILE = "proxy.safetensors"
OPTIMIZER_FILE = "proxy_optimizer.pt"
_COLOUR_IMAGES = 32


@dataclass(kw_only=True)
class ProxyConfig(TrainingConfig):
    """The latent proxy reward model."""

    proxy: str | None = field(
        None,
        help="CLIP that the proxy starts from: folder, hub id (openai/clip-vit-base-patch32), or shapes-clip. "
        "Default: no proxy, the reward itself is differentiated.",
    )
    proxy_learning_rate: float = field(3.3e-6, help="Learning rate of the proxy. Authors: 3.3e-6.")
    proxy_batch_size: int | None = field(
        None, help="Images of a step, over all processes, that the proxy learns from. Default: all."
    )
    proxy_loss: ProxyLoss = field("kl", help="kl: the expert's probabilities; cross_entropy: its choices.")
    smooth_gt_label: bool = field(
        False, help="Do not teach the proxy that a generated image beats the real one: such pairs are undecided."
    )
    expert_scale: float = field(
        1.0,
        help="Factor that makes logits of rewards: 1 for those whose differences are logits (pickscore, imagereward), "
        "100 for bare cosines (hpsv2.1, clipscore).",
    )
    proxy_image_groups: int | None = field(
        2, help="Last groups of the proxy's image tower that train: projection, layers. Authors: 2. none: all."
    )
    proxy_text_groups: int | None = field(5, help="The same of the text tower. Authors: 5. none: all.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("proxy_learning_rate", "expert_scale"):
            self._require(name, getattr(self, name) > 0, "above 0")
        self._require("proxy_batch_size", self.proxy_batch_size is None or self.proxy_batch_size >= 1, "at least 1")
        for name in ("proxy_image_groups", "proxy_text_groups"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 0, "0 or more, or none for all")
        if self.smooth_gt_label and self.proxy_loss == "cross_entropy":
            raise UserError("smooth_gt_label is for proxy_loss kl; with cross_entropy the real image always wins")


@dataclass(frozen=True)
class Lesson:
    """The candidates of n prompts, judged by the expert."""

    latents: Tensor
    """(n, 3, C, h, w), in the order of :data:`diffalign.training.latent_proxy.CANDIDATES`."""
    prompts: list[str]
    expert: Tensor
    """Logits (n, 3); NaN where the expert has none."""


class ProxyLearner:
    """A proxy and its optimiser.

    Every process teaches its own lessons; gradients are summed over all, so the proxies stay equal, and the step is
    that of one process with all lessons.
    """

    def __init__(self, proxy: LatentProxy, config: ProxyConfig, accelerator: Accelerator) -> None:
        self.proxy = proxy.to(accelerator.device).eval()
        self.config, self.accelerator = config, accelerator
        self.parameters = {name: p for name, p in proxy.named_parameters() if p.requires_grad}
        self.optimizer = build_optimizer(config, self.parameters.values(), config.proxy_learning_rate)

    def step(self, lessons: Iterable[Lesson]) -> dict[str, float]:
        """Learn from the lessons of all processes, as one mean over prompts. Every process must call it.

        Returns:
            ``proxy_loss``, ``proxy_accuracy`` (share of the pairs that the expert holds different which the proxy
            ranks as it does) and ``proxy_grad_norm``. Nothing where there was no prompt with three scores, and a step
            whose gradient is not finite is not taken: ``proxy_skipped``.
        """
        self.optimizer.zero_grad()
        sums = torch.zeros(4, device=self.accelerator.device)
        with torch.enable_grad():
            for lesson in lessons:
                sums += self._backward(lesson)
        loss, right, decided, count = self._reduce(sums)
        if not count:
            return {}
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm))
        report = {"proxy_loss": loss / count, "proxy_grad_norm": norm}
        if decided:
            report["proxy_accuracy"] = right / decided
        if not math.isfinite(norm):
            return {**report, "proxy_skipped": 1.0}
        self.optimizer.step()
        self.proxy.limit_scale()
        return report

    def _backward(self, lesson: Lesson) -> Tensor:
        """Add the gradient of a lesson's summed loss; (loss, right pairs, decided pairs, prompts)."""
        # A student that just blew up has no lesson to teach.
        known = lesson.expert.isfinite().all(1) & lesson.latents.flatten(1).isfinite().all(1)
        rows = known.nonzero().flatten()
        sums = torch.zeros(4, device=lesson.latents.device)
        for part in rows.split(self.config.train_batch_size) if len(rows) else ():
            expert = lesson.expert[part]
            prompts = [lesson.prompts[i] for i in part.tolist()]
            own = self.proxy(lesson.latents[part].flatten(0, 1), [p for p in prompts for _ in range(3)]).unflatten(
                0, (len(part), 3)
            )
            loss = proxy_loss(expert, own, self.config.proxy_loss, self.config.smooth_gt_label).sum()
            loss.backward()
            right, decided = proxy_agreement(expert, own)
            sums += torch.stack([loss.detach(), right, decided, torch.tensor(len(part))]).to(sums)
        return sums

    def _reduce(self, sums: Tensor) -> list[float]:
        """Make gradients the mean over the prompts of all processes; the sums over all processes."""
        parameters = list(self.parameters.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in gradients] + [sums])
        if self.accelerator.num_processes > 1:
            flat = self.accelerator.reduce(flat, "sum")
        parts = flat.split([p.numel() for p in parameters] + [len(sums)])
        count = parts[-1][-1].clamp(min=1)
        for parameter, part in zip(parameters, parts, strict=False):
            parameter.grad = (part / count).view_as(parameter)
        result: list[float] = parts[-1].tolist()
        return result

    def save(self, folder: Path) -> None:
        """Write what :meth:`load` reads: the weights that train, and the optimiser's state."""
        save_file({n: p.detach().cpu().contiguous() for n, p in self.parameters.items()}, folder / WEIGHTS_FILE)
        torch.save(self.optimizer.state_dict(), folder / OPTIMIZER_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            UserError: it has no proxy, or one of another shape.
        """
        if not (folder / WEIGHTS_FILE).is_file():
            raise UserError(f"{folder} has no proxy: {WEIGHTS_FILE} is missing. Resume with proxy as it was: none.")
        stored = load_file(folder / WEIGHTS_FILE)
        if {n: p.shape for n, p in stored.items()} != {n: p.shape for n, p in self.parameters.items()}:
            raise UserError(
                f"the proxy in {folder} is another than these settings make. Resume with the proxy, "
                "proxy_image_groups, proxy_text_groups and resolution of the run."
            )
        for name, parameter in self.parameters.items():
            parameter.copy_(stored[name])
        state: dict[str, Any] = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
        self.optimizer.load_state_dict(state)


def make_proxy(config: ProxyConfig, family: Family, items: Items) -> LatentProxy:
    """The proxy of a run, its colours fitted to the first images of the data. The VAE stays loaded.

    Raises:
        UserError: there is no such CLIP.
    """
    assert config.proxy is not None
    place = resolve(config.proxy)
    encoder = load_encoder(
        place, place, advice="proxy takes a CLIP in the layout of transformers, with its processor."
    )
    shape = family.latent_shape(*items.targets[0])
    parts: list[Tensor] = []
    for index in range(len(items)):
        item = items[index]
        latents = item["latents"] if "latents" in item else family.encode_images(item["images"][None])[0]
        if latents.shape == torch.Size(shape):
            parts.append(latents.float().to(family.device))
        if len(parts) == _COLOUR_IMAGES:
            break
    latents = torch.stack(parts)
    images = torch.cat([family.decode_latents(part) for part in latents.split(1)])
    return LatentProxy(
        encoder, shape, fit_colours(latents, images).cpu(), config.proxy_image_groups, config.proxy_text_groups
    )

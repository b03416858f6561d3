"""SDXL at its real size with random weights, and data of its real shapes: what ``sdxl_step.py`` runs on.

Speed and memory do not depend on the values of weights. The networks are made without data, from the configuration of
SDXL base, and filled in their own dtype, so that no float32 copy of them ever exists.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.data.geometry import Geometry
from diffalign.data.items import CachedItems
from diffalign.data.plans import Plan
from diffalign.data.shards import ShardStore
from diffalign.diffusion.consistency import solver_grid
from diffalign.errors import UserError
from diffalign.pipelines.base import Family
from diffalign.pipelines.skeleton import ARCHITECTURES, Skeleton, find_configs
from diffalign.pipelines.vae import accept_any_dtype
from diffalign.trainers import load_method
from diffalign.trainers.lcd import LCDBatches, LCDTrainer
from diffalign.training.images import ImageBatches, ImageTrainer
from diffalign.training.online import OnlineTrainer, Rollout
from diffalign.training.pair_loss import PairTrainer
from diffalign.training.pairs import PairBatches
from diffalign.training.rollout import Trajectory
from diffalign.training.scoring import Scored

_STD = 0.02


def fill(module: nn.Module, device: torch.device | str) -> Any:
    """Give a network of the meta device random weights, on a device."""
    module = nn.Module.to_empty(module, device=device)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=_STD)
            else:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        for name, buffer in module.named_buffers():
            if not name.endswith("position_ids"):
                raise ValueError(f"what should the buffer {name} hold?")
            buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return module


def random_family(model: str, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Family:
    """A model with a random denoiser; its VAE and text encoders are left out.

    Args:
        model: "sdxl" for SDXL base, or where the configuration of another one lies.
    """
    skeleton = _skeleton(model, dtype)
    family = type(skeleton.family).load(skeleton.configs.folder, dtype=dtype, device=device)
    family._denoiser = fill(skeleton.denoiser(), device)
    return family


def _skeleton(model: str, dtype: torch.dtype) -> Skeleton:
    known = model in ARCHITECTURES
    return Skeleton(find_configs("" if known else model, like=model if known else None), dtype=dtype)


def random_encoders(family: Family) -> tuple[Any, list[Any]]:
    """The VAE, in float32 as SDXL's configuration demands, and the text encoders of a family."""
    skeleton = _skeleton(family.path, family.dtype)
    vae, texts = skeleton.vae(), skeleton.text_encoders()
    return fill(vae, family.device), [fill(encoder, family.device) for encoder in texts.values()]


def random_decoder(family: Family, dtype: torch.dtype) -> Any:
    """The VAE of a family alone, ready to decode."""
    vae = fill(_skeleton(family.path, family.dtype).vae().to(dtype), family.device)
    return accept_any_dtype(vae.requires_grad_(False).eval())


def random_text(family: Family, count: int) -> dict[str, Tensor]:
    """Text embeddings of so many prompts."""
    return {name: torch.randn(count, *shape).to(family.dtype) for name, shape in family.text_shapes.items()}


def random_items(
    family: Family, folder: Path, resolution: int, sides: tuple[str, ...], count: int = 32
) -> CachedItems:
    """Samples in a cache on disk as `diffalign train` writes it, of random latents and text embeddings."""
    geometry = Geometry(resolution, multiple=family.resolution_multiple)
    latents, text = ShardStore(folder / "latents", {}), ShardStore(folder / "text", {})
    keys: dict[str, list[str]] = {"latents": [], "text": []}
    for index in range(count):
        for side in sides:
            keys["latents"].append(_key(f"{side} {index}"))
            latents.put(keys["latents"][-1], {"latents": torch.randn(family.latent_shape(resolution, resolution))})
    for index in range(count + 1):  # The last is the empty prompt.
        keys["text"].append(_key(f"prompt {index}"))
        text.put(keys["text"][-1], {name: value[0] for name, value in random_text(family, 1).items()})
    latents.flush()
    text.flush()
    plans = [_plan(index, sides, resolution) for index in range(count)]
    latent_reader, latent_places = latents.reader(keys["latents"])
    text_reader, text_places = text.reader(keys["text"])
    return CachedItems(
        plans,
        [geometry.place(plan.id, *plan.sizes) for plan in plans],
        (latent_reader, latent_places.view(count, len(sides), 2)),
        (text_reader, text_places.view(count + 1, 1, 2)),
    )


def _key(name: str) -> str:
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def _plan(index: int, sides: tuple[str, ...], resolution: int) -> Plan:
    return Plan(
        index=index,
        id=str(index),
        captions=(f"prompt {index}", *[None for _ in sides]),
        numbers={"label": float(index % 2) if len(sides) == 1 else 1.0, "weight": 1.0},
        sides=sides,
        digests=tuple(_key(f"{side} {index}") for side in sides),
        sizes=((resolution, resolution),) * len(sides),
    )


def synthetic_trainer(method: str, family: Family, folder: Path, **settings: Any) -> Any:
    """The trainer of a method, as it is, on random data of the real shapes.

    Args:
        family: from :func:`random_family`.
        folder: for the cache and the run.
        settings: of its config, ``resolution`` among them.
    """
    config_class, trainer_class = load_method(method)
    chosen: dict[str, Any] = {
        "pretrained_model_name_or_path": family.path,
        "output_dir": str(folder / "run"),
        "report_to": ["none"],
        "max_train_steps": 1_000_000,
        "checkpointing_steps": 0,
    }
    if issubclass(trainer_class, OnlineTrainer) and not trainer_class.needs.steps:
        chosen |= _online_settings(folder, settings)
        return _online(trainer_class)(config_class(**chosen | settings), family)
    if issubclass(trainer_class, PairTrainer):
        sides: tuple[str, ...] = ("chosen", "rejected")
        batches: Any = PairBatches
    elif trainer_class is LCDTrainer:
        sides, batches = ("image",), _lcd_batches
    elif issubclass(trainer_class, ImageTrainer) and not issubclass(trainer_class, LCDTrainer):
        sides, batches = ("image",), ImageBatches
    else:
        raise UserError(
            f"{method} learns from what its own sampler draws, or from rewards of decoded images: "
            "benchmarks/rl_rate.py and benchmarks/distil_step.py measure such methods"
        )
    items = random_items(family, folder / "cache", settings["resolution"], sides)

    class Synthetic(trainer_class):  # type: ignore[misc, valid-type]
        def make_batches(self) -> Any:
            if trainer_class is LCDTrainer:
                self.unconditional = {name: v.to(family.device) for name, v in random_text(family, 1).items()}
            return batches(items, self.config, self.family, self.accelerator)

    return Synthetic(config_class(**chosen | {"dataset_name": "random"} | settings), family)


def _lcd_batches(items: CachedItems, config: Any, family: Family, accelerator: Any) -> LCDBatches:
    grid = solver_grid(family.noise_process, config.num_ddim_timesteps)
    return LCDBatches(items, config, family, accelerator, grid)


def _online_settings(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    (folder / "prompts.txt").write_text("\n".join(f"prompt {index}" for index in range(8)))
    batch = settings.get("train_batch_size", 1)
    return {
        "prompts": str(folder / "prompts.txt"),
        "rewards": ["jpeg_compressibility"],
        "num_prompts_per_rollout": 1,
        "num_images_per_prompt": batch if batch > 1 else 2,
        "num_train_steps_per_image": 1,
        "num_inference_steps": 10,
        "guidance_scale": 1.0,
    }


def _online(trainer_class: Any) -> Any:
    """The trainer with rollouts that nobody drew: drawing is measured by ``rollout.py``."""

    class Synthetic(trainer_class):  # type: ignore[misc, valid-type]
        drawn: Rollout | None = None

        def collect(self, number: int) -> Rollout:
            if self.drawn is None:
                self.drawn = self._random_rollout()
            return replace(self.drawn, number=number)

        def _random_rollout(self) -> Rollout:
            draws = self.batches.order.draws(0, self.accelerator.process_index)
            count = len(draws)
            empty = torch.zeros(count, 0, *self.latent_shape)
            trajectory = Trajectory(
                latents=torch.randn(count, *self.latent_shape),
                seeds=draws.seeds,
                index=torch.zeros(count, 0, dtype=torch.int64),
                x=empty,
                x_next=empty,
                log_probs=torch.zeros(count, 0),
            )
            signs = torch.tensor([1.0, -1.0]).repeat(count)[:count]
            scored = Scored({}, torch.zeros(count, 0), torch.zeros(count, dtype=torch.bool), 0.0)
            scored = replace(scored, total=signs, advantages=signs, weight=torch.ones(count))
            prompts = [self.prompts[i] for i in draws.prompts.tolist()]
            return Rollout(0, draws, prompts, random_text(self.family, count), trajectory, scored)

    return Synthetic

"""The cost of one pass through one network, found by running it on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign.data.encoding import images_at_once
from diffalign.diffusion.error import per_sample_mse
from diffalign.estimation.meter import Autocast, Cost, Device, Meter, weights
from diffalign.estimation.work import Model, Pass
from diffalign.pipelines.adapters import LoraSpec, adapters_off, add_lora
from diffalign.pipelines.skeleton import Skeleton, find_configs


class Networks:
    """The networks of a model on the meta device, as its training has them."""

    def __init__(self, model: Model) -> None:
        self.model = model
        vae = find_configs(model.vae) if model.vae else None
        configs = find_configs(model.path, revision=model.revision, like=model.like)
        self.skeleton = Skeleton(configs, vae=vae, dtype=torch.float32 if model.full else model.dtype)
        self.family = self.skeleton.family
        self.denoiser = self.skeleton.denoiser()
        if model.sharded and model.autocast is not None:
            self.denoiser = nn.Module.to(self.denoiser, model.autocast)
        self.vae = self.skeleton.vae()
        self.text_encoders = self.skeleton.text_encoders()
        with torch.device("meta"):
            if model.full:
                self.denoiser.requires_grad_(True)
            else:
                spec = LoraSpec(rank=model.rank, targets=model.targets)
                add_lora(self.denoiser, spec, targets=self.family.lora_targets)
            if model.text_encoders:
                for encoder in self.text_encoders.values():
                    add_lora(encoder, LoraSpec(rank=model.rank), targets=self.family.text_lora_targets)
        for module in (self.denoiser, *self.text_encoders.values()):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    # There from the second micro-batch of a step on, so that they are no part of a pass.
                    parameter.grad = torch.empty_like(parameter)

    @property
    def trained(self) -> int:
        """Numbers that train."""
        modules = (self.denoiser, *self.text_encoders.values())
        return sum(p.numel() for module in modules for p in module.parameters() if p.requires_grad)

    def together(self, stay: bool) -> int:
        """Numbers of shared-out weights that are whole at once: those outside of blocks and, of the blocks, all where
        they stay together, else the one at work and the next."""
        kinds = set(self.family.shard_blocks)
        blocks = [m for m in self.denoiser.modules() if type(m).__name__ in kinds]
        sizes = sorted(sum(p.numel() for p in block.parameters()) for block in blocks)
        return self.trained if stay else self.trained - sum(sizes) + sum(sizes[-2:])

    def frozen_bytes(self, part: str) -> int:
        """Bytes of the weights of a part that do not train."""
        modules = {"denoiser": [self.denoiser], "vae": [self.vae], "text_encoders": list(self.text_encoders.values())}
        size = sum(t.numel() * t.element_size() for t in weights(*modules[part]) if not t.requires_grad)
        if part != "denoiser" or self.model.bits is None:
            return size
        linear = [m.weight for m in self.denoiser.modules() if isinstance(m, nn.Linear) and not m.weight.requires_grad]
        return size - sum(w.numel() * (8 * w.element_size() - self.model.bits) // 8 for w in linear)

    def size(self, model: Model, native: bool = False) -> tuple[int, int]:
        """Height and width of the images, in pixels; ``native`` are those the checkpoint was made for."""
        side = self.family.default_resolution
        if native:
            return side, side
        return model.height or side, model.width or side

    def checkpoint(self, blocks: tuple[str, ...] | None, autocast: Autocast) -> None:
        """Recompute activations in some blocks, see :class:`Model`, cast as the first pass was."""
        recompute = partial(
            checkpoint,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), autocast),
        )
        for module in (self.denoiser, *self.text_encoders.values()):
            for name, child in module.named_modules():
                if hasattr(child, "gradient_checkpointing"):
                    child.gradient_checkpointing = blocks is not None and (
                        not blocks or any(name == block or name.startswith(f"{block}.") for block in blocks)
                    )
                    child._gradient_checkpointing_func = recompute

    def inputs(self, samples: int, shape: tuple[int, int, int]) -> dict[str, Any]:
        """What :meth:`diffalign.pipelines.base.Family.predict` takes, for so many samples."""
        text = {name: _empty(samples, *own, dtype=self.model.dtype) for name, own in self.family.text_shapes.items()}
        return {
            "latents": _empty(samples, *shape),
            "timesteps": _empty(samples, dtype=torch.int64),
            "text": text,
            "sizes": _empty(samples, 6, dtype=torch.int64),
        }

    def run(self, what: Pass, height: int, width: int) -> tuple[Callable[[], Tensor], list[nn.Module], list[Tensor]]:
        """(a call that makes the pass and returns its loss, the modules it goes through, its inputs)."""
        shape = self.family.latent_shape(height, width)
        if what.network == "denoiser":
            given = self.inputs(what.samples, shape)
            target = _empty(what.samples, *shape)
            tensors = [target, *(t for t in given.values() if isinstance(t, Tensor)), *given["text"].values()]
            return (
                lambda: per_sample_mse(self.family.predict(self.denoiser, **given), target).mean(),
                [self.denoiser],
                tensors,
            )
        if what.network == "text_encoders":
            ids = _empty(what.samples, self.family.text_length, dtype=torch.int64)
            return (
                lambda: torch.stack([_encode(encoder, ids) for encoder in self.text_encoders.values()]).sum(),
                list(self.text_encoders.values()),
                [ids],
            )
        vae: Any = self.vae
        if what.network == "vae_decoder":
            latents = _empty(what.samples, *shape, dtype=vae.dtype).requires_grad_(what.grad)
            return lambda: vae.decode(latents, return_dict=False)[0].float().mean(), [vae], [latents]
        images = _empty(what.samples, 3, height, width, dtype=vae.dtype)
        return lambda: vae.encode(images).latent_dist.mean.float(), [vae], [images]


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _encode(encoder: nn.Module, ids: Tensor) -> Tensor:
    output: Mapping[str, Any] = encoder(ids, output_hidden_states=True)
    return output["hidden_states"][-2].float().sum()


def networks(model: Model) -> Networks:
    """The networks of a model; made once, whatever the size of images and what is checkpointed."""
    return _networks(replace(model, checkpointed=None, height=None, width=None))


@lru_cache(maxsize=4)
def _networks(model: Model) -> Networks:
    return Networks(model)


@lru_cache(maxsize=256)
def trace(model: Model, what: Pass, device: Device = "cuda") -> Cost:
    """What a pass costs: the forward pass, and the backward pass where it has one.

    Args:
        model: the networks.
        what: the pass; its ``count`` and ``held`` do not matter.
        device: whose rules of autocast to follow.

    Raises:
        UserError: the model's configs cannot be had.
    """
    found = networks(model)
    height, width = found.size(model, what.native)
    if what.split:
        what = replace(what, samples=min(what.samples, images_at_once(height, width)))
    call, modules, inputs = found.run(what, height, width)
    for module in modules:
        module.train(what.grad)
    given = [*weights(*modules), *inputs, *(p.grad for m in modules for p in m.parameters() if p.grad is not None)]
    switched = nullcontext() if what.adapters or model.full else adapters_off(found.denoiser)
    with torch.set_grad_enabled(what.grad), switched, Meter(given) as meter:
        with Autocast(meter, device, model.autocast if what.autocast else None) as autocast:
            found.checkpoint(model.checkpointed, autocast)
            loss = call()
            saved = meter.live
            if what.grad:
                loss.backward()
        return meter.cost(saved)

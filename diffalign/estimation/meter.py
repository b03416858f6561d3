"""Running networks on the meta device and writing down what they would have cost.

On the meta device a tensor has a shape and no data, so a network of any size runs in seconds and in no memory,
through exactly the code that a real step goes through: LoRA layers, checkpointing, autograd. :class:`Meter` sees every
operation and keeps account of the bytes that are alive, of floating-point operations and of bytes moved.

Two things are not as they would be on a device, and are put right here. Autocast does not act on meta tensors:
:class:`Autocast` casts what it would cast. And attention would be taken apart into matrices that no fused kernel
makes: :class:`_FusedAttention` keeps what FlashAttention keeps, its inputs, its output and a number for each query.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Device = Literal["cuda", "cpu"]

# What the two devices run in the short type, and what CUDA runs in float32: the part of the tables in the reference of
# torch.amp that a diffusion model meets.
_SHORT = {
    functional.linear,
    functional.conv1d,
    functional.conv2d,
    functional.conv_transpose2d,
    functional.scaled_dot_product_attention,
    torch.matmul,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.mm,
    torch.bmm,
    torch.baddbmm,
    torch.addmm,
}
_FLOAT32_ON_CUDA = {
    functional.group_norm,
    functional.layer_norm,
    functional.softmax,
    functional.mse_loss,
    torch.softmax,
    torch.pow,
    torch.Tensor.pow,
    torch.exp,
    torch.sum,
    torch.Tensor.sum,
}


@dataclass(frozen=True)
class Cost:
    """What some work costs.

    Attributes:
        saved: bytes alive after the forward pass beyond those before it: what the backward pass needs.
        peak: the most bytes alive at once, beyond those before it.
        flops: floating-point operations, a multiply-add counted as 2.
        moved: bytes read and written by all operations.
        kernels: operations that do work on the device.
        work: (flops, bytes) of each of them, summed over those that are alike.
    """

    saved: int
    peak: int
    flops: int
    moved: int
    kernels: int
    work: Mapping[tuple[int, int], int]


class Meter(TorchDispatchMode):
    """Within it, every operation on meta tensors is counted.

    Args:
        given: tensors that are there already and are not counted: weights, inputs.
    """

    def __init__(self, given: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flops = self.moved = self.kernels = 0
        self.work: dict[tuple[int, int], int] = {}
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._results: dict[tuple[Any, ...], Any] = {}
        for tensor in given:
            self._watch(tensor.untyped_storage(), 0)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        key = (func, *map(_describe, _leaves((args, kwargs))))
        known = self._results.get(key)
        if known is None:
            return self._first(key, func, args, kwargs)
        # Working out the shape of a result costs more than all else here, and a UNet repeats itself.
        made, work = known
        self.add_work(*work)
        out = [self._new(item) if isinstance(item, _Shape) else item for item in made]
        return out[0] if len(out) == 1 else tuple(out)

    def cost(self, saved: int = 0) -> Cost:
        """What was counted so far."""
        return Cost(saved, self.peak, self.flops, self.moved, self.kernels, dict(self.work))

    def add_work(self, flops: int, moved: int) -> None:
        """Count an operation."""
        self.flops += flops
        self.moved += moved
        self.kernels += 1
        key = (flops, moved)
        self.work[key] = self.work.get(key, 0) + 1

    def _first(self, key: tuple[Any, ...], func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation, count it, and remember what it made if all of that is new memory."""
        out = func(*args, **kwargs)
        made = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, tuple | list) else []
        tensors = [leaf for leaf in made if isinstance(leaf, Tensor)]
        fresh = [self._watch(tensor.untyped_storage()) for tensor in tensors]
        if not any(fresh):
            return out
        packet = func._overloadpacket
        flops = int(flop_registry[packet](*args, **kwargs, out_val=out)) if packet in flop_registry else 0
        seen = (leaf for leaf in (*_leaves((args, kwargs)), *tensors) if isinstance(leaf, Tensor))
        work = flops, sum(tensor.numel() * tensor.element_size() for tensor in seen)
        self.add_work(*work)
        if all(fresh):
            self._results[key] = [_Shape(x) if isinstance(x, Tensor) else x for x in made], work
        return out

    def _new(self, shape: _Shape) -> Tensor:
        tensor = torch.empty_strided(shape.size, shape.stride, dtype=shape.dtype, device="meta")
        self._watch(tensor.untyped_storage())
        return tensor

    def _watch(self, storage: torch.UntypedStorage, size: int | None = None) -> bool:
        """Count a storage from now until it is freed; returns whether it is new."""
        key = storage._cdata
        if key in self._known:
            return False
        size = storage.nbytes() if size is None else size

        def freed(_: object, key: int = key, size: int = size) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
        return True


class _Shape:
    """What of a tensor is needed to make another like it."""

    def __init__(self, tensor: Tensor) -> None:
        self.size, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype


def _leaves(value: Any) -> Iterator[Any]:
    """What nested lists, tuples and mappings hold. torch's own does more, and takes ten times as long."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _leaves(item)
    else:
        yield value


def _describe(leaf: Any) -> Any:
    """What of an argument the shape of a result depends on."""
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype
    return type(leaf), leaf if isinstance(leaf, int | float | bool | str | torch.dtype | None) else str(leaf)


class Autocast(TorchFunctionMode):
    """Casts on the meta device what ``torch.autocast`` would cast on a device, and fuses attention.

    Args:
        meter: that counts meanwhile.
        device: whose tables to follow.
        dtype: the short type; None is no autocast.
    """

    def __init__(self, meter: Meter, device: Device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.meter, self.dtype = meter, dtype
        self._long = _FLOAT32_ON_CUDA if device == "cuda" else set()
        # Autocast keeps the cast copies of float32 weights that train until it is left.
        self._cast_weights: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not None and (func in _SHORT or func in self._long):
            dtype = self.dtype if func in _SHORT else torch.float32
            args = tuple(self._cast(value, dtype) for value in args)
            kwargs = {name: self._cast(value, dtype) for name, value in kwargs.items()}
        if func is functional.scaled_dot_product_attention:
            return _FusedAttention.apply(*args[:3], self.meter)
        return func(*args, **kwargs)

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad and dtype == self.dtype):
            return value.to(dtype)
        if id(value) not in self._cast_weights:
            self._cast_weights[id(value)] = value.to(dtype)
        return self._cast_weights[id(value)]


class _FusedAttention(torch.autograd.Function):
    """Attention as a fused kernel: 4 h n m d operations forward, 10 backward, no matrix of scores in memory."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, meter: Meter) -> Tensor:
        out = torch.empty_like(query)
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        ctx.meter, ctx.flops = meter, 2 * query.numel() * key.shape[-2]
        meter.add_work(2 * ctx.flops, sum(t.numel() * t.element_size() for t in (query, key, value, out)))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved = ctx.saved_tensors
        query, key, value = saved[:3]
        moved = 2 * sum(t.numel() * t.element_size() for t in (*saved, *grads))
        ctx.meter.add_work(5 * ctx.flops, moved)
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), None


def weights(*modules: nn.Module) -> list[Tensor]:
    """Parameters and buffers of modules."""
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]

"""Parts that take less memory: a denoiser in 4 or 8 bits, and parts that wait on the CPU while nobody needs them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, Literal, TypeVar

import torch
from accelerate import cpu_offload_with_hook
from diffusers import BitsAndBytesConfig
from torch import nn

from diffalign.errors import UserError

Quantization = Literal["none", "8bit", "4bit"]
Module = TypeVar("Module", bound=nn.Module)


def quantized(kind: Quantization, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What ``from_pretrained`` must be told to load frozen weights in fewer bits, by bitsandbytes.

    Args:
        kind: "4bit" is NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314); "8bit" is LLM.int8()
            (Dettmers et al. 2022, arXiv 2208.07339).
        dtype: in which the products are computed.
        device: where the weights are to be.

    Raises:
        UserError: there is no bitsandbytes, or no CUDA device.
    """
    if kind == "none":
        return {}
    if find_spec("bitsandbytes") is None:
        raise UserError(
            f"quantize_base {kind} needs bitsandbytes, which is not installed: pip install 'diffalign[gpu]' on a CUDA "
            "machine, or leave quantize_base at none."
        )
    if device.type != "cuda":
        raise UserError(f"quantize_base {kind} needs a CUDA device, and this run is on {device}: set it to none.")
    if kind == "8bit":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    }


def wait_on_cpu(module: nn.Module, device: torch.device) -> None:
    """Keep a module on the CPU; it comes to ``device`` when it is called, and a text encoder leaves it afterwards.

    Pipelines of diffusers know of it and run on ``device``. A pass whose gradient is wanted leaves it there.
    """
    _, hook = cpu_offload_with_hook(module, device)

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            hook.offload()

    module.register_forward_hook(leave)


@contextmanager
def at_work(module: Module, device: torch.device, *, rest: bool) -> Iterator[Module]:
    """A module on ``device``; with ``rest`` it goes to the CPU afterwards."""
    yield module.to(device)
    if rest:
        module.to("cpu")

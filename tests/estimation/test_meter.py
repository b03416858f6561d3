"""What is counted on the meta device, against arithmetic by hand and against real memory."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from diffalign.estimation.meter import Autocast, Meter, weights

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "estimate_error.py"


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_a_linear_layer_by_hand() -> None:
    layer, x = nn.Linear(8, 16, device="meta"), meta(4, 8)
    with Meter([*weights(layer), x]) as meter:
        y = layer(x)
        assert meter.live == 4 * 16 * 4
        y.sum().backward()
    # Forward 2 n k m, backward once more for the weights; x asks for no gradient.
    assert meter.flops == 2 * 2 * 4 * 8 * 16
    del y
    assert meter.live == (8 * 16 + 16) * 4, "gradients are left"


def test_what_is_freed_is_no_longer_counted_and_views_are_no_memory() -> None:
    x = meta(1000)
    with Meter([x]) as meter:
        y = x + 1
        z = y.view(10, 100)
        assert meter.live == meter.peak == 4000
        del y
        assert meter.live == 4000, "the view holds it"
        del z
        assert meter.live == 0
        kept = [x * 2, x * 3]
        assert meter.live == 8000
        kept.clear()
    assert (meter.live, meter.peak, meter.kernels) == (0, 8000, 3)


def test_known_shapes_are_counted_like_new_ones() -> None:
    conv, x = nn.Conv2d(3, 5, 3, padding=1, device="meta"), meta(2, 3, 8, 8)

    def cost(times: int) -> tuple[int, int, int]:
        with Meter([*weights(conv), x]) as meter:
            for _ in range(times):
                conv(x)
        return meter.flops, meter.moved, meter.kernels

    assert cost(3) == tuple(3 * value for value in cost(1))
    assert cost(1)[0] == 2 * 2 * 5 * 3 * 9 * 64


def test_attention_keeps_no_scores() -> None:
    q, k = meta(1, 4, 64, 32).requires_grad_(), meta(1, 4, 16, 32)
    with Meter([q, k]) as meter, Autocast(meter, "cuda", None):
        out = functional.scaled_dot_product_attention(q, k, k)
        assert meter.live == (64 * 32 + 64) * 4 * 4, "the output and one number for each query"
        assert meter.flops == 4 * 4 * 64 * 16 * 32
        out.sum().backward()
    assert meter.flops == 14 * 4 * 64 * 16 * 32


class Block(nn.Module):
    """Linear, norm, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(64, 256), nn.LayerNorm(256), nn.Linear(256, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(functional.gelu(self.norm(self.first(x))))


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_autocast_gives_the_types_that_torch_gives(device: str, recomputed: bool) -> None:
    """On a CPU torch's own autocast can be looked at; CUDA's list has norms in float32 besides."""
    with torch.device("meta"):
        block, x = Block(), torch.empty(2, 64)
    seen = {}

    def note(name: str) -> None:
        module = block.get_submodule(name)
        module.register_forward_hook(lambda m, args, out: seen.setdefault(name, []).append(out.dtype))

    for name in ("first", "norm", "last"):
        note(name)
    with Meter([*weights(block), x]) as meter, Autocast(meter, device, torch.bfloat16) as autocast:
        if recomputed:
            again = functools.partial(
                checkpoint,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (torch.enable_grad(), autocast),
            )
            again(block, x).float().sum().backward()
        else:
            block(x).float().sum().backward()
    norm = torch.float32 if device == "cuda" else torch.bfloat16
    times = 2 if recomputed else 1
    assert seen["first"][:1] == [torch.bfloat16] and seen["norm"] == [norm] * len(seen["norm"])
    assert len(seen["first"]) == times
    if device == "cpu":
        real = Block()
        with torch.autocast("cpu", torch.bfloat16):
            inner = real.first(torch.zeros(2, 64))
            assert (inner.dtype, real.norm(inner).dtype) == (seen["first"][0], seen["norm"][0])


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of resident memory")
@pytest.mark.parametrize(
    "case",
    [
        "shapes, LoRA, batch 64",
        pytest.param("shapes, LoRA, batch 64, checkpointing", marks=pytest.mark.slow),
        pytest.param("shapes, all weights, batch 64", marks=pytest.mark.slow),
    ],
)
def test_a_real_step_takes_the_memory_that_is_predicted(case: str) -> None:
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--case", case], env=env, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured_mib"] > 20, "too little to say anything"
    assert abs(found["error"]) < 0.05, found

"""Speed and memory on a GPU: ``CUDA_VISIBLE_DEVICES=0 pytest -m gpu tests/gpu``. Targets are for an H100 or H200."""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffalign.pipelines import load_family
from diffalign.trainers.dpo import DPOConfig, DPOTrainer

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


Make = Callable[..., DPOTrainer]


@pytest.fixture
def trainer(on_pairs: Callable[..., dict[str, Any]]) -> Make:
    return lambda folder, **own: DPOTrainer(DPOConfig(**on_pairs(folder, **own)))


def losses(made: DPOTrainer) -> list[float]:
    return [json.loads(line)["loss"] for line in (made.train() / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "options",
    [
        {"compile_repeated_blocks": True},
        {"two_pass_gradient": True},
        {"channels_last": True},
        {"gradient_checkpointing": True, "checkpointed_blocks": ["down_blocks.1"]},
        {"compile_repeated_blocks": True, "channels_last": True, "gradient_checkpointing": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_in_bf16_policy_and_reference_are_equal_before_training(
    trainer: Make, tmp_path: Path, options: dict[str, Any]
) -> None:
    table = losses(trainer(tmp_path, mixed_precision="bf16", beta_dpo=5000, **options))
    assert table[0] == pytest.approx(0.6931472, abs=1e-6)
    assert table[-1] != table[0]


def test_adamw_is_one_kernel_except_in_fp16(trainer: Make, tmp_path: Path) -> None:
    fused = trainer(tmp_path / "bf16", mixed_precision="bf16").optimizer.optimizer.defaults["fused"]
    plain = trainer(tmp_path / "fp16", mixed_precision="fp16").optimizer.optimizer.defaults["fused"]
    assert fused and not plain


def test_idle_parts_leave_the_card_and_come_back() -> None:
    family = load_family("shapes-sdxl", device="cuda", offload_idle=True)
    plain = load_family("shapes-sdxl", device="cuda")
    for name, value in plain.encode_prompts(["a red circle"]).items():
        assert torch.equal(family.encode_prompts(["a red circle"])[name], value)
    images = torch.rand(2, 3, 64, 64)
    latents = family.encode_images(images)
    assert latents.device.type == "cuda" and torch.equal(latents, plain.encode_images(images))
    for module in (family.vae, *family.text_encoders.values()):
        assert all(p.device.type == "cpu" for p in module.parameters())
    wanted = latents.clone().requires_grad_()
    family.decode_latents(wanted, grad=True).sum().backward()
    assert wanted.grad is not None and wanted.grad.abs().sum() > 0
    pipe: Any = family.pipeline()
    assert pipe("a red circle", num_inference_steps=2, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_trains(trainer: Make, tmp_path: Path, bits: str) -> None:
    pytest.importorskip("bitsandbytes")
    table = losses(trainer(tmp_path, mixed_precision="bf16", quantize_base=bits))
    assert table[0] == pytest.approx(0.6931472, abs=1e-3) and len(set(table)) > 2


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("sdxl_step")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def sdxl(bench: ModuleType) -> Any:
    return bench.random_family("sdxl", "cuda")


def row(bench: ModuleType, family: Any, plain: bool = False, **own: Any) -> dict[str, Any]:
    """A row of the benchmark at 1024 pixels."""
    more = {name: own.pop(name) for name in list(own) if name not in ("method", "batch_size", "checkpointing", "mode")}
    args = Namespace(precision="bf16", warmup=3, steps=10, blocks=bench.SELECTIVE, settings=more)
    case = {"method": "dpo", "resolution": 1024, "batch_size": 1, "rank": 16, "checkpointing": "none", "mode": "eager"}
    run = bench.measure_plain if plain else bench.measure
    found: dict[str, Any] = bench.attempt(run, bench.Case(**case | own), family, bench.Device("cuda"), args)
    return found


def hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


@pytest.mark.slow
@pytest.mark.skipif(not hopper(), reason="the targets are for an H100 or H200")
def test_pairs_a_second_on_a_hopper_card(bench: ModuleType, sdxl: Any) -> None:
    dpo = row(bench, sdxl, batch_size=2, mode="compiled", channels_last=True)
    plain = row(bench, sdxl, plain=True, batch_size=2)
    mapo = row(bench, sdxl, batch_size=2, mode="compiled", channels_last=True, method="mapo")
    assert dpo["samples_per_second"] >= 6
    assert dpo["samples_per_second"] >= 2.5 * plain["samples_per_second"]
    assert mapo["samples_per_second"] >= 1.3 * dpo["samples_per_second"]
    assert mapo["peak_gb"] <= 0.85 * dpo["peak_gb"]
    assert dpo["waiting_for_data"] < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bound", "options"),
    [(16, {"checkpointing": "full"}), (12, {"checkpointing": "full", "two_pass_gradient": True})],
)
def test_memory_of_small_cards(bench: ModuleType, sdxl: Any, bound: float, options: dict[str, Any]) -> None:
    assert row(bench, sdxl, **options)["peak_gb"] <= bound


@pytest.mark.slow
@pytest.mark.skipif(not hopper(), reason="the targets are for an H100 or H200")
@pytest.mark.parametrize(("resolution", "target"), [(1024, 1.5), (512, 4)])
def test_images_a_second_of_rl_on_a_hopper_card(bench: ModuleType, resolution: int, target: float) -> None:
    """Drawn in 10 steps without guidance, decoded, scored and learnt from."""
    rates = importlib.import_module("rl_rate")
    args = rates.parse(["--methods", "awm", "nft", "--resolutions", str(resolution), "--set", "channels_last=true"])
    rows = rates.run_all(args, bench.Device("cuda"))
    assert {row["method"] for row in rows} == {"awm", "nft"}
    assert all(row["images_per_second"] >= target for row in rows), rows

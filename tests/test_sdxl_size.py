"""SDXL base at its real size, with random weights: names and shapes of its LoRA, and one step of a method each."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from torch import nn

from diffalign.pipelines import LoraSpec, add_lora, lora_parameters, save_lora
from diffalign.pipelines.base import Family
from diffalign.pipelines.skeleton import Skeleton, find_configs

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RANK = 8

# Where kohya's sd-scripts have the attentions of SDXL, and how many transformer layers of which width each has.
ATTENTIONS = {
    "down_blocks.1.attentions.0": ("input_blocks_4_1", 2, 640),
    "down_blocks.1.attentions.1": ("input_blocks_5_1", 2, 640),
    "down_blocks.2.attentions.0": ("input_blocks_7_1", 10, 1280),
    "down_blocks.2.attentions.1": ("input_blocks_8_1", 10, 1280),
    "mid_block.attentions.0": ("middle_block_1", 10, 1280),
    "up_blocks.0.attentions.0": ("output_blocks_0_1", 10, 1280),
    "up_blocks.0.attentions.1": ("output_blocks_1_1", 10, 1280),
    "up_blocks.0.attentions.2": ("output_blocks_2_1", 10, 1280),
    "up_blocks.1.attentions.0": ("output_blocks_3_1", 2, 640),
    "up_blocks.1.attentions.1": ("output_blocks_4_1", 2, 640),
    "up_blocks.1.attentions.2": ("output_blocks_5_1", 2, 640),
}
TEXT_WIDTH = 2048


def projections() -> Iterator[tuple[str, str, int, int]]:
    """Each adapted projection: its path in diffusers, its name in kohya's layout, its inputs and outputs."""
    for path, (name, layers, width) in ATTENTIONS.items():
        for layer in range(layers):
            for attention in ("attn1", "attn2"):
                for projection in ("to_q", "to_k", "to_v", "to_out.0"):
                    inside = f"transformer_blocks.{layer}.{attention}.{projection}"
                    of_text = attention == "attn2" and projection in ("to_k", "to_v")
                    kohya = f"lora_unet_{name}_{inside.replace('.', '_')}"
                    yield f"unet.{path}.{inside}", kohya, TEXT_WIDTH if of_text else width, width


def expected(layout: str) -> dict[str, tuple[int, ...]]:
    """Every key of a LoRA of SDXL base's attention, with its shape."""
    keys: dict[str, tuple[int, ...]] = {}
    for diffusers, kohya, inputs, outputs in projections():
        if layout == "diffusers":
            keys |= {f"{diffusers}.lora.down.weight": (RANK, inputs), f"{diffusers}.lora.up.weight": (outputs, RANK)}
        else:
            keys |= {
                f"{kohya}.lora_down.weight": (RANK, inputs),
                f"{kohya}.lora_up.weight": (outputs, RANK),
                f"{kohya}.alpha": (),
            }
    return keys


def stored(path: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def adapted() -> Family:
    """SDXL base without weights, with a LoRA that has some."""
    skeleton = Skeleton(find_configs("", like="sdxl"))
    family = skeleton.family
    denoiser: Any = skeleton.denoiser()
    family._denoiser = denoiser
    add_lora(denoiser, LoraSpec(rank=RANK))
    for name in lora_parameters(denoiser):
        owner, _, leaf = name.rpartition(".")
        module = denoiser.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(torch.randn(module.get_parameter(leaf).shape)))
    return family


def test_the_lora_has_as_many_numbers_as_that_of_sdxl_base(adapted: Family) -> None:
    assert len(list(projections())) == 560
    assert sum(p.numel() for p in lora_parameters(adapted.denoiser).values()) == 1_451_520 * RANK


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_its_files_have_the_keys_and_shapes_of_one_for_sdxl_base(adapted: Family, tmp_path: Path, layout: Any) -> None:
    assert stored(save_lora(adapted, tmp_path, layout=layout)) == expected(layout)


def test_diffusers_reads_both_layouts_as_the_same_lora(adapted: Family, tmp_path: Path) -> None:
    read = []
    for layout in ("diffusers", "kohya"):
        path = save_lora(adapted, tmp_path, layout=layout)  # type: ignore[arg-type]
        state = StableDiffusionXLPipeline.lora_state_dict(
            tmp_path, weight_name=path.name, unet_config=adapted.denoiser.config, local_files_only=True
        )[0]
        read.append(convert_unet_state_dict_to_peft({k: v for k, v in state.items() if not k.endswith(".alpha")}))
    ours, theirs = read
    assert len(ours) == 2 * 560 and sorted(ours) == sorted(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())


@pytest.fixture
def sdxl_model() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module("sdxl_model")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "mapo", "awm"])
def test_one_step_at_real_size(sdxl_model: ModuleType, tmp_path: Path, method: str) -> None:
    """In bfloat16 at 256 pixels: 7 GB of memory, and minutes."""
    free = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if "Available" in line)
    if free < 9e6:
        pytest.skip(f"needs 9 GB of free memory, and {free / 1e6:.1f} GB are free")
    family = sdxl_model.random_family("sdxl", "cpu")
    settings: dict[str, Any] = {
        "resolution": 256,
        "mixed_precision": "bf16",
        "rank": RANK,
        "gradient_checkpointing": True,
        "max_train_steps": 1,
        "save_comfyui_lora": True,
    }
    if method == "awm":
        # Its six passes an image are alike.
        settings["num_train_steps_per_image"] = 1
    trainer = sdxl_model.synthetic_trainer(method, family, tmp_path, **settings)
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    run = trainer.train()
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["skipped_steps"] == 0 and row["grad_norm"] > 0
    if method == "dpo":
        assert row["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert not all(torch.equal(p, before[name]) for name, p in trainer.policy.parameters.items())
    assert stored(run / "pytorch_lora_weights.safetensors") == expected("diffusers")
    assert stored(next(run.glob("*_comfyui.safetensors"))) == expected("kohya")

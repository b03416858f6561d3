"""The README.md of a run: front matter the hub reads, code that a reader can copy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from diffalign.training.loop import Plan
from diffalign.training.model_card import write_model_card
from diffalign.training.validation import Sampling


def code(text: str) -> str:
    found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found.group(1)


def test_the_card_names_base_model_method_and_tags(whole_run: Path, tiny_sdxl_path: str) -> None:
    data = ModelCard.load(whole_run / "README.md").data
    assert data.base_model == tiny_sdxl_path and data.library_name == "diffusers"
    assert {"text-to-image", "lora", "toy"} <= set(data.tags)
    assert "6 steps of 2 samples" in (whole_run / "README.md").read_text()


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_the_code_in_it_is_code_and_finds_a_bundled_base(toy_config: Any, tmp_path: Path, mode: str) -> None:
    config = toy_config(pretrained_model_name_or_path="shapes-sdxl", train_mode=mode, validation_prompts=['a "toy"'])
    text = write_model_card(config, "toy", "@misc{toy}", Plan(10, 2, 6), tmp_path).read_text()
    compile(code(text), "card", "exec")
    assert 'from_pretrained(resolve("shapes-sdxl")' in code(text)


def test_the_command_for_the_same_run_does_not_resume(toy_config: Any, tmp_path: Path) -> None:
    config = toy_config(resume_from_checkpoint="latest")
    text = write_model_card(config, "toy", "@misc{toy}", Plan(10, 2, 6), tmp_path).read_text()
    assert "--resume_from_checkpoint none" in text


def test_the_lines_to_copy_draw_as_validation_did(toy_config: Any, tmp_path: Path) -> None:
    """Options of a named sampler are those of the class, and a later start is spelt out in timesteps."""
    sampling = Sampling(2, 1.0, "lcm:timestep_scaling=5:strength=0.8", {"original_inference_steps": 10})
    text = code(
        write_model_card(toy_config(), "toy", "@misc{toy}", Plan(10, 2, 6), tmp_path, sampling=sampling).read_text()
    )
    assert "LCMScheduler.from_config(pipe.scheduler.config, timestep_scaling=5, original_inference_steps=10)" in text
    assert "timesteps=[799, 399], guidance_scale=1)" in text and "num_inference_steps" not in text

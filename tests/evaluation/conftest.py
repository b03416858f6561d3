"""LoRAs of the tiny SDXL, made by diffusers itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


@pytest.fixture(scope="session")
def lora_paths(tiny_sdxl_path: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Folders of two random LoRAs, strong enough to change the pictures."""
    folders = []
    for seed in (0, 1):
        pipe = DiffusionPipeline.from_pretrained(tiny_sdxl_path)
        pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in pipe.unet.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        folder = tmp_path_factory.mktemp("loras") / f"lora-{seed}"
        layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
        type(pipe).save_lora_weights(folder, unet_lora_layers=layers)
        folders.append(str(folder))
    return folders


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

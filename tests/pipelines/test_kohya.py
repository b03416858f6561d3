"""The kohya layout: names that its readers know, the true alpha, the header."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from diffalign.errors import UserError
from diffalign.pipelines import LoraSpec, add_lora, load_family, load_lora_state, lora_parameters, save_lora
from diffalign.pipelines.kohya import original_name


@pytest.fixture(scope="module")
def sdxl_unet() -> UNet2DConditionModel:
    """SDXL base's UNet, names and shapes only."""
    with torch.device("meta"):
        return UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("down_blocks.2.attentions.1.norm", "input_blocks.8.1.norm"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("mid_block.resnets.1.conv1", "middle_block.2.in_layers.2"),
        ("mid_block.attentions.0.proj_out", "middle_block.1.proj_out"),
        (
            "up_blocks.0.attentions.2.transformer_blocks.9.attn2.to_out.0",
            "output_blocks.2.1.transformer_blocks.9.attn2.to_out.0",
        ),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.2.resnets.2.time_emb_proj", "output_blocks.8.0.emb_layers.1"),
        ("conv_in", "input_blocks.0.0"),
        ("add_embedding.linear_2", "label_emb.0.2"),
    ],
)
def test_names_of_the_original_code(ours, theirs):
    assert original_name(ours, 2) == theirs


def test_a_module_without_such_a_name():
    with pytest.raises(UserError, match="'encoder_hid_proj' has no name in the kohya layout"):
        original_name("encoder_hid_proj", 2)


def test_diffusers_reads_every_module_of_sdxl_back(sdxl_unet):
    names = [name for name, module in sdxl_unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert len(names) > 700
    state = {}
    for i, name in enumerate(names):
        key = "lora_unet_" + original_name(name, 2).replace(".", "_")
        state[f"{key}.lora_down.weight"] = torch.tensor([i])
        state[f"{key}.lora_up.weight"] = torch.tensor([i])
        state[f"{key}.alpha"] = torch.tensor(float(i))
    assert len(state) == 3 * len(names)
    state = _maybe_map_sgm_blocks_to_diffusers(state, sdxl_unet.config)
    state, _ = _convert_non_diffusers_lora_to_diffusers(state)
    read = convert_unet_state_dict_to_peft({key.removeprefix("unet."): value for key, value in state.items()})
    for i, name in enumerate(names):
        assert read[f"{name}.lora_A.weight"].item() == i, name


def header(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def saved(path, tmp_path, name="mine", **spec):
    family = load_family(path)
    family.add_lora(LoraSpec(**spec), text_encoders=True)
    return save_lora(family, tmp_path, layout="kohya", name=name)


def test_sdxl_file_is_what_sd_scripts_writes(tiny_sdxl_path, tmp_path):
    file = saved(tiny_sdxl_path, tmp_path, rank=4, alpha=0.5)
    assert file.name == "mine_comfyui.safetensors"
    state = load_file(file)
    # One layer a block here, so that blocks are two apart: down_blocks.1 begins at input block 3.
    down = state["lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_k.lora_down.weight"]
    assert down.shape == (4, 40)
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight" in state
    assert "lora_te2_text_model_encoder_layers_2_self_attn_out_proj.lora_up.weight" in state
    assert {value.item() for key, value in state.items() if key.endswith(".alpha")} == {0.5}
    assert {key.split(".", 1)[1] for key in state} == {"lora_down.weight", "lora_up.weight", "alpha"}
    meta = header(file)
    assert (meta["ss_network_dim"], meta["ss_network_alpha"]) == ("4", "0.5")
    assert meta["ss_base_model_version"] == "sdxl_base_v1-0" and meta["ss_network_module"] == "networks.lora"
    assert meta["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert (
        meta["modelspec.title"] == meta["ss_output_name"] == "mine" and meta["modelspec.prediction_type"] == "epsilon"
    )
    assert "/" not in meta["ss_sd_model_name"]


def test_sd_file_is_what_sd_scripts_writes(tiny_sd_path, tiny_sd_v_path, tmp_path):
    file = saved(tiny_sd_path, tmp_path, rank=2)
    state, meta = load_file(file), header(file)
    assert "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight" in state
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj.alpha" in state
    assert meta["ss_base_model_version"] == "sd_v1" and meta["ss_v2"] == "False"
    assert meta["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert header(saved(tiny_sd_v_path, tmp_path))["modelspec.prediction_type"] == "v"


def test_convolutions_round_trip(tiny_sdxl_path, tmp_path):
    targets = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv_in", "conv_out", "linear_1", "conv")
    family = load_family(tiny_sdxl_path)
    add_lora(family.denoiser, LoraSpec(rank=2, alpha=1.0, targets=targets))
    for parameter in lora_parameters(family.denoiser).values():
        parameter.data = torch.randn_like(parameter)
    file = save_lora(family, tmp_path, layout="kohya")
    other = load_family(tiny_sdxl_path)
    load_lora_state(other, file)
    ours, theirs = lora_parameters(family.denoiser), lora_parameters(other.denoiser)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

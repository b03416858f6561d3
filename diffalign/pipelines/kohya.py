"""LoRA in the layout of kohya's sd-scripts, which ComfyUI, A1111 and Forge read.

A module's weights are ``<name>.lora_down.weight``, ``<name>.lora_up.weight`` and the scalar ``<name>.alpha``; the name
is the module's path with underscores. Two things need care:

- **alpha.** The strength is ``alpha / rank``. The converter in diffusers writes alpha = rank, whatever was trained;
  here it is the true alpha of each module.
- **names.** sd-scripts trains SD 1.x and 2.x on the diffusers UNet and SDXL on its own, which has the names of the
  original code (``input_blocks_4_1_...`` for ``down_blocks_1_attentions_0_...``). ComfyUI and diffusers read both for
  both. Each family is written as sd-scripts itself writes it, because that is what A1111, Forge, per-block weighting
  tools and sd-scripts' own merging scripts have been built on; and diffusers' loader confuses ``input_blocks_1`` with
  ``input_blocks_10``, which SDXL (9 input blocks) does not have and SD 1.5 (12) has.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from diffalign.errors import UserError

_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MID = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class KohyaNames:
    """What sd-scripts calls a family.

    Attributes:
        base_version: value of ``ss_base_model_version``.
        architecture: value of ``modelspec.architecture``, before "/lora".
        text: prefix of each text encoder's keys, by the encoder's name in the pipeline.
        original_unet: the UNet's modules have the names of the original code, not of diffusers.
    """

    base_version: str
    architecture: str
    text: Mapping[str, str]
    original_unet: bool


def original_name(name: str, layers_per_block: int) -> str:
    """The name, in the original latent-diffusion code, of a module of the diffusers UNet.

    Args:
        name: dotted path in ``UNet2DConditionModel``.
        layers_per_block: of the UNet's config; an input block is a ResNet and perhaps an attention, or a downsampler.

    Raises:
        UserError: the module has no such name.
    """
    if name in _OUTSIDE_BLOCKS:
        return _OUTSIDE_BLOCKS[name]
    if match := _MID.fullmatch(name):
        kind, index, rest = match.groups()
        position = 2 * int(index) if kind == "resnets" else 2 * int(index) + 1
        return f"middle_block.{position}.{_RESNET.get(rest, rest)}"
    if not (match := _BLOCK.fullmatch(name)):
        raise UserError(
            f"LoRA on {name!r} has no name in the kohya layout. Save it in the diffusers layout, or leave this module "
            "out of the LoRA targets."
        )
    side, block, kind, layer, rest = match.groups()
    first = int(block) * (layers_per_block + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers_per_block + 1}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers_per_block}.2.conv"
    position = first + int(layer) + (side == "down")
    blocks = "input_blocks" if side == "down" else "output_blocks"
    return f"{blocks}.{position}.{1 if kind == 'attentions' else 0}.{_RESNET.get(rest, rest)}"


def kohya_state(
    module: nn.Module,
    prefix: str,
    *,
    adapter_name: str = "default",
    state: Mapping[str, Tensor] | None = None,
    layers_per_block: int | None = None,
) -> dict[str, Tensor]:
    """The LoRA of one module in the kohya layout, on the CPU.

    Args:
        prefix: of its keys, such as "lora_unet" or "lora_te1".
        state: weights to write in place of the live ones, by parameter name.
        layers_per_block: of a UNet that is to get the names of the original code.
    """
    out: dict[str, Tensor] = {}
    for path, layer in module.named_modules():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.r:
            continue
        name = original_name(path, layers_per_block) if layers_per_block is not None else path
        if prefix.startswith("lora_te") and not path.startswith("text_model."):
            # transformers 5 dropped this level from CLIPTextModel; every other tool still expects it.
            name = f"text_model.{path}"
        key = f"{prefix}_{name.replace('.', '_')}"
        for ours, theirs in (("lora_A", "lora_down"), ("lora_B", "lora_up")):
            live = getattr(layer, ours)[adapter_name].weight
            weight = (state or {}).get(f"{path}.{ours}.{adapter_name}.weight", live)
            out[f"{key}.{theirs}.weight"] = weight.detach().cpu().contiguous()
        out[f"{key}.alpha"] = torch.tensor(_alpha(layer, adapter_name))
    return out


def _alpha(layer: LoraLayer, adapter_name: str) -> float:
    """The alpha for which ``alpha / rank`` is the layer's scale, as trained."""
    alpha = float(layer.lora_alpha[adapter_name])
    return alpha * math.sqrt(layer.r[adapter_name]) if layer.use_rslora.get(adapter_name) else alpha


def kohya_metadata(
    names: KohyaNames, state: Mapping[str, Tensor], *, title: str, base_model: str, prediction_type: str
) -> dict[str, str]:
    """The header that UIs show: ``ss_*`` of sd-scripts and ``modelspec.*``.

    It holds no date and no path of this machine.
    """
    ranks = Counter(len(weight) for key, weight in state.items() if key.endswith("lora_down.weight"))
    alphas = Counter(value.item() for key, value in state.items() if key.endswith(".alpha"))
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.most_common(1)[0][0]),
        "ss_network_alpha": str(alphas.most_common(1)[0][0]),
        "ss_network_args": json.dumps({}),
        "ss_base_model_version": names.base_version,
        "ss_v2": str(names.base_version.startswith("sd_v2")),
        "ss_sd_model_name": base_model,
        "ss_output_name": title,
        "ss_training_comment": "diffalign",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{names.architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": title,
        "modelspec.prediction_type": "v" if prediction_type == "v_prediction" else prediction_type,
    }

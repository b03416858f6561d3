"""LoRA files: saving for diffusers and for ComfyUI, and reading both back.

Making and switching adapters is in :mod:`diffalign.pipelines.adapters`, whose names are importable from here too.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import set_peft_model_state_dict
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffalign.errors import UserError
from diffalign.pipelines.adapters import LoraSpec, adapters_off, add_lora, lora_parameters
from diffalign.pipelines.kohya import kohya_metadata, kohya_state

if TYPE_CHECKING:
    from diffalign.pipelines.base import Family

__all__ = ["LoraSpec", "adapters_off", "add_lora", "load_lora_state", "lora_parameters", "save_lora"]

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"


def save_lora(
    family: Family,
    out_dir: str | Path,
    *,
    layout: Literal["diffusers", "kohya"] = "diffusers",
    name: str | None = None,
    text_encoders: bool | None = None,
    state: Mapping[str, Mapping[str, Tensor]] | None = None,
    adapter_name: str = "default",
) -> Path:
    """Write the LoRA of a family's live parts, whole or not at all.

    Args:
        layout: "diffusers" writes ``pytorch_lora_weights.safetensors`` with the adapter's config in its header, for
            ``load_lora_weights``; "kohya" writes ``<name>_comfyui.safetensors`` (:mod:`diffalign.pipelines.kohya`).
        name: of the kohya file and in its header; by default the folder's.
        text_encoders: whether those of the text encoders are written; None is where there are any.
        state: weights to write in place of the live ones (an EMA, say): part ("unet", "text_encoder") to parameter
            name, as in :func:`lora_parameters`, to tensor.

    Returns:
        The file's path.

    Raises:
        UserError: there is no such LoRA, or the disk does not take the file.
    """
    parts = _adapted_parts(family, adapter_name, text_encoders)
    weights = {part: _with_overrides(module, (state or {}).get(part), adapter_name) for part, module in parts.items()}
    out = Path(out_dir)
    title = name or out.resolve().name
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out, prefix=".lora-") as aside:
            if layout == "diffusers":
                written = _write_diffusers(family, parts, weights, Path(aside), adapter_name)
            elif layout == "kohya":
                written = _write_kohya(family, parts, weights, Path(aside), title, adapter_name)
            else:
                raise UserError(f"LoRA layout {layout!r} is not one of diffusers, kohya.")
            os.replace(written, out / written.name)
    except OSError as error:
        raise UserError(f"could not write the LoRA to {out}: {error}") from error
    return out / written.name


def _adapted_parts(family: Family, adapter_name: str, text_encoders: bool | None) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {}
    if "denoiser" in family.loaded:
        parts[family.denoiser_part] = family.denoiser
    if text_encoders is not False and "text_encoders" in family.loaded:
        parts |= family.text_encoders
    parts = {part: module for part, module in parts.items() if adapter_name in getattr(module, "peft_config", {})}
    if not parts or (text_encoders and not set(parts) & set(family.encoder_classes)):
        raise UserError(f"there is no LoRA named {adapter_name!r} to save: add one, or load one, first.")
    return parts


def _with_overrides(module: nn.Module, override: Mapping[str, Tensor] | None, adapter_name: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {name: p.detach() for name, p in lora_parameters(module, adapter_name).items()}
    unknown = sorted(set(override or {}) - set(weights))
    if unknown:
        raise ValueError(f"no LoRA parameter is named {unknown[0]!r}; names are those of lora_parameters().")
    return weights | dict(override or {})


def _write_diffusers(
    family: Family,
    parts: Mapping[str, nn.Module],
    weights: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    adapter_name: str,
) -> Path:
    arguments: dict[str, Any] = {}
    for part, module in parts.items():
        # Left to itself, peft asks the hub whether the base model's embeddings have grown.
        layers = get_peft_model_state_dict(
            module, state_dict=dict(weights[part]), adapter_name=adapter_name, save_embedding_layers=False
        )
        if part != family.denoiser_part and not hasattr(module, "text_model"):
            # transformers 5 dropped this level from CLIPTextModel; diffusers strips it where it is not needed, and
            # older versions do need it.
            layers = {f"text_model.{key}": value for key, value in layers.items()}
        layers = {key: value.cpu().contiguous() for key, value in layers.items()}
        arguments[f"{part}_lora_layers"] = _diffusers_names(layers)
        config = module.peft_config[adapter_name].to_dict()  # type: ignore[union-attr,index]
        config |= {"target_modules": sorted(config["target_modules"]), "base_model_name_or_path": None}
        arguments[f"{part}_lora_adapter_metadata"] = config
    family.pipeline_class.save_lora_weights(folder, weight_name=WEIGHTS_NAME, **arguments)
    return folder / WEIGHTS_NAME


def _diffusers_names(layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' own names where it has them for all of a part, else peft's.

    It has them for attention only, and its loader takes a file of both kinds for a file of peft names alone.
    """
    named = convert_state_dict_to_diffusers(layers)
    return layers if any("lora_A" in key for key in named) else named


def _write_kohya(
    family: Family,
    parts: Mapping[str, nn.Module],
    weights: Mapping[str, Mapping[str, Tensor]],
    folder: Path,
    title: str,
    adapter_name: str,
) -> Path:
    names = family.kohya
    out: dict[str, Tensor] = {}
    for part, module in parts.items():
        unet = part == family.denoiser_part
        out |= kohya_state(
            module,
            "lora_unet" if unet else names.text[part],
            adapter_name=adapter_name,
            state=weights[part],
            layers_per_block=family.denoiser.config.layers_per_block if unet and names.original_unet else None,
        )
    header = kohya_metadata(
        names,
        out,
        title=title,
        base_model=Path(family.path).name,
        prediction_type=family.noise_process.prediction_type,
    )
    path = folder / f"{title}_comfyui.safetensors"
    save_file(out, path, metadata=header)
    return path


def load_lora_state(
    family: Family, path: str | Path, *, adapter_name: str = "default", trainable: bool = True
) -> tuple[str, ...]:
    """Read a LoRA, in either layout, into the family's parts, in float32.

    Where the adapter exists already (a run that resumes), its weights are replaced; else it is added.

    Args:
        path: file, folder with one LoRA in it, or hub id.
        trainable: False freezes it. torch multiplies by a frozen matrix in another order where the input is not
            contiguous, so that a frozen LoRA on ``proj_in`` may differ from a trainable one in the last bit.
            diffusers leaves what it loads trainable.

    Returns:
        The parts that it holds: "unet", "text_encoder", ...

    Raises:
        UserError: there is no LoRA there, or not one for this model.
    """
    keys, alphas, metadata = _read(family, path)
    read = []
    for part in (family.denoiser_part, *family.encoder_classes):
        own = {key: value for key, value in keys.items() if key.startswith(f"{part}.")}
        if not own:
            continue
        module: Any = family.denoiser if part == family.denoiser_part else family.text_encoders[part]
        if adapter_name not in getattr(module, "peft_config", {}):
            _inject(family, part, module, own, alphas, metadata, adapter_name)
        _copy(path, module, _peft_names(part, module, own), adapter_name)
        for parameter in lora_parameters(module, adapter_name).values():
            parameter.requires_grad_(trainable)
        read.append(part)
    if not read:
        raise UserError(f"{str(path)!r} holds no LoRA for a model of family {family.name!r}.")
    return tuple(read)


def _read(family: Family, path: str | Path) -> tuple[dict[str, Tensor], Any, Any]:
    """Keys with diffusers prefixes, alphas by module (kohya layout), adapter metadata (diffusers layout)."""
    source, weight_name = _lora_file(path)
    options = {"unet_config": family.denoiser.config} if family.denoiser_part == "unet" else {}
    try:
        keys, alphas, metadata = family.pipeline_class.lora_state_dict(
            source, weight_name=weight_name, use_safetensors=True, return_lora_metadata=True, **options
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(f"{str(path)!r} could not be read as a LoRA: {error}") from error
    return keys, alphas, metadata


def _lora_file(path: str | Path) -> tuple[str, str | None]:
    """(folder or hub id, file name)."""
    place = Path(path)
    if place.is_file():
        if place.suffix != ".safetensors":
            raise UserError(f"{str(path)!r} is not a .safetensors file; only those are read, as others can hold code.")
        return str(place.parent), place.name
    if not place.is_dir():
        if place.is_absolute() or str(path).count("/") != 1:
            raise UserError(f"there is no LoRA at {str(path)!r}.")
        return str(path), None
    if (place / WEIGHTS_NAME).is_file():
        return str(place), WEIGHTS_NAME
    files = sorted(file.name for file in place.glob("*.safetensors"))
    if len(files) != 1:
        found = f"several ({', '.join(files)}): name one" if files else "no .safetensors file: check the path"
        raise UserError(f"{str(path)!r} has no {WEIGHTS_NAME} and {found}.")
    return str(place), files[0]


def _inject(
    family: Family,
    part: str,
    module: Any,
    keys: dict[str, Tensor],
    alphas: Any,
    metadata: Any,
    adapter_name: str,
) -> None:
    arguments: dict[str, Any] = {"network_alphas": alphas, "adapter_name": adapter_name, "metadata": metadata}
    try:
        if part == family.denoiser_part:
            module.load_lora_adapter(keys, prefix=part, **arguments)
        else:
            family.pipeline_class.load_lora_into_text_encoder(keys, text_encoder=module, prefix=part, **arguments)
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"the LoRA does not fit {part!r} of {family.path!r}: {error}") from error


def _peft_names(part: str, module: nn.Module, keys: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of one part as peft names them in this module, without the adapter's name."""
    bare = {key.removeprefix(f"{part}."): value for key, value in keys.items()}
    if not isinstance(module, PreTrainedModel):
        return convert_unet_state_dict_to_peft(bare)
    bare = convert_state_dict_to_peft(convert_state_dict_to_diffusers(bare))
    if not hasattr(module, "text_model"):
        bare = {key.removeprefix("text_model."): value for key, value in bare.items()}
    return bare


def _copy(path: str | Path, module: Any, keys: dict[str, Tensor], adapter_name: str) -> None:
    """Put weights into an adapter, exactly: it was made in the base weights' dtype, which may be shorter."""
    live = lora_parameters(module, adapter_name)
    for parameter in live.values():
        parameter.data = parameter.data.float()
    shapes = {name.replace(f".{adapter_name}.", "."): p.shape for name, p in live.items()}
    for key in sorted(shapes.keys() | keys.keys()):
        if key not in keys or key not in shapes or keys[key].shape != shapes[key]:
            here = tuple(shapes[key]) if key in shapes else "nothing"
            there = tuple(keys[key].shape) if key in keys else "nothing"
            raise UserError(
                f"the LoRA {str(path)!r} does not fit: {key} is {there} in the file and {here} in the model. "
                "Use the rank and targets it was trained with, and the base model it was trained on."
            )
    set_peft_model_state_dict(module, {key: value.float() for key, value in keys.items()}, adapter_name)

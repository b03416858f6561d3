"""Which family a checkpoint belongs to: what its ``model_index.json`` says."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffalign import assets
from diffalign.errors import UserError, did_you_mean
from diffalign.pipelines.base import Family
from diffalign.pipelines.files import check_not_a_file, hub_error

FAMILIES = {
    "StableDiffusionPipeline": "diffalign.pipelines.sd:StableDiffusion",
    "StableDiffusionXLPipeline": "diffalign.pipelines.sdxl:StableDiffusionXL",
}
"""Pipeline class in ``model_index.json`` to a family's ``module:class``; a new family is a file and a line here."""


def load_family(path: str, *, revision: str | None = None, **options: Any) -> Family:
    """Find out the family of a checkpoint and build it. Weights load later, part by part, on first use.

    Args:
        path: folder in the diffusers layout, bundled name ("shapes-sdxl") or hub id.
        revision: of a hub id.
        options: variant, vae, dtype, vae_dtype, device: see :class:`diffalign.pipelines.base.Family`.

    Raises:
        UserError: nothing is there, it is no pipeline, or one of an unknown family; the message says what to do.
    """
    path = str(path)
    kind = pipeline_name(path, revision)
    if kind not in FAMILIES:
        raise UserError(
            f"{path!r} is a {kind}, which diffalign does not know. It knows {', '.join(FAMILIES)}."
            + did_you_mean(kind, FAMILIES)
        )
    module, _, name = FAMILIES[kind].partition(":")
    family: type[Family] = getattr(importlib.import_module(module), name)
    return family.load(path, revision=revision, **options)


def pipeline_name(path: str, revision: str | None = None) -> str:
    """The class of a checkpoint's pipeline, as ``model_index.json`` names it.

    Raises:
        UserError: there is no such file.
    """
    folder = assets.resolve(path)
    if not Path(folder).is_dir():
        check_not_a_file(folder)
    elif not (Path(folder) / "model_index.json").is_file():
        raise UserError(f"{path!r} has no model_index.json, so it is no diffusers pipeline. {_advice(Path(folder))}")
    try:
        return str(DiffusionPipeline.load_config(folder, revision=revision).get("_class_name"))
    except OSError as error:
        if Path(folder).is_dir():
            raise UserError(f"{path}/model_index.json cannot be read: {error}") from error
        raise hub_error(path, error) from error


def _advice(folder: Path) -> str:
    """What a folder that is no pipeline probably is."""
    inner = sorted(str(file.parent) for file in folder.glob("*/model_index.json"))
    if inner:
        return f"Perhaps you mean {' or '.join(map(repr, inner[:3]))}."
    if list(folder.glob("*lora*.safetensors")) or (folder / "adapter_config.json").exists():
        return "It looks like a LoRA: give it as the LoRA, and its base model here."
    if (folder / "config.json").exists():
        return "It looks like one part of a model (a UNet, say): give the folder that holds all parts."
    if singles := sorted(folder.glob("*.safetensors")):
        return (
            f"It holds a single-file checkpoint ({singles[0].name}): turn it into a folder once, with "
            "`StableDiffusionXLPipeline.from_single_file(FILE).save_pretrained(FOLDER)` of diffusers."
        )
    return "Give a folder written by `save_pretrained`, or a hub id."

"""Checkpoint folders: finding them, loading one part of them, and telling one from another.

Only safetensors are read. Hub ids are downloaded by diffusers, into its usual cache.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffalign import assets
from diffalign.errors import UserError

_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")
_HASHED = {".json", ".txt", ".model", ".safetensors"}


def is_hub_id(path: str) -> bool:
    """Whether ``path`` could be a hub id and is nothing on this disk."""
    return bool(_HUB_ID.match(path)) and not path.startswith((".", "~")) and not Path(path).exists()


def locate(
    path: str,
    pipeline_class: type[DiffusionPipeline],
    *,
    revision: str | None = None,
    variant: str | None = None,
    skip: Sequence[str] = (),
) -> str:
    """Return the local folder of a checkpoint, downloading a hub id if need be.

    Args:
        skip: parts of the pipeline not to download.

    Raises:
        UserError: it is neither a folder nor a hub id that can be had; the message says what to do.
    """
    path = assets.resolve(path)
    if Path(path).is_dir():
        return path
    check_not_a_file(path)
    try:
        return str(
            pipeline_class.download(
                path, revision=revision, variant=variant, use_safetensors=True, **dict.fromkeys(skip)
            )
        )
    except (OSError, ValueError) as error:
        raise hub_error(path, error) from error


def check_not_a_file(path: str) -> None:
    """Explain what to do with a path that is no folder and can be no hub id.

    Raises:
        UserError: ``path`` is a single file, or a path where nothing is.
    """
    if Path(path).is_file():
        remedy = "Give the folder of the checkpoint instead."
        if path.endswith((".safetensors", ".ckpt")):
            remedy = (
                "Turn it into a folder once, with `StableDiffusionXLPipeline.from_single_file(FILE)"
                ".save_pretrained(FOLDER)` of diffusers (StableDiffusionPipeline for SD 1.5 or 2.1). "
                "If it is a LoRA, give it as the LoRA and its base model here."
            )
        raise UserError(f"{path!r} is a single file, but a model is a folder in the diffusers layout. {remedy}")
    if not is_hub_id(path):
        raise UserError(f"there is no folder {path!r}, and it cannot be a hub id ('owner/name').")


def hub_error(path: str, error: Exception) -> UserError:
    """The error to raise where the hub, or its cache, does not give ``path``."""
    return UserError(
        f"{path!r} is not a folder here, and could not be had from the hub: {str(error).strip().splitlines()[0]} "
        "Check the spelling; if it is gated or private, run `hf auth login`; where there is no network (or "
        f"HF_HUB_OFFLINE is set), fetch it first with `hf download {path}`, or give a local folder."
    )


def load_config(kind: type, path: str, subfolder: str | None) -> dict[str, Any]:
    """Read a part's config, without its weights.

    Raises:
        UserError: there is none.
    """
    try:
        config: dict[str, Any] = kind.load_config(path, subfolder=subfolder)  # type: ignore[attr-defined]
    except OSError as error:
        where = f"{path}/{subfolder}" if subfolder else path
        raise UserError(f"{where!r} has no readable {kind.config_name}: {error}") from error  # type: ignore[attr-defined]
    return config


def load_part(kind: type, path: str, subfolder: str | None, **options: Any) -> Any:
    """``kind.from_pretrained(path, subfolder=...)``, from safetensors only.

    Raises:
        UserError: the part is missing, broken, or not of this kind.
    """
    if "dtype" in options:
        options["use_safetensors"] = True
    if Path(path).is_dir() and subfolder and not (Path(path) / subfolder).is_dir():
        raise UserError(f"{path!r} has no {subfolder!r} folder; the download or the copy may be incomplete.")
    try:
        return kind.from_pretrained(path, subfolder=subfolder or "", **options)  # type: ignore[attr-defined]
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"could not load {subfolder or 'the model'!r} of {path!r} as {kind.__name__}: {error}"
        ) from error


def fingerprint_files(path: str, subfolders: Sequence[str], *extra: str) -> str:
    """Hash configs and weights in subfolders of a local folder, or of a hub id (then by its commit)."""
    digest = hashlib.blake2b(repr(extra).encode(), digest_size=16)
    if not Path(path).is_dir():
        from diffusers import AutoencoderKL

        config, commit = AutoencoderKL.load_config(path, return_commit_hash=True)
        digest.update(repr((path, commit, sorted(config.items(), key=str))).encode())
        return digest.hexdigest()
    for subfolder in subfolders:
        for file in sorted(p for p in (Path(path) / subfolder).iterdir() if p.suffix in _HASHED):
            digest.update(f"{subfolder}/{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 24):
                    digest.update(block)
    return digest.hexdigest()

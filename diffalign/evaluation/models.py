"""Which model draws: a pipeline, perhaps with LoRAs or a fine-tuned denoiser, named in one word.

LoRAs are loaded by ``load_lora_weights`` and ``set_adapters`` of diffusers, so that what is shown is what a user gets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from diffalign import assets
from diffalign.errors import UserError
from diffalign.pipelines.files import is_hub_id

_SCALED = re.compile(r"(.+)@(-?\d*\.?\d+)")
_WHOLE_HASH = 2**26
_PARTIAL_HASH = 2**22
_DENOISERS = ("unet", "transformer")


@dataclass(frozen=True)
class ModelSpec:
    """A model to draw with.

    Attributes:
        name: what a grid calls it.
        path: its pipeline (folder, hub id or bundled name); None for the base that the config names.
        loras: (file, folder or hub id, scale) of each LoRA on it.
        denoiser: folder of a fine-tuned denoiser that replaces the pipeline's.
        steps, guidance, scheduler: where this model wants others than the config says (a distilled model: 4 steps,
            guidance 1, lcm).
    """

    name: str
    path: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    denoiser: str | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Read ``[NAME=]PART[+PART...]``; parts as in :meth:`from_parts`."""
        name, rest = _split_name(text)
        return cls.from_parts(_split_parts(rest), name)

    @classmethod
    def from_parts(cls, parts: Sequence[str], name: str = "") -> ModelSpec:
        """Put a model together.

        A part is "base"; a LoRA (a ``.safetensors`` file, a folder with one, or a hub id), with its scale as
        ``PART@0.8``; a pipeline (folder, hub id or bundled name); or a folder with a fine-tuned denoiser (``unet/`` in
        it, or itself one).

        Raises:
            UserError: a part is nothing of this, or two parts contradict each other.
        """
        loras: list[tuple[str, float]] = []
        found: dict[str, str] = {}
        labels = []
        for part in parts:
            match = None if Path(part).exists() else _SCALED.fullmatch(part)
            path, scale = (match[1], float(match[2])) if match else (part, 1.0)
            kind = "base" if path == "base" else part_kind(path)
            if match and kind != "lora":
                raise UserError(f"{part!r}: only a LoRA takes a scale, and {path!r} is a {kind}")
            if kind == "lora":
                loras.append((path, scale))
            elif kind in found:
                raise UserError(f"one model cannot have two {kind}s: {found[kind]!r} and {path!r}")
            elif kind != "base":
                found[kind] = path
            if kind != "base" or len(parts) == 1:
                labels.append(_label(path) + (f" @{scale:g}" if match else ""))
        return cls(name or " + ".join(labels), found.get("pipeline"), tuple(loras), found.get("denoiser"))


def unique_names(specs: Sequence[ModelSpec]) -> list[ModelSpec]:
    """The same models; those that share a name are numbered."""
    seen: dict[str, int] = {}
    result = []
    for spec in specs:
        seen[spec.name] = seen.get(spec.name, 0) + 1
        result.append(spec if seen[spec.name] == 1 else replace(spec, name=f"{spec.name} ({seen[spec.name]})"))
    return result


def part_kind(path: str) -> str:
    """What lies at ``path``: "pipeline", "lora" or "denoiser".

    Raises:
        UserError: nothing of these.
    """
    place = Path(assets.resolve(path)).expanduser()
    if place.is_file():
        if place.suffix != ".safetensors":
            raise UserError(f"{path!r} is neither a folder nor a .safetensors file")
        return "lora"
    if place.is_dir():
        if (place / "model_index.json").is_file():
            return "pipeline"
        if _denoiser_folder(place) is not None:
            return "denoiser"
        if list(place.glob("*.safetensors")):
            return "lora"
        raise UserError(
            f"{path!r} holds neither a pipeline (model_index.json), nor a LoRA (*.safetensors), nor a denoiser "
            "(unet/config.json)"
        )
    if not is_hub_id(path) or "/" not in path:
        raise UserError(
            f"there is nothing at {path!r}. A model is 'base', a LoRA or a pipeline (path or hub id 'owner/name'), "
            "as PATH, PATH@SCALE or NAME=PATH@SCALE"
        )
    return "pipeline" if _hub_has_pipeline(path) else "lora"


def identity(spec: ModelSpec, pipeline_folder: str) -> dict[str, Any]:
    """What makes the model what it is, by content and not by place: plain values for JSON."""
    return {
        "pipeline": fingerprint(Path(pipeline_folder)),
        "loras": [[_lora_fingerprint(path), scale] for path, scale in spec.loras],
        "denoiser": fingerprint(Path(spec.denoiser)) if spec.denoiser else None,
    }


def fingerprint(path: Path) -> str:
    """Hash of a weight file, or of the weights and configs of a model folder: names, sizes and contents.

    Of files above 64 MiB only the first and last 4 MiB are read: training changes all of a model's weights.
    """
    digest = hashlib.blake2b(digest_size=12)
    for file in [path] if path.is_file() else _model_files(path):
        size = file.stat().st_size
        name = "" if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}\0{size}\0".encode())
        with file.open("rb") as stream:
            if size <= _WHOLE_HASH:
                digest.update(stream.read())
            else:
                digest.update(stream.read(_PARTIAL_HASH))
                stream.seek(-_PARTIAL_HASH, 2)
                digest.update(stream.read())
    return digest.hexdigest()


@contextmanager
def applied(pipe: DiffusionPipeline, spec: ModelSpec) -> Iterator[None]:
    """The pipeline with the model's denoiser and LoRAs inside, as it was outside.

    Raises:
        UserError: a LoRA or the denoiser cannot be loaded into this pipeline.
    """
    replaced: dict[str, Any] = {}
    try:
        if spec.denoiser:
            name, denoiser = _load_denoiser(spec.denoiser, pipe)
            replaced[name] = getattr(pipe, name)
            pipe.register_modules(**{name: denoiser})
        for index, (path, _) in enumerate(spec.loras):
            _load_lora(pipe, path, f"lora_{index}")
        if spec.loras:
            pipe.set_adapters(
                [f"lora_{index}" for index in range(len(spec.loras))], [scale for _, scale in spec.loras]
            )
        yield
    finally:
        if spec.loras:
            pipe.unload_lora_weights()
        if replaced:
            pipe.register_modules(**replaced)


def _load_lora(pipe: DiffusionPipeline, path: str, adapter: str) -> None:
    file = _lora_file(path)
    try:
        if file is None:
            pipe.load_lora_weights(path, adapter_name=adapter)
        else:
            pipe.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=adapter)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"cannot load the LoRA {path!r} into a {type(pipe).__name__}: {str(error)[:600]} "
            "Was it trained on this model?"
        ) from error
    if not any(adapter in adapters for adapters in pipe.get_list_adapters().values()):
        raise UserError(
            f"the LoRA {path!r} changes nothing in this {type(pipe).__name__}: none of its keys belong to the model. "
            "Was it trained on this model?"
        )


def _load_denoiser(path: str, pipe: DiffusionPipeline) -> tuple[str, Any]:
    """Name in the pipeline and module of a fine-tuned denoiser."""
    folder = _denoiser_folder(Path(path).expanduser())
    if folder is None:
        raise UserError(f"{path!r} holds no denoiser")
    kind = json.loads((folder / "config.json").read_text())["_class_name"]
    names = [name for name in _DENOISERS if type(getattr(pipe, name, None)).__name__ == kind]
    if not names:
        raise UserError(f"{path!r} is a {kind}, which a {type(pipe).__name__} has no place for")
    present = getattr(pipe, names[0])
    try:
        loaded = getattr(diffusers, kind).from_pretrained(folder, torch_dtype=present.dtype, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"cannot load the denoiser of {path!r}: {error}") from error
    return names[0], loaded.to(present.device).eval()


def _denoiser_folder(place: Path) -> Path | None:
    for folder in (place, *(place / name for name in _DENOISERS)):
        config = folder / "config.json"
        if config.is_file() and "_class_name" in json.loads(config.read_text()):
            return folder
    return None


def _lora_file(path: str) -> Path | None:
    """The weight file of a local LoRA; None for a hub id.

    Raises:
        UserError: a folder has several, none of which is called as diffusers calls it.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if not place.is_dir():
        return None
    usual = place / "pytorch_lora_weights.safetensors"
    files = [usual] if usual.is_file() else sorted(place.glob("*.safetensors"))
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path!r} should hold one LoRA file, found {found}. Name the file itself.")
    return files[0]


def _lora_fingerprint(path: str) -> str:
    file = _lora_file(path)
    return path if file is None else fingerprint(file)


def _model_files(folder: Path) -> list[Path]:
    """Weights and configs of a pipeline's parts, or of a single model; not what else lies in the folder."""
    index = folder / "model_index.json"
    places = [folder]
    if index.is_file():
        parts = json.loads(index.read_text())
        places += [folder / name for name, part in sorted(parts.items()) if isinstance(part, list)]
    elif (inner := _denoiser_folder(folder)) is not None:
        places = [inner]
    kinds = {".json", ".safetensors", ".txt", ".model"}
    return sorted(file for place in places if place.is_dir() for file in place.iterdir() if file.suffix in kinds)


def _split_name(text: str) -> tuple[str, str]:
    """NAME and the rest of NAME=REST; no name if the whole is a path or has no "="."""
    name, equals, rest = text.partition("=")
    if not equals or Path(text).exists():
        return "", text.strip()
    if not name.strip() or not rest.strip():
        raise UserError(f"{text!r}: write NAME=PATH or NAME=PATH@SCALE")
    return name.strip(), rest.strip()


def _split_parts(text: str) -> list[str]:
    parts = [text] if Path(text).exists() else [part.strip() for part in text.split("+")]
    if not all(parts):
        raise UserError(f"{text!r} has an empty part: write the parts as PATH@SCALE+PATH@SCALE")
    return parts


def _label(path: str) -> str:
    """A short name: the last part of a path that tells something."""
    parts = [part for part in Path(path).parts if part not in (".", "/")]
    last = Path(parts[-1]).stem if parts and parts[-1].endswith(".safetensors") else (parts or [path])[-1]
    generic = last == "pytorch_lora_weights" or last in _DENOISERS
    if generic and len(parts) > 1:
        return _label(str(Path(*parts[:-1])))
    return f"{parts[-2]}/{last}" if last.startswith("checkpoint-") and len(parts) > 1 else last


def _hub_has_pipeline(path: str) -> bool:
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(try_to_load_from_cache(path, "model_index.json"), str):
        return True
    try:
        return file_exists(path, "model_index.json")
    except (OSError, HfHubHTTPError):
        return False  # offline: a LoRA that is not there either gets its own error when it is loaded

"""Finding and reading the checkpoints of reward models, with errors that say which file, what is wrong, what to do.

Nothing is downloaded before a reward is first used, and nothing at all with ``local_files_only=True`` or
``HF_HUB_OFFLINE=1``. Torch files are read with ``weights_only=True``: no checkpoint can run code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from diffalign.errors import UserError

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_HUB_FILE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)/(?P<file>[^/].*\.(safetensors|pt|pth|bin|ckpt))")
# Buffers that older versions of the libraries saved; they hold 0, 1, 2, ...
_IGNORED = re.compile(r"(^|\.)position_ids$")


def load_from(loader: Any, place: str, *, what: str = "", advice: str = "", **options: Any) -> Any:
    """``loader(place, **options)``, with an error that says which file of which checkpoint could not be had.

    Args:
        what: is loaded, for the error; without it, the class that loads it.
        advice: what to do about it; without it, how a checkpoint is named.

    Raises:
        UserError: it could not.
    """
    try:
        return loader(place, **options)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        what = what or getattr(loader, "__self__", loader).__name__
        raise UserError(
            f"could not load {what} from {place!r}: {str(error)[:400]} "
            + (advice or "Give a folder, or a hub id that is reachable or was downloaded before (`hf download ID`).")
        ) from error


def load_model(
    kind: type[PreTrainedModel],
    checkpoint: str,
    *,
    config: PretrainedConfig | None = None,
    **options: Any,
) -> Any:
    """A frozen model of transformers in float32 and eval mode, with the checkpoint's own config or ``config``.

    Args:
        options: revision, local_files_only.

    Raises:
        UserError: it is not there, lacks weights of the model (transformers would draw them at random), holds others
            that have no place in it, or weights of another shape.
    """
    options |= {"config": config, "dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load_from(kind.from_pretrained, checkpoint, **options)
    surplus = [key for key in info["unexpected_keys"] if not _IGNORED.search(key)]
    shapes = [f"{key} {tuple(theirs)} for {tuple(ours)}" for key, theirs, ours in info["mismatched_keys"]]
    complain(checkpoint, kind.__name__.lstrip("_"), set(info["missing_keys"]), surplus, shapes)
    return model.eval().requires_grad_(False)


def fill(model: nn.Module, state: Mapping[str, Tensor], source: str, kind: str) -> None:
    """Put weights into a model in place of its own, in float32; it may have been made on the meta device.

    Args:
        source: what errors call the file.
        kind: what errors call the model.

    Raises:
        UserError: weights are missing, left over, or of another shape; names them.
    """
    own = model.state_dict()
    state = {key: value for key, value in state.items() if key in own or not _IGNORED.search(key)}
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    complain(source, kind, set(own) - set(state), set(state) - set(own), shapes)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)


def complain(source: str, kind: str, missing: Any, surplus: Any, shapes: Sequence[str] = ()) -> None:
    """Raise a UserError if any of these, names of weights or descriptions of shapes, is not empty."""
    problems = [
        f"{what} {len(names)} ({', '.join(sorted(names)[:3])}{', ...' if len(names) > 3 else ''})"
        for what, names in (
            ("weights it lacks:", missing),
            ("weights that have no place:", surplus),
            ("weights of another shape:", shapes),
        )
        if names
    ]
    if problems:
        raise UserError(f"{source!r} is not a checkpoint of a {kind}: {'; '.join(problems)}")


def locate(
    checkpoint: str,
    names: Sequence[str],
    *,
    what: str,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """The weight file that a checkpoint means.

    Args:
        checkpoint: a file; a folder or hub id that holds one of ``names``; or ``owner/repo/file`` on the hub.
        names: in the order in which they are looked for.
        what: the file is, for errors.

    Raises:
        UserError: there is none; says where was looked.
    """
    place = Path(checkpoint).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        for name in names:
            if (place / name).is_file():
                return place / name
        there = ", ".join(sorted(file.name for file in place.iterdir())[:8]) or "nothing"
        raise UserError(
            f"no {what} in {place}: expected {' or '.join(names)}, found {there}. Or give the file itself."
        )
    match = _HUB_FILE.fullmatch(checkpoint)
    if place.is_absolute() or checkpoint.startswith(("./", "../", "~")) or ("/" not in checkpoint):
        raise UserError(f"no {what}: there is no weight file {checkpoint}")
    repo, names = (match["repo"], [match["file"]]) if match else (checkpoint, names)
    return _download(repo, names, what=what, revision=revision, local_files_only=local_files_only)


def _download(repo: str, names: Sequence[str], *, what: str, revision: str | None, local_files_only: bool) -> Path:
    tried = f"{' or '.join(names)} of the hub repository {repo!r}" + (f" at revision {revision!r}" if revision else "")
    problem: Exception | None = None
    for name in names:
        try:
            return Path(hf_hub_download(repo, name, revision=revision, local_files_only=local_files_only))
        except (LocalEntryNotFoundError, EntryNotFoundError) as error:
            problem = problem or error
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            problem = error
            break
    raise UserError(
        f"no {what}: neither a local file or folder {repo!r}, nor could {tried} be had"
        f"{' (local_files_only: nothing is downloaded)' if local_files_only else ''}: {str(problem)[:300]} "
        f"Download it (`hf download {repo} {names[0]}`) or give the place of the file."
    ) from problem


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or torch file, or of ``model.safetensors`` in a folder, on the CPU.

    A training checkpoint's ``{"state_dict": ...}`` is unwrapped, and the ``module.`` that data-parallel training puts
    before names is taken off.

    Raises:
        UserError: there is no such file, or a torch file holds more than tensors.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "model.safetensors"
    if not file.is_file():
        raise UserError(f"there is no weight file {file}")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise UserError(f"{file} is not a whole safetensors file: {error}") from error
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file} is not a plain file of tensors, and nothing else is loaded: {error}") from error
    if isinstance(state, dict) and isinstance(state.get("state_dict"), Mapping):
        state = dict(state["state_dict"])
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file} holds a {type(state).__name__}, not tensors by name")
    if state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state

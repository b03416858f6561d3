"""Models of transformers by folder or hub id, with errors that say what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.models import fingerprint


def load_pretrained(kind: Any, path: str, role: str, **options: Any) -> Any:
    """``kind.from_pretrained(path)``, weights from safetensors only and without code of the repository.

    Raises:
        UserError: there is no such model, or it is none of this kind.
    """
    if "dtype" in options:
        options["use_safetensors"] = True
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path!r} cannot be loaded as a {role} ({kind.__name__}: {reason}). Give a folder or hub id of such a "
            "model with safetensors weights, or package.module:function for one of your own."
        ) from error


def model_identity(path: str, revision: str | None = None) -> str:
    """What a model is, by content for a local folder: for the settings that a stored result was made with."""
    if Path(path).is_dir():
        return f"{Path(path).name} {fingerprint(Path(path))}"
    return f"{path}@{revision}" if revision else path

"""The bundled models and data of the shapes world, usable by name wherever a path or hub id is accepted."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import UserError

BUNDLED = ("shapes-sdxl", "shapes-clip", "shapes-aesthetic", "shapes-pairs")
ROOT = Path(__file__).parent / "shapes" / "assets"


def resolve(name_or_path: str) -> str:
    """Return the folder of a bundled name; return anything else (a path or a hub id) unchanged.

    A local folder of the same name wins over the bundled one, as it does over a hub id in diffusers.

    Raises:
        UserError: the name is bundled but its folder is not in this installation.
    """
    if name_or_path not in BUNDLED or Path(name_or_path).exists():
        return name_or_path
    folder = ROOT / name_or_path
    if not folder.is_dir():
        raise UserError(
            f"the bundled {name_or_path!r} is missing from this installation (looked in {folder}). "
            "Reinstall diffalign, or rebuild it with `make shapes` in a source checkout."
        )
    return str(folder)

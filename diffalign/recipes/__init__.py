"""The recipes: YAML configs that come with diffalign, named by model, method and size of the machine."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import UserError, did_you_mean

ROOT = Path(__file__).parent


def names() -> list[str]:
    """Return the names of the recipes, sorted."""
    return sorted(path.stem for path in ROOT.glob("*.yaml"))


def find(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        UserError: there is none of that name.
    """
    path = ROOT / f"{name}.yaml"
    if name not in names():
        raise UserError(f"there is no recipe {name!r}.{did_you_mean(name, names())} Recipes: {', '.join(names())}.")
    return path


def launch_configs() -> list[str]:
    """Return the names of the configurations for `accelerate launch`, sorted."""
    return sorted(path.stem for path in (ROOT / "accelerate").glob("*.yaml"))


def find_launch_config(name: str) -> Path:
    """Return the file of a configuration for `accelerate launch`.

    Raises:
        UserError: there is none of that name.
    """
    known = launch_configs()
    if name not in known:
        raise UserError(
            f"there is no configuration {name!r} for accelerate.{did_you_mean(name, known)} {', '.join(known)}."
        )
    return ROOT / "accelerate" / f"{name}.yaml"


def resolve(name_or_path: str) -> str:
    """Return the path of a config given by path or by the name of a recipe; a file of that name wins.

    Raises:
        UserError: it looks like a name (no folder, no .yaml) and is neither a file nor a recipe.
    """
    if Path(name_or_path).exists() or Path(name_or_path).suffix in (".yaml", ".yml") or "/" in name_or_path:
        return name_or_path
    return str(find(name_or_path))


def summary(name: str) -> str:
    """Return the first comment line of a recipe, which says in one line what it is for."""
    first = find(name).read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""

"""Imports go down, never up, and what must start fast imports nothing heavy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import diffalign

PACKAGE = Path(diffalign.__file__).parent
FLOORS = {
    "diffalign": 0,
    "diffalign.errors": 0,
    "diffalign.assets": 0,
    "diffalign.config": 0,
    "diffalign.imports": 0,
    "diffalign.recipes": 0,
    "diffalign.diffusion": 0,
    "diffalign.shapes": 0,
    "diffalign.data": 1,
    "diffalign.pipelines": 1,
    "diffalign.rewards": 1,
    # Validation images of a run are drawn by the code that draws grids.
    "diffalign.evaluation": 2,
    "diffalign.estimation": 2,
    "diffalign.training": 2,
    "diffalign.search": 3,
    "diffalign.trainers": 3,
    "diffalign.making": 3,
    "diffalign.labelling": 3,
    "diffalign.shapes.building": 4,
    "diffalign.app": 4,
    "diffalign.cli": 4,
    "diffalign.__main__": 4,
}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
LIGHT = ("diffalign", "diffalign.errors", "diffalign.assets", "diffalign.config", "diffalign.recipes", "diffalign.cli")
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "accelerate", "peft", "datasets", "open_clip", "scipy"}


def place(module: str) -> str:
    """The longest prefix of a module that has a floor."""
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    found = next(prefix for prefix in prefixes if prefix in FLOORS)
    assert found != "diffalign" or module == "diffalign", f"{module} has no floor: add it to FLOORS"
    return found


def imports(tree: ast.AST, *, top_only: bool) -> Iterator[str]:
    nodes = ast.iter_child_nodes(tree) if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_down(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    for name in imports(tree, top_only=False):
        if name.split(".")[0] == "diffalign":
            assert FLOORS[place(name)] <= FLOORS[place(module)], f"{module} imports {name}, which lives above it"


def test_no_two_packages_need_each_other() -> None:
    edges = {
        (place(module), place(name))
        for module, path in MODULES.items()
        for name in imports(ast.parse(path.read_text(encoding="utf-8")), top_only=False)
        if name.split(".")[0] == "diffalign"
    }
    assert [(a, b) for a, b in edges if a < b and (b, a) in edges] == []


@pytest.mark.parametrize("module", sorted(name for name in MODULES if place(name) in LIGHT))
def test_what_starts_fast_imports_nothing_heavy(module: str) -> None:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    heavy = {name.split(".")[0] for name in imports(tree, top_only=True)} & HEAVY
    assert not heavy


def test_the_top_level_links_are_not_importable_names() -> None:
    """`import rewards` must find a user's own rewards.py, never ours."""
    for module, path in MODULES.items():
        for name in imports(ast.parse(path.read_text(encoding="utf-8")), top_only=False):
            assert name.split(".")[0] not in ("pipelines", "rewards"), f"{module} imports {name}"

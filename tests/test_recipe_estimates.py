"""The estimates in the heads of the recipes: there, believable, and what `diffalign estimate` says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from diffalign import recipes
from diffalign.estimation.cards import find_card, load_calibration

SCRIPT = Path(__file__).parent.parent / "scripts" / "estimate_recipes.py"
LINE = re.compile(r"^# Estimated: ([\d.]+) GiB; .* on one (.*) \(`diffalign estimate (\S+) --card '(.*)'`\)\.$", re.M)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("estimate_recipes", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_recipe_of_a_card_has_an_estimate_that_fits_it(script: ModuleType) -> None:
    calibration = load_calibration()
    names = script.sized()
    assert len(names) > 20
    for name in names:
        found = LINE.search(recipes.find(name).read_text())
        assert found is not None, f"{name}: run python scripts/estimate_recipes.py --write {name}"
        peak, card, own, again = found.groups()
        assert own == name and card == again
        need = float(peak) * (1 + calibration.fragmentation) + calibration.reserve_gib
        assert need * 2**30 <= find_card(card).memory, f"{name} is estimated not to fit"


@pytest.mark.parametrize("method", ["dpo", "mapo"])
@pytest.mark.parametrize("size", [8, 12, 16, 24, 48, 80])
def test_there_is_a_preset_for_every_size_of_card(method: str, size: int, script: ModuleType) -> None:
    assert f"sdxl-{method}-1x{size}gb" in script.sized()


@pytest.mark.parametrize("name", ["sdxl-dpo-1x24gb", pytest.param("sdxl-mapo-1x8gb", marks=pytest.mark.slow)])
def test_the_line_is_what_the_command_says(name: str, script: ModuleType) -> None:
    text = recipes.find(name).read_text()
    assert script.with_line(text, script.line(name, script.estimated(name))) == text


def test_a_line_replaces_an_old_one(script: ModuleType) -> None:
    text = "# A recipe.\n#\n# Sources.\n#\n# Name your pairs:\nmethod: dpo\n"
    once = script.with_line(text, "# Estimated: 1 GiB.\n")
    assert once == "# A recipe.\n#\n# Sources.\n# Estimated: 1 GiB.\n#\n# Name your pairs:\nmethod: dpo\n"
    assert script.with_line(once, "# Estimated: 2 GiB.\n") == once.replace("1 GiB", "2 GiB")

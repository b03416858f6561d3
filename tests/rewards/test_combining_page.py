"""The page on combining says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffalign.config.files import parse_yaml
from diffalign.rewards.combine import RewardSpec
from diffalign.rewards.ensembles import MODES
from diffalign.rewards.transforms import KINDS, parse_transforms

PAGE = (Path(__file__).parents[2] / "docs" / "combining-rewards.md").read_text(encoding="utf-8")


def test_the_yaml_is_understood() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    specs = [RewardSpec.of(item) for item in parse_yaml(text, "page")["rewards"]]
    assert [spec.eval_only for spec in specs] == [False, False, False, True]
    assert [[t.kind for t in parse_transforms(spec.transform, "x")] for spec in specs] == [
        [],
        ["zscore"],
        ["cap", "zscore"],
        [],
    ]


@pytest.mark.parametrize("name", [*KINDS, *MODES])
def test_every_transform_and_mode_is_explained(name: str) -> None:
    assert re.search(rf"^\| .*`{name}`", PAGE, re.MULTILINE)

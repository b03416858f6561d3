"""Runs that another benchmark trained are judged only where they are the recipe's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from diffalign.config import load_yaml
from diffalign.recipes import find

Script = Callable[[str], ModuleType]


def trained(folder: Path, steps: int | None = None, **more: Any) -> Path:
    """A run folder of shapes-awm with seed 3, with other settings."""
    config = load_yaml(find("shapes-awm")) | {"seed": 3, "output_dir": "elsewhere"} | more
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    rows = [{"step_seconds": 0.5}] * (config["max_train_steps"] if steps is None else steps)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_other_judges_are_no_other_run(script: Script, tmp_path: Path) -> None:
    more = {"reward": "shapes-clip", "eval_only": True}
    run = trained(tmp_path, rewards=["shapes-checker", more], num_heldout_prompts=384, evaluation_eta=1.0)
    assert script("shapes_methods").trained_already(run, "awm", 3) == {"train_seconds": 24.0}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"learning_rate": 0.1}, "other settings than shapes-awm: .*learning_rate"),
        ({"seed": 4}, "seed"),
        ({"rewards": ["jpeg_compressibility"]}, "rewards"),
        ({"steps": 7}, "has 7 steps of 48"),
    ],
)
def test_a_run_that_is_not_the_recipes_is_refused(
    own: dict[str, Any], message: str, script: Script, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=message):
        script("shapes_methods").trained_already(trained(tmp_path, **own), "awm", 3)


def test_a_student_is_drawn_as_its_recipe_says(script: Script, tmp_path: Path) -> None:
    recipe = load_yaml(find("shapes-lcd"))
    own = {"validation_scheduler": "lcm", "validation_inference_steps": 4, "validation_guidance_scale": 1.0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(recipe | own | {"timestep_scaling_factor": 10.0}))
    sampling = script("shapes_methods").sampling_of(tmp_path, "lcd")
    assert sampling["scheduler"] == "lcm:strength=0.8:original_inference_steps=10:timestep_scaling=10"
    assert (sampling["steps"], sampling["guidance"]) == (4, 1.0)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign import cli, recipes
from diffalign.app.recipes import copy_recipe
from diffalign.config import from_dict, load_yaml
from diffalign.errors import UserError
from diffalign.evaluation.eval_config import EvalConfig
from diffalign.making.iterate import IterateConfig
from diffalign.making.pairs import PairsConfig
from diffalign.trainers import load_method
from diffalign.trainers.reward.config import RewardTrainingConfig
from diffalign.training.groups import Arithmetic
from diffalign.training.online_config import PromptConfig


def method_of(name: str) -> str:
    """Every recipe names its method."""
    return str(load_yaml(recipes.find(name))["method"])


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_fits_its_method(name: str) -> None:
    settings, given = load_yaml(recipes.find(name)), {"output_dir": "out", "dataset_name": "pairs"}
    config_class: type[Any]
    if "pairs-making" in name:
        config_class, given = PairsConfig, {}
    elif "-eval" in name:
        config_class, given = EvalConfig, {}
    elif "iterated" in name:
        config_class, given = IterateConfig, {}
    else:
        method = method_of(name)
        config_class = RewardTrainingConfig if method == "reward" else load_method(method)[0]
        if issubclass(config_class, PromptConfig):
            given = {"output_dir": "out", "prompts": "prompts.txt"}
    config = from_dict(config_class, {**given, **settings}, name)
    assert config.pretrained_model_name_or_path


ON_ROLLOUTS = [name for name in recipes.names() if "num_prompts_per_rollout" in load_yaml(recipes.find(name))]


@pytest.mark.parametrize("name", ON_ROLLOUTS)
def test_sizes_of_rollouts_go_into_each_other_on_the_machine_of_the_name(name: str) -> None:
    settings = load_yaml(recipes.find(name))
    arithmetic = Arithmetic(
        groups=settings["num_prompts_per_rollout"],
        images_per_group=settings["num_images_per_prompt"],
        updates=settings["num_updates_per_rollout"],
        epochs=1,
        micro_batch=settings["train_batch_size"],
        passes_per_image=1,
        world_size=8 if "8x" in name else 1,
    )
    arithmetic.check()
    assert arithmetic.whole_groups()
    # The ratio of a step is 1 in bf16 only if both sides see batches of one size.
    assert (
        settings["method"] != "ddpo"
        or "bf16" not in settings.values()
        or (settings["rollout_batch_size"] == settings["train_batch_size"])
    )


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_says_what_it_is_for(name: str) -> None:
    assert 20 < len(recipes.summary(name)) < 120


def test_the_promised_recipes_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    shown = capsys.readouterr().out
    for name in ("sdxl-dpo-1x24gb", "sdxl-dpo-1x80gb", "shapes-dpo"):
        assert name in recipes.names()
        assert f"{name} " in shown and recipes.summary(name) in shown


def test_show_prints_the_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "show", "shapes-dpo"]) == 0
    assert capsys.readouterr().out == recipes.find("shapes-dpo").read_text()


def test_copy_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes", "copy", "shapes-dpo", str(tmp_path)]) == 0
    mine = tmp_path / "shapes-dpo.yaml"
    assert capsys.readouterr().out == f"{mine}\n"
    mine.write_text("rank: 1\n")
    assert cli.main(["recipes", "copy", "shapes-dpo", str(mine)]) == 2
    assert "--force" in capsys.readouterr().err
    assert mine.read_text() == "rank: 1\n"
    assert cli.main(["recipes", "copy", "shapes-dpo", str(mine), "--force"]) == 0
    assert mine.read_bytes() == recipes.find("shapes-dpo").read_bytes()


def test_copy_to_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        copy_recipe("shapes-dpo", tmp_path / "no" / "x.yaml")


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert recipes.resolve("shapes-dpo") == str(recipes.find("shapes-dpo"))
    assert recipes.resolve("mine.yaml") == "mine.yaml"
    (tmp_path / "shapes-dpo").write_text("seed: 1\n")
    assert recipes.resolve("shapes-dpo") == "shapes-dpo"
    with pytest.raises(UserError, match="Did you mean 'sdxl-dpo-1x24gb'"):
        recipes.resolve("sdxl-dpo-1x24g")

"""Which method runs, and what becomes of settings that only another method has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffalign import cli
from diffalign.config import load_yaml
from diffalign.errors import UserError
from diffalign.recipes import find
from diffalign.trainers import METHODS, load_method, mapo, settings_for
from diffalign.trainers.dpo import DPOConfig, DPOTrainer


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that reach MaPO's trainer."""
    configs: list[Any] = []

    class Recorder:
        def __init__(self, config: Any) -> None:
            configs.append(config)

        def train(self) -> None:
            pass

    monkeypatch.setattr(mapo, "MaPOTrainer", Recorder)
    return configs


def test_the_config_may_name_the_method(seen: list[Any], tmp_path: Path) -> None:
    assert cli.main(["train", "--config", "shapes-mapo", "--output_dir", str(tmp_path), "--rank", "3"]) == 0
    assert (seen[0].method, seen[0].rank, seen[0].output_dir) == ("mapo", 3, str(tmp_path))


@pytest.mark.parametrize("how", ["word", "file"])
def test_one_word_changes_the_method(
    how: str, seen: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mine = tmp_path / "mine.yaml"
    text = find("shapes-dpo").read_text()
    mine.write_text(text if how == "word" else text.replace("method: dpo", "method: mapo"))
    with caplog.at_level("WARNING", "diffalign"):
        assert cli.main(["train", *(["mapo"] if how == "word" else []), "--config", str(mine)]) == 0
    assert seen[0].method == "mapo" and seen[0].learning_rate == load_yaml(mine)["learning_rate"]
    assert "mapo has no beta_dpo: 500" in caplog.text and "beta_mapo" in caplog.text


def test_what_no_method_has_stays_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("method: mapo\nbeta_mpao: 1\n")
    assert cli.main(["train", "--config", str(mine)]) == 2
    assert "unknown key 'beta_mpao'" in capsys.readouterr().err


def test_a_config_without_a_method_says_how_to_name_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("rank: 1\n")
    assert cli.main(["train", "--config", str(mine)]) == 2
    shown = capsys.readouterr().err
    assert "names no method" in shown and "method: dpo" in shown


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_recipe_of_another(name: str) -> None:
    settings = settings_for(name, load_yaml(find("shapes-dpo")))
    fields = load_method(name)[0].__dataclass_fields__
    assert settings["method"] == name and not settings.keys() - fields.keys()


def test_a_trainer_refuses_the_settings_of_another_method(tmp_path: Path) -> None:
    config = DPOConfig(method="mapo", pretrained_model_name_or_path="m", output_dir=str(tmp_path), dataset_name="d")
    with pytest.raises(UserError, match="method: dpo"):
        DPOTrainer(config)

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from diffalign.data.readers import open_pairs
from diffalign.errors import UserError
from diffalign.making import difficulty
from diffalign.making.difficulty import DifficultyConfig, run_difficulty, split_by_prompt

PROMPTS = ["a", "b", "A ", "c", "d", "b", "e", "f"]


def config(model: str, source: Path, out: Path, **settings: Any) -> DifficultyConfig:
    train = {"pretrained_model_name_or_path": model, "resolution": 32, "rank": 2, "max_train_steps": 1}
    train |= {"report_to": ["none"], "cache_dir": str(out / "cache"), "train_batch_size": 3, "learning_rate": 1e-2}
    return DifficultyConfig(
        dataset_name=str(source), output_dir=str(out), **({"seeds": 1, "draws": 2, "train": train} | settings)
    )


def test_halves_share_no_prompt() -> None:
    seen = set()
    for number in range(10):
        halves = split_by_prompt(PROMPTS, 0, number)
        texts = {half: {PROMPTS[i].strip().lower() for i in own} for half, own in halves.items()}
        assert not texts["a"] & texts["b"] and sorted(halves["a"] + halves["b"]) == list(range(8))
        assert abs(len(halves["a"]) - len(halves["b"])) <= 2
        assert halves == split_by_prompt(PROMPTS, 0, number)
        seen.add(tuple(halves["a"]))
    assert len(seen) > 3
    with pytest.raises(UserError, match="only one"):
        split_by_prompt(["a", "A"], 0, 0)


def test_pairs_are_sorted_from_easy_to_hard_and_nothing_is_trained_twice(
    tiny_sd_path: str, shapes_pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = run_difficulty(config(tiny_sd_path, shapes_pairs, tmp_path))
    values = pq.read_table(path)["difficulty"].to_pylist()
    assert len(values) == 4 and values == sorted(values) and all(0 < value < 5 for value in values)
    kept = [pair.id for pair in open_pairs(path)]
    assert set(kept) <= {f"p{i}" for i in range(8)}

    def fail(*given: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(difficulty, "_losses_of", fail)
    everything = run_difficulty(config(tiny_sd_path, shapes_pairs, tmp_path, keep=1.0))
    assert [pair.id for pair in open_pairs(everything)][:4] == kept
    with pytest.raises(UserError, match="draws is 2 there"):
        run_difficulty(config(tiny_sd_path, shapes_pairs, tmp_path, draws=3))


def test_the_loss_of_a_pair_depends_on_its_noise_alone(tiny_sd_path: str, shapes_pairs: Path, tmp_path: Path) -> None:
    """At the start policy and reference agree, so that every loss is ln 2; batches change nothing."""
    own = config(tiny_sd_path, shapes_pairs, tmp_path)
    from diffalign.trainers.dpo import DPOTrainer

    losses = difficulty.held_out_losses(DPOTrainer(own.train_config(shapes_pairs, tmp_path / "run", 0)), 2)  # type: ignore[arg-type]
    assert list(losses) == [f"p{i}" for i in range(8)]
    assert torch.tensor(list(losses.values())).allclose(torch.tensor(2.0).log())


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"keep": 0.0}, "keep"),
        ({"keep": 1.5}, "keep"),
        ({"seeds": 0}, "seeds"),
        ({"method": "sft"}, "does not learn from pairs"),
        ({"train": {"seed": 3}}, "train.seed is set here"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        config("model", tmp_path, tmp_path, **settings)

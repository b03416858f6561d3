from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffalign.errors import UserError
from diffalign.rewards.pixels import Preprocess
from diffalign.trainers.reward.config import RewardTrainingConfig
from diffalign.trainers.reward.data import PixelPairs, normalised, open_parts, split_by_prompt

MakeConfig = Callable[..., RewardTrainingConfig]


def test_the_split_is_by_prompt_and_not_by_row() -> None:
    prompts = [f"prompt {i % 40}" for i in range(200)]
    groups = split_by_prompt(prompts, [0.1, 0.2], seed=0)
    of = {prompt: {g for p, g in zip(prompts, groups, strict=True) if p == prompt} for prompt in prompts}
    assert all(len(found) == 1 for found in of.values())
    assert [sum(found == {g} for found in of.values()) for g in range(3)] == [28, 4, 8]


def test_the_split_depends_on_prompt_and_seed_only() -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    groups = dict(zip(prompts, split_by_prompt(prompts, [0.25], 0), strict=True))
    backwards = dict(zip(prompts[::-1], split_by_prompt(prompts[::-1], [0.25], 0), strict=True))
    assert groups == backwards
    assert groups != dict(zip(prompts, split_by_prompt(prompts, [0.25], 1), strict=True))


def test_prompts_are_compared_without_case_and_blanks() -> None:
    assert normalised("  A Red\tcircle ") == normalised("a red circle")
    assert len(set(split_by_prompt(["A cat", "a cat ", "a  CAT"] * 5 + ["x", "y"], [0.5], 0)[:15])) == 1


def test_the_parts_share_no_prompt_and_keep_ties(reward_config: MakeConfig) -> None:
    parts = open_parts(reward_config())
    names = [set(part.counts) for part in (parts.train, parts.validation, parts.heldout)]
    assert [len(found) for found in names] == [12, 6, 6]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])
    assert sum((part.labels == 0.5).sum() for part in (parts.train, parts.validation, parts.heldout)) == 6
    assert parts.train[0].user_id is not None
    assert parts.train.sharing([0]).item() == 2


def test_training_pairs_with_a_held_out_prompt_are_left_out(
    bright_pairs: Path, tmp_path: Path, reward_config: MakeConfig
) -> None:
    rows = [json.loads(line) for line in (bright_pairs / "metadata.jsonl").read_text().splitlines()]
    for split, chosen in (("train", rows), ("heldout", rows[:4])):
        (tmp_path / "set" / split).mkdir(parents=True)
        for row in chosen:
            for side in ("chosen", "rejected"):
                shutil.copy(bright_pairs / row[side], tmp_path / "set" / split)
        text = "".join(json.dumps({**row, "prompt": row["prompt"].upper()}) + "\n" for row in chosen)
        (tmp_path / "set" / split / "metadata.jsonl").write_text(text)
    parts = open_parts(reward_config(dataset_name=str(tmp_path / "set"), heldout_split="heldout"))
    assert (len(parts.heldout), parts.dropped) == (4, 8)
    assert not set(parts.heldout.counts) & (set(parts.train.counts) | set(parts.validation.counts))


def test_a_broken_picture_is_a_bad_row(bright_pairs: Path, tmp_path: Path, reward_config: MakeConfig) -> None:
    folder = shutil.copytree(bright_pairs, tmp_path / "copy")
    (folder / "chosen-5.png").write_bytes(b"no picture")
    parts = open_parts(reward_config(dataset_name=str(folder)))
    assert sum(map(len, (parts.train, parts.validation, parts.heldout))) == 47
    with pytest.raises(UserError, match="max_bad_rows"):
        open_parts(reward_config(dataset_name=str(folder), max_bad_rows=0))


def test_too_few_prompts_to_split_is_an_error(reward_config: MakeConfig) -> None:
    with pytest.raises(UserError, match="part has no pair that is not a tie"):
        open_parts(reward_config(max_train_samples=2))


def test_augmentation_is_joint_keyed_and_never_for_evaluation(reward_config: MakeConfig) -> None:
    part = open_parts(reward_config()).train
    plain = PixelPairs(part, Preprocess(32, 32), flip=False, shift=0.0, seed=0)
    moved = PixelPairs(part, Preprocess(32, 32), flip=True, shift=0.2, seed=0)
    for side in ("chosen", "rejected"):
        torch.testing.assert_close(moved[0, -1][side], plain[0, -1][side])
        torch.testing.assert_close(moved[0, 3][side], moved[0, 3][side])
    seen = {tuple(torch.as_tensor(moved[0, step]["chosen"]).flatten()[:8].tolist()) for step in range(6)}
    assert len(seen) > 3
    # The same move of both: the pair of a picture with itself stays one.
    both = moved._augment(torch.stack([plain[0, -1]["chosen"]] * 2), "x", 1)  # type: ignore[list-item]
    torch.testing.assert_close(both[0], both[1])

"""A reward that fails in training: by policy the run ends and is resumed, tries again, or leaves the image out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.rewards.base import RewardError
from diffalign.trainers import load_method

FLAKY = '''
from pathlib import Path

def score(images, prompts, metadata):
    """Red, but for what the file next to this one says: how many calls go well before one fails."""
    left = Path(__file__).with_name("calls_left")
    count = int(left.read_text()) if left.exists() else 10**6
    left.write_text(str(count - 1))
    if count == 0:
        raise RuntimeError("the scorer is down")
    return images[:, 0].flatten(1).mean(1)
'''


def train(settings: dict[str, Any]) -> list[dict[str, Any]]:
    config_class, trainer_class = load_method("rwr")
    folder: Path = trainer_class(config_class(**settings)).train()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def flaky(tmp_path: Path) -> Any:
    """Sets after how many batches the reward fails once; returns the reward's name."""

    def fail_after(batches: int) -> list[str]:
        (tmp_path / "flaky.py").write_text(FLAKY)
        (tmp_path / "calls_left").write_text(str(batches))
        return [f"{tmp_path}/flaky.py:score"]

    return fail_after


def test_stop_loses_nothing(online_settings: Any, flaky: Any, tmp_path: Path) -> None:
    whole = train(online_settings(rewards=flaky(10**6), output_dir=str(tmp_path / "whole")))
    run = str(tmp_path / "stopped")
    # Two batches a rollout: the second rollout fails on its second.
    with pytest.raises(RewardError, match="the scorer is down"):
        train(online_settings(rewards=flaky(3), output_dir=run))
    resumed = train(online_settings(rewards=flaky(10**6), output_dir=run, resume_from_checkpoint="latest"))
    assert [row["reward"] for row in resumed] == [row["reward"] for row in whole]
    ours, theirs = (
        load_file(Path(folder) / "pytorch_lora_weights.safetensors") for folder in (run, tmp_path / "whole")
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_retry_goes_on_as_if_nothing_had_happened(
    online_settings: Any, flaky: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    whole = train(online_settings(rewards=flaky(10**6), output_dir=str(tmp_path / "whole")))
    retried = train(online_settings(rewards=flaky(3), on_reward_failure="retry", output_dir=str(tmp_path / "retried")))
    assert [row["reward"] for row in retried] == [row["reward"] for row in whole]


def test_drop_leaves_the_images_out_and_counts_them(online_settings: Any, tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text(
        "import torch\n"
        "from diffalign.rewards import Reward, RewardOutput\n"
        "class Some(Reward):\n"
        "    name, uses_prompt = 'some', False\n"
        "    def score(self, images, prompts, metadata):\n"
        "        ok = torch.arange(len(images)) > 0\n"
        "        values = images[:, 0].flatten(1).mean(1)\n"
        "        return RewardOutput(values, valid=ok, messages=[None if o else 'unreadable' for o in ok.tolist()])\n"
    )
    rows = train(online_settings(rewards=[f"{tmp_path}/first.py:Some"], on_reward_failure="drop"))
    assert [row["failed_images"] for row in rows] == [0.25] * 4
    assert all(torch.isfinite(torch.tensor([row["reward"], row["loss"]])).all() for row in rows)

"""Tables of learning from rewards: what is in bold, and how many images a method needs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

Script = Callable[[str], ModuleType]
JUDGES = ("shapes-checker", "shapes-annotator", "jpeg_compressibility", "shapes-clip")


def record(method: str, seed: int, gain: float, low: float, rewards: list[float], **more: Any) -> dict[str, Any]:
    """A run whose curve has a point every 128 images, all scores by all samplers alike."""
    points = [{"step": i, "images": 128 * i, "seconds": 2.0 * i, "shapes-checker": r} for i, r in enumerate(rewards)]
    change = {way: {name: [gain, low, 2 * gain - low] for name in JUDGES} for way in ("ddpm 10", "ddim 10", "ddim 25")}
    return {
        "experiment": "checker",
        "method": method,
        "seed": seed,
        "trained_reward": "shapes-checker",
        "change": change,
        "curve": points,
        "images": points[-1]["images"],
        "heldout_images": 8,
        "reward_share": 0.05,
        "machine": "a machine",
        "versions": {"torch": "1"},
        **more,
    }


@pytest.fixture
def table(script: Script, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., str]:
    tables = script("rewards_tables")
    monkeypatch.setattr(tables, "PICTURES", tmp_path)
    return lambda *records: str(tables.rewards_tables(list(records)))


def test_bold_is_what_every_seed_shows(table: Callable[..., str], tmp_path: Path) -> None:
    text = table(
        record("awm", 0, 0.05, 0.02, [0.7, 0.75]),
        record("awm", 1, 0.03, 0.01, [0.7, 0.73]),
        record("ddpo", 0, 0.05, 0.02, [0.7, 0.75]),
        record("ddpo", 1, 0.01, -0.01, [0.7, 0.71]),
    )
    assert "| awm | 2 | 128 | **+0.040 [+0.030, +0.050]** |" in text
    assert "| ddpo | 2 | 128 | +0.030 [+0.010, +0.050] |" in text
    assert "| ddpo | 1 | +0.010 [-0.010, +0.030] |" in text
    assert (tmp_path / "shapes-rewards-checker.svg").exists()


def test_images_for_the_same_reward_are_read_off_the_mean_curves(table: Callable[..., str]) -> None:
    text = table(
        record("awm", 0, 0.1, 0.05, [0.7, 0.8, 0.9]),
        record("ddpo", 0, 0.1, 0.05, [0.7, 0.7, 0.8]),
        record("rwr", 0, 0.0, -0.05, [0.7, 0.7, 0.7]),
    )
    assert "at 0.8, the lower of the best of AWM and DDPO: awm 128, ddpo 256, rwr never." in text
    assert "DDPO / AWM: 2.00 in images, 2.00 in time." in text

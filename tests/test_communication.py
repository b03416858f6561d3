"""The arithmetic of docs/scaling.md: bytes by hand, and the page is what the script prints of today's estimates."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from diffalign.app.estimate import read
from diffalign.estimation.cards import find_card, load_calibration
from diffalign.estimation.estimate import estimate

ROOT = Path(__file__).parent.parent
FULL = ("sdxl-dpo-1x80gb", "H100", ["--train_mode", "full", "--no_save_comfyui_lora", "--gradient_checkpointing"])
RUNS = {
    "LoRA r 8, DDP": ("sdxl-dpo-1x24gb", "RTX 4090", []),
    "LoRA r 64, DDP": ("sdxl-dpo-1x80gb", "H100", []),
    "all, DDP": FULL,
    "all, ZeRO-2": FULL,
    "all, FSDP2": FULL,
}
"""What each step is estimated for; the weights of the last two are shared out between 8 cards."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("communication", ROOT / "scripts" / "communication.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bytes_by_hand(script: ModuleType) -> None:
    # 1000 numbers on 4 cards: three quarters of 4000 bytes, to be added up and to be sent back, once a step.
    assert script.exchanged(1000, "DDP", 4, 16) == 2 * 3000
    # In each of 16 micro-batches: three times 2 bytes and once 4 for each number; ZeRO-2 has one gathering less.
    assert script.exchanged(1000, "FSDP2", 4, 16) == 16 * 750 * (3 * 2 + 4)
    assert script.exchanged(1000, "ZeRO-2", 4, 16) == 16 * 750 * (2 * 2 + 4)
    assert script.exchanged(1000, "DDP", 1, 16) == 0, "one card has nobody to send to"


@pytest.mark.slow
def test_the_page_has_the_table_of_the_script(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    script.main()
    assert capsys.readouterr().out in (ROOT / "docs" / "scaling.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_steps_take_as_long_as_estimated(name: str, script: ModuleType) -> None:
    from diffalign.training.work import sharded

    recipe, card, flags = RUNS[name]
    shared = name.endswith(("ZeRO-2", "FSDP2"))
    config, work = read(recipe, flags, processes=8 if shared else 1)
    found = sharded(work(config), 8, stay_together=name.endswith("ZeRO-2")) if shared else work(config)
    seconds = estimate(found, find_card(card), load_calibration()).step_seconds
    assert seconds == pytest.approx(script.STEPS[name], abs=0.06)

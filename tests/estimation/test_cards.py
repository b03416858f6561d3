"""Cards: which one is meant, by what a person types and by what a driver says; and what is assumed of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from diffalign.errors import UserError
from diffalign.estimation.cards import CALIBRATION, cards, find_card, load_calibration


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("h100", "H100"),
        ("A10", "A10"),
        ("4060 ti", "RTX 4060 Ti 16GB"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA L40", "L40"),
    ],
)
def test_a_card_is_found_by_what_people_and_drivers_call_it(said: str, meant: str) -> None:
    assert find_card(said).name == meant


@pytest.mark.parametrize(
    "said", ["NVIDIA GeForce RTX 3080 Ti", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 NVL", "RTX 3060 8GB", ""]
)
def test_another_card_is_not_taken_for_one_that_is_known(said: str) -> None:
    with pytest.raises(UserError, match="--memory_gb"):
        find_card(said)


def test_an_unknown_card_names_the_nearest_and_the_others() -> None:
    with pytest.raises(UserError, match=r"Did you mean 'RTX 4090'\?") as caught:
        find_card("rtx 4091")
    assert all(name in str(caught.value) for name in cards())
    with pytest.raises(UserError, match="is any of A100 40GB, A100 80GB") as caught:
        find_card("a100")
    assert "RTX" not in str(caught.value)


def test_every_card_can_be_told_apart_and_holds_less_than_its_name_says() -> None:
    for name, card in cards().items():
        assert find_card(name) is card and find_card(f"NVIDIA {name}") is card
        assert card.flops is not None and 1e13 < card.flops < 2e15
        assert card.bandwidth is not None and 1e11 < card.bandwidth < 1e13
        if size := re.search(r"(\d+)GB", name):
            # CUDA keeps a part for itself, and no more than a few percent.
            assert 0.95 * int(size.group(1)) < card.memory / 2**30 < int(size.group(1))


def test_factors_are_those_of_the_card_and_else_one(tmp_path: Path) -> None:
    values = json.loads(CALIBRATION.read_text())
    values["cards"] = {"H200": {"time": 1.25, "memory": 1.1, "results": 3}}
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(values))
    found = load_calibration(path)
    assert (found.factor("H200", "time"), found.factor("H200", "memory")) == (1.25, 1.1)
    assert found.factor("H100", "time") == found.factor("H100", "memory") == 1


def test_what_is_assumed_is_believable() -> None:
    found = load_calibration()
    assert 0.2 < found.matmul_efficiency < 0.9 and 0.4 < found.bandwidth_efficiency < 1
    assert 0 < found.fragmentation < 0.3 and 0.3 < found.reserve_gib < 2
    assert 1 < found.launch_microseconds < 20

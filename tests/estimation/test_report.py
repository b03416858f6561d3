"""What is said of an estimate: in tables, in one line, and to programs."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from diffalign.estimation.cards import Calibration, Card, load_calibration
from diffalign.estimation.estimate import Estimate, PhaseEstimate
from diffalign.estimation.report import as_dict, duration, one_line, report
from diffalign.estimation.work import Model, Work

GIB = 2**30


def made(**changes: Any) -> Estimate:
    """2.5 and 4 GiB in two phases, a step of 2 seconds for 8 pairs, on a card of 6 GiB."""
    phases = (
        PhaseEstimate("caching", {"vae weights": 2 * GIB, "work space": GIB // 2}, {}),
        PhaseEstimate("step", {"vae weights": 3 * GIB, "activations": GIB}, {"policy": 1.5, "optimiser": 0.5}),
    )
    given: dict[str, Any] = {
        "work": Work(Model("m", rank=7, height=512, width=768), (), samples_per_step=8, unit="pair", steps=3600),
        "card": Card("a card", 6 * GIB, 1e12, 1e11),
        "phases": phases,
        "trained": 1234567,
        "source": "here",
        "memory_factor": 1.0,
        "time_factor": 1.0,
        "needed": 5 * GIB,
        "flops": 3e12,
    }
    return Estimate(**{**given, **changes})


def lines(text: str, start: str) -> list[str]:
    """The words of the first line that starts so."""
    return next(line.split() for line in text.splitlines() if line.strip().startswith(start))


def test_the_tables_hold_every_phase_and_pass() -> None:
    text = report(made(), load_calibration())
    assert lines(text, "GiB") == ["GiB", "caching", "step"]
    assert lines(text, "vae weights")[-2:] == ["2.00", "3.00"]
    assert lines(text, "work space")[-2:] == ["0.50", "-"] and lines(text, "activations")[-2:] == ["-", "1.00"]
    assert lines(text, "peak") == ["peak", "2.50", "4.00"]
    assert lines(text, "policy") == ["policy", "1.500", "75%"]
    assert "4.00 pairs a second; 3.0 TFLOP a step; 3,600 steps take 2.0 h" in text
    for words in ("m, 512 x 768; shapes from here", "1,234,567 parameters (LoRA rank 7)", "a card, 6.0 GiB"):
        assert words in text
    assert "fits: needs 5.0 of 6.0 GiB" in text


def test_a_run_that_does_not_fit_says_what_would() -> None:
    large = made(needed=7 * GIB)
    text = report(large, load_calibration(), [("rank: 4", made()), ("resolution: 512", made(needed=4 * GIB))])
    assert "does not fit: needs 7.0 of 6.0 GiB, most in the phase 'step'." in text
    assert "  rank: 4  (5.0 GiB, 4.00 pairs/s)\n  resolution: 512  (4.0 GiB, 4.00 pairs/s)" in text
    assert "No setting that was tried" in report(large, load_calibration())
    assert "No setting" not in text and "fits: needs" not in text.replace("does not fit: needs", "")


def test_a_card_without_a_speed_has_no_table_of_times() -> None:
    text = report(made(card=Card("a card", 6 * GIB)), load_calibration())
    assert "seconds" not in text and "a second" not in text and "peak" in text


def test_the_error_is_stated() -> None:
    """What was measured against on a CPU, or the error that is left on a card that was calibrated."""
    plain = load_calibration()
    text = report(made(), plain)
    assert "not calibrated on this card" in text
    assert f"within {plain.memory_error:.1%}" in text and f"{plain.time_error:.0%} off" in text
    factors = {"results": 12, "time": 1.3, "time_error": 0.08, "memory": 0.95, "memory_error": 0.03}
    learnt: Calibration = replace(plain, cards={"a card": factors})
    text = report(made(), learnt)
    assert "12 results" in text and "time 1.30 (error after it 8%), memory 0.95 (error 3%)" in text
    assert "not calibrated" not in text


def test_times_are_scaled_as_they_were_measured() -> None:
    text = report(made(time_factor=2.0), load_calibration())
    assert lines(text, "policy") == ["policy", "3.000", "75%"] and "2.00 pairs a second" in text


@pytest.mark.parametrize(
    ("samples", "said"),
    [(8, "4.0 GiB; 4.00 pairs/s on one a card"), (0.1, "4.0 GiB; 20 s for one pair on one a card")],
)
def test_one_line(samples: Any, said: str) -> None:
    assert one_line(made(work=replace(made().work, samples_per_step=samples))) == said


def test_one_line_of_a_card_without_a_speed() -> None:
    assert one_line(made(card=Card("a card", 6 * GIB))) == "4.0 GiB"


def test_programs_are_told_the_same_in_bytes_and_seconds() -> None:
    option = ("rank: 4", made(needed=4 * GIB))
    found = json.loads(json.dumps(as_dict(made(memory_factor=1.5), [option])))
    assert found["would_fit_with"] == [{"settings": "rank: 4", "needed_bytes": 4 * GIB, "pairs_per_second": 4}]
    assert found["peak_bytes"] == 6 * GIB and found["needed_bytes"] == 5 * GIB and found["card_bytes"] == 6 * GIB
    assert found["fits"] is True and found["calibrated"] is True
    assert found["step_seconds"] == 2 and found["pairs_per_second"] == 4 and found["run_seconds"] == 7200
    assert found["tflop_per_step"] == 3 and found["trained_parameters"] == 1234567
    assert found["phases"]["step"] == {
        "memory": {"vae weights": 3 * GIB, "activations": GIB},
        "seconds": {"policy": 1.5, "optimiser": 0.5},
    }
    assert as_dict(made())["calibrated"] is False
    assert as_dict(made(card=Card("a card", GIB)))["fits"] is False


@pytest.mark.parametrize(
    ("seconds", "said"), [(0.25, "0.25 s"), (61, "61 s"), (120, "2 min"), (7140, "119 min"), (7200, "2.0 h")]
)
def test_durations_are_in_the_unit_a_person_would_take(seconds: float, said: str) -> None:
    assert duration(seconds) == said

"""`diffalign estimate`: what it reads, what it says, and that what it advises fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign import cli
from diffalign.app.calibrate import calibrate
from diffalign.app.estimate import choose_card, read
from diffalign.errors import UserError
from diffalign.estimation.cards import CALIBRATION, Card, cards, find_card, load_calibration
from diffalign.estimation.estimate import estimate
from diffalign.recipes import names
from diffalign.trainers import METHODS
from diffalign.training.fitting import what_would_fit

MIB = 2**20


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["estimate", *words, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_estimated(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"shapes-{method}" if f"shapes-{method}" in names() else f"shapes-{method.replace('_', '-')}"
    found = run(capsys, source, "--card", "RTX 4090")
    assert found["fits"] and found["trained_parameters"] > 1000
    assert found["step_seconds"] > 0 and found["tflop_per_step"] > 0
    assert found["peak_bytes"] == max(sum(p["memory"].values()) for p in found["phases"].values())
    reference = found["phases"]["step"]["seconds"].get("reference", 0)
    assert (reference > 0) == (method not in ("mapo", "orpo", "cpo", "sft", "rwr", "ddpo", "reward_gradient")), (
        reference
    )


def test_flags_change_the_run_and_a_table_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    small = run(capsys, "shapes-dpo", "--memory_gb", "8", "--train_batch_size", "8")
    large = run(capsys, "shapes-dpo", "--memory_gb", "8", "--train_batch_size", "64")
    assert small["peak_bytes"] < large["peak_bytes"]
    assert large["step_seconds"] is None, "a card of which only the memory is known has no speed"
    assert cli.main(["estimate", "shapes-dpo", "--card", "h100"]) == 0
    text = capsys.readouterr().out
    for word in ("denoiser weights", "optimiser state", "activations", "seconds of a step", "fits:", "not calibrated"):
        assert word in text


def test_a_run_that_does_not_fit_is_told_what_would_and_that_is_true() -> None:
    config, work = read("shapes-dpo", ["--validation_prompts", "none", "--no_cache_latents"])
    calibration = load_calibration()
    whole = estimate(work(config), Card("any", 1e12), calibration)
    reserve = calibration.reserve_gib * 2**30
    small = Card("small", reserve + 0.5 * (whole.needed - reserve))
    assert not estimate(work(config), small, calibration).fits
    options = what_would_fit(config, work, small, calibration)
    assert options and options[0][0] == "gradient_checkpointing: true"
    assert all(found.fits for _, found in options)


def test_the_command_says_what_would_fit_and_then_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["shapes-dpo", "--memory_gb", "1", "--train_batch_size", "64", "--validation_prompts", "none"]
    assert cli.main(["estimate", *words]) == 0
    text = capsys.readouterr().out
    assert "does not fit: needs" in text and "in the phase 'step'" in text
    assert "It would with:\n  gradient_checkpointing: true  (" in text
    found = run(capsys, *words)
    assert not found["fits"]
    first = found["would_fit_with"][0]
    assert first["settings"] == "gradient_checkpointing: true" and first["needed_bytes"] < found["card_bytes"]
    better = run(capsys, *words, "--gradient_checkpointing")
    assert better["fits"] and better["would_fit_with"] == [] and better["needed_bytes"] == first["needed_bytes"]


def test_an_unknown_card_is_an_error_that_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "shapes-dpo", "--card", "rtx 4091"]) == 2
    assert "Did you mean 'RTX 4090'?" in capsys.readouterr().err


def test_two_passes_need_less_than_one() -> None:
    config, work = read("shapes-dpo", ["--no_gradient_checkpointing"])
    apart, _ = read("shapes-dpo", ["--no_gradient_checkpointing", "--two_pass_gradient"])
    calibration, card = load_calibration(), find_card("H100")
    one, two = (estimate(work(c), card, calibration) for c in (config, apart))
    of = [next(p for p in e.phases if p.name == "step").memory["activations"] for e in (one, two)]
    assert of[1] == pytest.approx(of[0] / 2, rel=0.05)
    assert two.flops > one.flops and two.work.samples_per_step == one.work.samples_per_step


def test_full_fine_tuning_counts_all_that_it_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    found = run(capsys, "shapes-dpo", "--memory_gb", "8", "--train_mode", "full", "--use_ema")
    memory = found["phases"]["step"]["memory"]
    weights = 4 * found["trained_parameters"]
    assert memory["trained weights"] == memory["gradients"] == memory["reference copy"] == weights
    assert memory["slow copies"] == weights and memory["optimiser state"] == 2 * weights
    assert "denoiser weights" not in memory
    less = run(capsys, "shapes-dpo", "--memory_gb", "8", "--train_mode", "full", "--optimizer", "adafactor")
    assert "optimiser state" not in less["phases"]["step"]["memory"]


def test_which_card_is_meant(capsys: pytest.CaptureFixture[str]) -> None:
    assert find_card("4090").name == "RTX 4090" and find_card("NVIDIA H100").name == "H100"
    assert find_card("NVIDIA A100 80GB").memory > 2 * find_card("RTX 5090").memory
    with pytest.raises(UserError, match="A100 40GB, A100 80GB"):
        find_card("A100")
    with pytest.raises(UserError, match="--memory_gb"):
        find_card("Voodoo 2")
    assert choose_card(None, None, "sdxl-dpo-1x24gb").memory / 2**30 == pytest.approx(23.4)
    with pytest.raises(UserError, match="--card"):
        choose_card(None, None, "shapes-dpo")
    assert cli.main(["estimate", "--card", "list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cards())


@pytest.mark.parametrize("recipe", ["shapes-eval", "shapes-reward", "clip-h-reward-1x24gb"])
def test_what_is_no_training_of_a_diffusion_model_is_refused(recipe: str) -> None:
    with pytest.raises(UserError, match="no config of a training run"):
        read(recipe)


def test_a_mistyped_flag_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "shapes-dpo", "--memory_gb", "8", "--train_batch", "8"]) == 2
    assert "train_batch_size" in capsys.readouterr().err


def test_calibration_learns_the_factors_of_a_card(tmp_path: Path) -> None:
    card, plain = find_card("H200"), load_calibration()
    rows = []
    for batch, checkpointing in ((1, "none"), (2, "full")):
        row = {"method": "dpo", "resolution": 64, "batch_size": batch, "rank": 4, "mode": "eager"}
        flags = ["--resolution", "64", "--train_batch_size", str(batch), "--rank", "4", "--mixed_precision", "bf16"]
        flags += ["--gradient_accumulation_steps", "1"] + ["--gradient_checkpointing"] * (checkpointing == "full")
        config, work = read("shapes-dpo", flags)
        step = next(p for p in estimate(work(config), card, plain).phases if p.name == "step")
        row |= {"step_seconds": 1.5 * sum(step.seconds.values()), "peak_gb": 1.1 * step.peak / 1e9}
        rows.append({**row, "checkpointing": checkpointing})
    rows.append({**rows[0], "out_of_memory": True})
    results, out = tmp_path / "results.json", tmp_path / "calibration.json"
    record = {"card": "NVIDIA H200", "model": "shapes-sdxl", "settings": {}, "rows": rows}
    results.write_text(json.dumps([{**record, "card": "NVIDIA Voodoo 2"}, record]))
    out.write_bytes(CALIBRATION.read_bytes())
    said, left_out = calibrate(results, out)
    assert said.startswith("H200: 2 results") and "'NVIDIA Voodoo 2' is not one of" in left_out
    learnt = load_calibration(out)
    assert learnt.cards["H200"]["results"] == 2
    assert learnt.factor("H200", "time") == pytest.approx(1.5, rel=1e-3)
    assert learnt.factor("H200", "memory") == pytest.approx(1.1, rel=1e-3)
    before, after = (estimate(work(config), card, c) for c in (plain, learnt))
    assert before.step_seconds is not None and after.step_seconds is not None
    assert after.step_seconds == pytest.approx(1.5 * before.step_seconds, rel=1e-3)
    assert after.peak == pytest.approx(1.1 * before.peak, rel=1e-3)
    with pytest.raises(UserError, match="no row"):
        results.write_text(json.dumps([{"card": "CPU", "rows": rows}]))
        calibrate(results, out)


def test_the_bundled_calibration_is_complete() -> None:
    assert set(json.loads(CALIBRATION.read_text())["cards"]) <= set(cards())


def test_weights_that_are_shared_out(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("shapes-dpo", "--memory_gb", "8", "--train_mode", "full")
    alone, fsdp2, zero2 = (
        run(capsys, *flags, *more)["phases"]["step"]["memory"]
        for more in ((), ("--num_processes", "4", "--shard", "fsdp2"), ("--num_processes", "4", "--shard", "zero2"))
    )
    for name in ("trained weights", "gradients", "optimiser state", "reference copy"):
        assert fsdp2[name] == zero2[name] == pytest.approx(alone[name] / 4, abs=8)
    assert 0 < fsdp2["weights brought together"] < zero2["weights brought together"]
    assert zero2["weights brought together"] > alone["trained weights"]
    assert cli.main(["estimate", "shapes-dpo", "--memory_gb", "8", "--num_processes", "4", "--shard", "fsdp2"]) == 2
    assert "--train_mode full" in capsys.readouterr().err

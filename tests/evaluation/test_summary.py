from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffalign.evaluation.comparisons import Scores, Variant
from diffalign.evaluation.curves import read_curves
from diffalign.evaluation.eval_config import EvalConfig
from diffalign.evaluation.examples import spread
from diffalign.evaluation.plots import draw_plots
from diffalign.evaluation.report import render
from diffalign.evaluation.summary import Diversities, summarise

N = 40
BASE = Variant("base", 5.0, 8)


def config(**more: Any) -> EvalConfig:
    return EvalConfig(pretrained_model_name_or_path="m", output_dir="o", rewards=["r"], bootstrap_draws=50, **more)


def table(means: dict[Variant, tuple[float, ...]], rewards: tuple[str, ...] = ("r",)) -> list[Scores]:
    """Scores of N prompts around the given means, one for each reward."""
    noise = np.random.default_rng(0).normal(size=(len(rewards), len(means), N)) * 0.05
    return [
        Scores(reward, {v: noise[i, k] + m[i] for k, (v, m) in enumerate(means.items())}, np.arange(N), [""] * N)
        for i, reward in enumerate(rewards)
    ]


def summary(scores: list[Scores], roles: dict[str, str] | None = None, **more: Any) -> dict[str, Any]:
    rewards = [
        {"name": one.reward, "identity": f"{one.reward}/1/x", "role": (roles or {}).get(one.reward, "")}
        for one in scores
    ]
    given: dict[str, Any] = {"diversities": None, "distances": {}, "curves": [], "config": config(), **more}
    return summarise(scores, rewards=rewards, **given)


def test_sweeps_of_steps_and_scales_have_tables_and_plots(tmp_path: Path) -> None:
    few = {Variant("base", 5.0, n): (0.1 * n,) for n in (1, 8)}
    scaled = {Variant(f"dpo at {s:g}", 5.0, 8, "dpo", s): (0.8 + s,) for s in (0.5, 1.0)}
    scores = table({**few, **scaled})
    found = summary(scores)
    assert [(row["model"], row["at"]) for row in found["sweeps"]["steps"]] == [("base", [1, 8])]
    assert [(row["model"], row["at"], row["best"]) for row in found["sweeps"]["scale"]] == [
        ("dpo, 8 steps", [0.5, 1.0], 1.0)
    ]
    assert found["sweeps"]["guidance"] == [] == found["sweeps"]["trained"]
    assert {row["setting"] for row in found["comparisons"]["equal"]} == {"guidance 5, 8 steps"}
    names = draw_plots(tmp_path, found, scores, [])
    assert {"steps.png", "scale.png"} <= set(names) and "guidance.png" not in names
    text = render(found, [f"plots/{name}" for name in names])
    assert (
        "## Numbers of steps" in text
        and "| reward | model | 1 | 8 | best |" in text
        and "## Scales of the LoRA" in text
    )
    # Points of one LoRA at its scales are one line of the trade-offs.
    both = table({BASE: (0.0, 0.0), **dict.fromkeys(scaled, (1.0, 1.0))}, ("r", "s"))
    lines = summary(both)["fronts"][0]
    assert [(point["line"], point["at"]) for point in lines["points"]] == [("base", ""), ("dpo", "0.5"), ("dpo", "1")]


def test_over_optimisation_is_seen_over_checkpoints(tmp_path: Path) -> None:
    """The trained reward rises all the way, the held-out one until step 20."""
    means = {BASE: (0.0, 0.0)} | {
        Variant(f"run/checkpoint-{step}", 5.0, 8, run="run", trained=step): (step / 10, held)
        for step, held in ((40, 0.2), (10, 0.5), (20, 1.0), (30, 0.6))
    }
    scores = table(means, ("trained", "judge"))
    found = summary(scores, {"trained": "trained on", "judge": "held out"})
    rows = {row["reward"]: row for row in found["sweeps"]["trained"]}
    assert rows["judge"]["at"] == [10, 20, 30, 40] and rows["judge"]["best"] == 20 and rows["trained"]["best"] == 40
    assert any("run: judge, held out, falls after step 20 while trained, trained on" in w for w in found["warnings"])
    assert "trained.png" in draw_plots(tmp_path, found, scores, [])
    assert "## Over training" in render(found)
    assert not any("falls after" in line for line in summary(scores)["warnings"]), "nobody knows which was trained on"


def test_consistency_diversity_and_realism_are_traded_off_in_pairs() -> None:
    variants = [Variant("base", g, 8) for g in (1.0, 5.0, 9.0)]
    scores = table({v: (value,) for v, value in zip(variants, (0.0, 1.0, 0.9), strict=True)})
    values = {v: np.full(N, value) for v, value in zip(variants, (0.5, 0.4, 0.1), strict=True)}
    distances = {
        v: {"fid": 1.0, "kid": value, "kid_std": 0.0} for v, value in zip(variants, (0.3, 0.1, 0.2), strict=True)
    }
    found = summary(
        scores, diversities=Diversities(range(N), {"distance": values, "lpips": values}), distances=distances
    )
    fronts = {(f["x"], f["y"]): [p["x"] for p in f["points"] if p["front"]] for f in found["fronts"]}
    assert fronts[("diversity", "r")] == pytest.approx([0.5, 0.4])
    assert fronts[("realism (-KID)", "r")] == pytest.approx([-0.1])
    assert fronts[("diversity", "realism (-KID)")] == pytest.approx([0.5, 0.4])
    text = render(found)
    assert "CLIP distance | LPIPS |" in text and "| FID | KID |" in text and "features of inception" in text


def test_changes_of_diversity_are_against_the_same_settings() -> None:
    tuned = Variant("dpo", 5.0, 8)
    scores = table({BASE: (0.0,), tuned: (0.1,)})
    measures = {
        "distance": {BASE: np.full(N, 0.4), tuned: np.full(N, 0.3)},
        "vendi": {BASE: np.full(N, 2.0), tuned: np.full(N, 1.5)},
        "lpips": {BASE: np.full(N, 0.6), tuned: np.full(N, 0.5)},
    }
    found = summary(scores, diversities=Diversities(range(N), measures))
    (row,) = found["diversity"]
    assert row["changes"]["distance"]["mean"] == pytest.approx(-0.1) == row["changes"]["lpips"]["mean"]
    assert row["vendi_ratio"] == 0.75 and any("lost 25% of the Vendi score" in line for line in found["warnings"])
    assert "-0.1000 [-0.1000, -0.1000]" in render(found)
    alone = summary(scores, diversities=Diversities(range(N), {"lpips": measures["lpips"]}))
    assert "LPIPS" in render(alone) and "Vendi, ratio" not in render(alone)


def test_a_run_without_rewards_shows_its_loss(tmp_path: Path) -> None:
    run = tmp_path / "dpo"
    run.mkdir()
    rows = (
        f'{{"step": {k}, "loss": {0.7 - k / 1000}, "margin": {k / 100}, "grad_norm": 1.0}}\n' for k in range(1, 61)
    )
    (run / "metrics.jsonl").write_text("".join(rows))
    (curves,) = read_curves([run])
    assert set(curves.shown) == {"loss", "margin"}
    scores = table({BASE: (0.0,)})
    found = summary(scores, curves=[curves])
    assert "training.png" in draw_plots(tmp_path / "plots", found, scores, [curves])
    # Of the last three steps, a twentieth of them.
    assert "- dpo: 60 steps; loss from 0.699 to 0.641, margin from 0.01 to 0.59" in render(found)


def test_examples_are_spread_over_the_order() -> None:
    values = np.array([0.3, np.nan, 0.9, -0.5, 0.1, 0.0, 0.2])
    assert spread(values, 3) in ([2, 6, 3], [2, 4, 3])
    assert spread(values, 99) == [2, 0, 6, 4, 5, 3] and spread(np.array([np.nan]), 3) == []

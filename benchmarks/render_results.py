#!/usr/bin/env python
"""Write docs/results.md from the committed results: ``python benchmarks/render_results.py``."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

from bench_record import last
from distil_tables import distil_step_table, distil_tables
from rewards_tables import rewards_tables, rollout_table
from speed_tables import estimate_error_table, rate_tables, startup_table, step_tables

ROOT = Path(__file__).parent
RESULTS = ROOT / "results"
PAGE = ROOT.parent / "docs" / "results.md"

HEAD = """# Results

Everything on this page is written by `python benchmarks/render_results.py` from the files in `benchmarks/results/`.
"""


def methods_table(records: list[dict[str, Any]]) -> str:
    """The tables of ``benchmarks/shapes_methods.py``: a row for each method, then one for each run."""
    first = records[0]
    lines = [
        "## Methods on the shapes world",
        "",
        "Mean over the seeds, and in brackets the lowest and the highest. A step is given relative to one of "
        "DPO, taken in turns in one process (`python benchmarks/method_steps.py`); memory is the peak of the run.",
        "",
        "| method | pairs | seeds | checker | win rate by checker | win rate by annotators | policy passes | "
        "a step, of DPO's | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
        *summary_rows(records),
        "",
        "Each run:",
        "",
        f"{first['images']} held-out prompts, one image each and model, same seeds for both ({samplings(records)}). "
        "Win rate of the aligned model against the base, ties half, with its 95 % Wilson interval: by the checker "
        "(facts of the caption that hold) and by the simulated annotators (who made the preference pairs).",
        "",
        "| method | seed | checker: base | aligned | win rate by checker | win rate by annotators | steps | "
        "policy passes | peak memory |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        lines.append(
            f"| {label(r)} | {r['seed']} | {r['base_checker_score']:.3f} | {r['checker_score']:.3f} | "
            f"{interval(r['win_rate_checker'])} | {interval(r['win_rate_annotator'])} | {r['steps']} | "
            f"{r['policy_forward_passes']:,} | {memory_of([r])} |"
        )
    lines += [
        "",
        "```",
        *commands(records),
        "```",
        "",
        f"Machine: {first['machine']}. " + ", ".join(f"{k} {v}" for k, v in first["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def commands(records: list[dict[str, Any]]) -> list[str]:
    """What to run for the records, a line for each set of pairs, of other settings and of runs trained before."""

    def kind(record: dict[str, Any]) -> tuple[str, str, str]:
        return data_of(record), flags_of(record), str(record.get("trained", ""))

    lines = []
    for data, flags, trained in sorted(set(map(kind, records))):
        own = [r for r in records if kind(r) == (data, flags, trained)]
        methods = " ".join(dict.fromkeys(r["method"] for r in own))
        seeds = " ".join(str(s) for s in sorted({r["seed"] for r in own}))
        lines.append(
            f"python benchmarks/shapes_methods.py --methods {methods} --seeds {seeds} "
            + ("" if data in ("shapes-pairs", "shapes-train") else f"--dataset_name {data} ")
            + (f"--trained '{trained}' " if trained else "")
            + "--out benchmarks/results/shapes_methods.json"
            + (f" {flags}" if flags else "")
        )
    return lines


def data_of(record: dict[str, Any]) -> str:
    """The pairs of a record."""
    return str(record.get("data", "shapes-pairs"))


def flags_of(record: dict[str, Any]) -> str:
    """The settings of a record that are not its recipe's."""
    return str(record.get("flags", ""))


def summary_rows(records: list[dict[str, Any]]) -> list[str]:
    """One row for each method and its pairs, in the order of the records."""
    runs: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        runs.setdefault((record["method"], data_of(record), flags_of(record)), []).append(record)
    # Runs shared their machine with other work; steps were timed beside each other, by benchmarks/method_steps.py.
    path = RESULTS / "method_steps.json"
    steps = json.loads(path.read_text())["methods"] if path.exists() else {}
    lines = []
    for (method, data, flags), group in runs.items():
        checker, by_checker, by_annotators = (
            spread([value(r) for r in group])
            for value in (
                lambda r: r["checker_score"],
                lambda r: r["win_rate_checker"][0],
                lambda r: r["win_rate_annotator"][0],
            )
        )
        passes = mean(r["policy_forward_passes"] for r in group)
        step = f"{steps[method]['ratio']:.2f}" if method in steps else ""
        lines.append(
            f"| {' '.join([method, flags]).strip()} | {Path(data).name} | {len(group)} | {checker} | {by_checker} | "
            f"{by_annotators} | {passes:,.0f} | {step} | {memory_of(group)} |"
        )
    return lines


def memory_of(records: list[dict[str, Any]]) -> str:
    """Mean peak memory; empty where the runs were trained within another benchmark, which has its own."""
    known = [r["peak_memory_mib"] for r in records if "peak_memory_mib" in r]
    return f"{mean(known):,.0f} MiB" if known else ""


def samplings(records: list[dict[str, Any]]) -> str:
    """How images were drawn; methods that are drawn otherwise than most are named."""
    usual = Counter(r["sampling"] for r in records).most_common(1)[0][0]
    others = dict.fromkeys((r["method"], r["sampling"]) for r in records if r["sampling"] != usual)
    return "; ".join([usual, *(f"{method} in {how}" for method, how in others)])


def label(record: dict[str, Any]) -> str:
    """The method, and its pairs where they are not the bundled ones."""
    data, name = data_of(record), " ".join([record["method"], flags_of(record)]).strip()
    return name if data == "shapes-pairs" else f"{name} on {Path(data).name}"


def spread(values: list[float]) -> str:
    """mean [lowest, highest]"""
    return interval([mean(values), min(values), max(values)])


def interval(values: list[float]) -> str:
    """rate [low, high]"""
    rate, low, high = values
    return f"{rate:.3f} [{low:.3f}, {high:.3f}]"


def step_time_table(result: dict[str, Any]) -> str:
    """The table of ``benchmarks/step_time.py``."""
    lines = [
        "## The loop against a bare loop",
        "",
        "The same forward and backward passes and optimiser steps, with nothing around them, side by side in one run: "
        f"steps of {result['batch_size']} pairs or images taken in turns, medians compared. Methods on rewards are "
        "compared in what follows the drawing.",
        "",
        "| method | bare loop | diffalign | ratio |",
        "|---|---|---|---|",
        *(
            f"| {name} | {row['bare_seconds']:.4f} s | {row['loop_seconds']:.4f} s | {row['ratio']:.3f} |"
            for name, row in result["methods"].items()
        ),
        "",
        f"```\n{result['command']}\n```",
        "",
        f"Machine: {result['machine']}. " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def selection_table(records: list[dict[str, Any]]) -> str:
    """The table of ``benchmarks/shapes_selection.py``."""
    first = records[0]
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda r: (r["k"], r["select"])):
        groups.setdefault((record["k"], record["select"]), []).append(record)
    lines = [
        "## Which of k images to pair",
        "",
        f"The base model draws k images of each of {first['pairs']} training prompts; the simulated annotators score "
        "them, and one pair a prompt is chosen: the best with the worst, or with the one nearest to mu - 2 sigma "
        f"of the prompt's scores. Diffusion-DPO then trains {first['steps']} steps on either. {first['images']} "
        "held-out prompts, as above; mean over seeds, and in brackets the lowest and the highest.",
        "",
        "| k | rejected | gap of the pair | checker of the rejected | seeds | checker | win rate by checker | "
        "win rate by annotators |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (k, select), runs in groups.items():
        rejected = {"best-worst": "worst", "best-sigma": "nearest to mu - 2 sigma"}[select]
        checker, by_checker, by_annotators = (
            spread(values)
            for values in (
                [r["checker_score"] for r in runs],
                [r["win_rate_checker"][0] for r in runs],
                [r["win_rate_annotator"][0] for r in runs],
            )
        )
        lines.append(
            f"| {k} | {rejected} | {runs[0]['mean_gap']:.2f} | {runs[0]['checker_rejected']:.3f} | {len(runs)} | "
            f"{checker} | {by_checker} | {by_annotators} |"
        )
    ks = " ".join(str(k) for k in dict.fromkeys(k for k, _ in groups))
    lines += [
        "",
        "```",
        f"python benchmarks/shapes_selection.py --ks {ks} --inference_steps 15 --images {first['images']} "
        f"--max_train_steps {first['steps']} --out benchmarks/results/shapes_selection.json",
        "```",
        "",
        f"Machine: {first['machine']}. {versions(first)}",
    ]
    return "\n".join(lines) + "\n"


def guidance_table(records: list[dict[str, Any]]) -> str:
    """The table of ``benchmarks/shapes_guidance.py``."""
    first = records[0]
    lines = [
        "## The same models at other guidance",
        "",
        f"The trained models of the first table and the base model, both drawn at this guidance scale in "
        f"{first['inference_steps']} steps; {first['images']} held-out prompts, same seeds; mean over seeds, and in "
        "brackets the lowest and the highest.",
        "",
        "| method | guidance | seeds | checker: base | aligned | win rate by checker | win rate by annotators |",
        "|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault((record["method"], record["guidance"]), []).append(record)
    for (method, guidance), runs in groups.items():
        checker = spread([r["checker_score"] for r in runs])
        by_checker, by_annotators = (
            spread([r[f"win_rate_{judge}"][0] for r in runs]) for judge in ("checker", "annotator")
        )
        lines.append(
            f"| {method} | {guidance:g} | {len(runs)} | {runs[0]['base_checker_score']:.3f} | {checker} | "
            f"{by_checker} | {by_annotators} |"
        )
    methods, seeds, scales = (
        " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in sorted({r[n] for r in records}))
        for n in ("method", "seed", "guidance")
    )
    lines += [
        "",
        "```",
        f"python benchmarks/shapes_guidance.py --methods {methods} --seeds {seeds} --guidance {scales} "
        "--out benchmarks/results/shapes_guidance.json",
        "```",
        "",
        f"Machine: {first['machine']}. {versions(first)}",
    ]
    return "\n".join(lines) + "\n"


def reward_accuracy_table(result: dict[str, Any]) -> str:
    """The table of ``benchmarks/reward_accuracy.py``."""
    judges = {
        "utility of the user who chose, without noise": result["utility_of_the_user"],
        "mean utility of all annotators": result["mean_utility"],
        "checker alone": result["checker"],
        "`shapes-clip`, bundled": result["shapes_clip"],
        **{f"`train-reward` from scratch, seed {r['seed']}": r for r in result["trained"]},
    }
    lines = [
        "## Rewards on held-out pairs",
        "",
        f"Share of the {result['pairs'] - result['ties']} held-out pairs of the shapes world in which the preferred "
        f"picture scores higher, with its 95 % Wilson interval ({result['ties']} ties left out; equal scores count "
        f"half), and rank correlation with the checker over the {result['images']} pictures. The upper rows are what "
        "can be reached: the annotators' own utilities, without the noise of their choices.",
        "",
        "| | accuracy | rank correlation with the checker | best step |",
        "|---|---|---|---|",
    ]
    for name, r in judges.items():
        accuracy = interval([r["rate"], r["low"], r["high"]])
        lines.append(f"| {name} | {accuracy} | {r['rank_correlation_with_checker']:.3f} | {r.get('best_step', '')} |")
    lines += ["", f"```\n{result['command']}\n```", "", f"Machine: {result['machine']}. " + versions(result)]
    return "\n".join(lines) + "\n"


def reward_throughput_table(results: dict[str, Any]) -> str:
    """The table of ``benchmarks/reward_throughput.py``."""
    lines = [
        "## Rewards against a bare forward",
        "",
        "Images a second of a whole reward (checks, resize, tower, remembered prompts, scores) and of a bare forward "
        "of its image tower on ready pixels, at the same batch, calls taken in turns. The ratio is the median over "
        "turns; 1 is no cost.",
        "",
        "| reward | towers | batch | images | bare, images/s | reward, images/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in results["runs"]:
        for name, r in run["rewards"].items():
            lines.append(
                f"| {name} | {run['model']}, {run['dtype']} | {run['batch_size']} | {run['resolution']} px | "
                f"{r['bare_images_per_second']:.2f} | {r['images_per_second']:.2f} | {r['ratio']:.3f} |"
            )
    for run in results["runs"]:
        lines += ["", f"```\n{run['command']}\n```", "", f"{run['machine']}, {run['clock']}. {versions(run)}"]
    return "\n".join(lines) + "\n"


def versions(result: dict[str, Any]) -> str:
    """library version, library version."""
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items()) + "."


def main() -> None:
    parts = [HEAD]
    for name, table in (
        ("shapes_methods", methods_table),
        ("shapes_guidance", guidance_table),
        ("shapes_selection", selection_table),
        ("step_time", lambda results: step_time_table(last(results))),
        ("sdxl_step", step_tables),
        ("rl_rate", rate_tables),
        ("startup", startup_table),
        ("estimate_error", estimate_error_table),
        ("reward_accuracy", reward_accuracy_table),
        ("rollout", lambda results: rollout_table(last(results))),
        ("shapes_rewards", rewards_tables),
        ("shapes_distil", distil_tables),
        ("distil_step", distil_step_table),
        ("reward_throughput", reward_throughput_table),
    ):
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(table(json.loads(path.read_text())))
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text("\n".join(parts))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()

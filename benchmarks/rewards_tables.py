"""The parts of docs/results.md on learning from rewards, of shapes_rewards.json and rollout.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from line_chart import Line, Panel, svg

Record = dict[str, Any]
PICTURES = Path(__file__).parent.parent / "docs" / "images"


def rewards_tables(records: list[Record]) -> str:
    """The tables of ``benchmarks/shapes_rewards.py``; writes the pictures that they show."""
    lines = [
        "## Learning from rewards on the shapes world",
        "",
        "Change of each score from the base model to the result, with its 95 % interval over prompts: "
        f"{records[0]['heldout_images']} held-out prompts, one image each, drawn by plain diffusers at the "
        "run's own guidance. In bold the reward that was trained. Images are those that the run drew to train on. "
        f"{share(records)}",
        "",
        "| experiment | method | seed | images | checker | annotators | jpeg, kB | CLIP |",
        "|---|---|---|---|---|---|---|---|",
        *map(row, records),
    ]
    for experiment, reward in (("checker", "shapes-checker"), ("jpeg", "jpeg_compressibility")):
        group = [r for r in records if r["experiment"] == experiment]
        if group:
            lines += ["", *picture(experiment, reward, group)]
            lines += [text for told in equal_reward(group, reward) for text in ("", told)]
    hacks = [r for r in records if r["experiment"] == "hack"]
    if hacks:
        lines += ["", *hack(hacks)]
    first = records[0]
    lines += [
        "",
        "```",
        "python benchmarks/shapes_rewards.py --out benchmarks/results/shapes_rewards.json",
        "```",
        "",
        f"Machine: {first['machine']}. " + ", ".join(f"{k} {v}" for k, v in first["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def share(records: Sequence[Record]) -> str:
    """The largest share of a run's time that its reward took."""
    known = [(r["reward_share"], r) for r in records if r["reward_share"] is not None]
    if not known:
        return ""
    most, record = max(known, key=lambda pair: pair[0])
    return f"Rewards take {most:.2%} of the time of steps at most (`{record['trained_reward']}`, {record['method']})."


def row(record: Record) -> str:
    cells = []
    for name in ("shapes-checker", "shapes-annotator", "jpeg_compressibility", "shapes-clip"):
        change, low, high = record["change"][name]
        text = f"{change:+.3f} [{low:+.3f}, {high:+.3f}]"
        cells.append(f"**{text}**" if name == record["trained_reward"] else text)
    return (
        f"| {record['experiment']} | {record['method']} | {record['seed']} | {record['images']:,} | "
        + " | ".join(cells)
        + " |"
    )


def by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records of each method, in order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["method"], []).append(record)
    return groups


def line(records: Sequence[Record], x: str, reward: str) -> Line:
    """Mean and range over the seeds, as far as all of them go."""
    points = list(zip(*(r["curve"] for r in records), strict=False))
    values = [[p[reward] for p in at] for at in points]
    return Line(
        [mean(p[x] for p in at) for at in points],
        [mean(v) for v in values],
        [min(v) for v in values],
        [max(v) for v in values],
    )


def picture(experiment: str, reward: str, records: Sequence[Record]) -> list[str]:
    """Writes the curves against images and against time; returns what shows them."""
    axes = {"images": "images drawn", "seconds": "processor seconds of training"}
    panels = [
        Panel(f"{reward}, held-out prompts", label, {m: line(g, x, reward) for m, g in by_method(records).items()})
        for x, label in axes.items()
    ]
    file = PICTURES / f"shapes-rewards-{experiment}.svg"
    file.write_text(svg(panels))
    return [f"![{reward} against images drawn and against time](images/{file.name})"]


def equal_reward(records: Sequence[Record], reward: str) -> list[str]:
    """How many images each method needs for what all of AWM and DDPO reach."""
    groups = {m: line(g, "images", reward) for m, g in by_method(records).items()}
    if not {"awm", "ddpo"} <= set(groups):
        return []
    level = min(max(groups[m].mean) for m in ("awm", "ddpo"))
    need = {m: crossing(groups[m].x, groups[m].mean, level) for m in groups}
    awm, ddpo = need["awm"], need["ddpo"]
    told = ", ".join(f"{m} {n:,.0f}" if n is not None else f"{m} never" for m, n in need.items())
    ratio = f" DDPO / AWM: {ddpo / awm:.2f}." if awm and ddpo else ""
    return [
        f"Images drawn until the mean over the seeds is at {level:.4g}, the lower of the best of AWM and DDPO: "
        f"{told}.{ratio}"
    ]


def crossing(x: Sequence[float], y: Sequence[float], level: float) -> float | None:
    """Where a curve first reaches a level, between points by a straight line; None if it never does."""
    for i, value in enumerate(y):
        if value >= level:
            if i == 0:
                return x[0]
            part = (level - y[i - 1]) / (value - y[i - 1])
            return x[i - 1] + part * (x[i] - x[i - 1])
    return None


def hack(records: Sequence[Record]) -> list[str]:
    """What the judge says while a proxy is over-optimised, and where the early stop ends it."""
    lines = [
        "A proxy over-optimised: DDPO on `jpeg_compressibility`, without a pull to the reference. Held-out means at "
        "the start, at the step the checker likes best (`best/`), and at the end.",
        "",
        "| run | seed | best step | last step | jpeg, kB: start | best | end | checker: start | best | end |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        points = {p["step"]: p for p in r["curve"]}
        shown = [points[0], points[r["best_step"]], r["curve"][-1]]
        cells = [f"{p[n]:.3f}" for n in ("jpeg_compressibility", "shapes-checker") for p in shown]
        lines.append(f"| {r['method']} | {r['seed']} | {r['best_step']} | {r['steps']} | " + " | ".join(cells) + " |")
    return lines


def rollout_table(result: Record) -> str:
    """The table of ``benchmarks/rollout.py``."""
    drawing, rewards, settings = result["drawing"], result["rewards"], result["settings"]
    lines = [
        "## Rollouts against the diffusers pipeline",
        "",
        f"{settings['batch_size']} images of `{settings['model']}` at once, {settings['steps']} DDIM steps, guidance "
        f"{settings['guidance']:g}, from prompts to images, {settings['rounds']} batches each, taken in turns. Ratios "
        "above 1 are faster than the pipeline; in brackets the 95 % interval over the turns. Time of the process's "
        "own CPU is hardly touched by what else runs on the machine.",
        "",
        "| | images a second | over the pipeline, wall | over the pipeline, CPU time |",
        "|---|---|---|---|",
        f"| diffusers pipeline | {drawing['diffusers_images_per_second']:.2f} | 1 | 1 |",
    ]
    for name, label in (("rollout", "rollout"), ("rollout_keeping_steps", "rollout with noise, keeping every step")):
        cells = [drawing.get(f"{name}_over_diffusers{kind}") for kind in ("", "_cpu_time")]
        shown = [f"{c[0]:.3f} [{c[1]:.3f}, {c[2]:.3f}]" if c else "" for c in cells]
        lines.append(f"| {label} | {drawing[f'{name}_images_per_second']:.2f} | {shown[0]} | {shown[1]} |")
    lines += [
        "",
        f"Images differ from the pipeline's by {drawing['largest_difference']:.1e} at most and "
        f"{drawing['mean_difference']:.1e} on average (1 is white): rounding, which grows along a trajectory.",
        "",
        f"In rollouts of {rewards['images']} images through the trainer, `{rewards['reward']}` works for "
        f"{rewards['reward_share_of_work']:.1%} of the time, and {rewards['share_of_time_waiting_for_rewards']:.1%} "
        "of it is spent waiting for the reward after the last batch is drawn.",
        "",
        f"```\n{result['command']}\n```",
        "",
        f"Machine: {result['machine']}. " + ", ".join(f"{k} {v}" for k, v in result["versions"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"

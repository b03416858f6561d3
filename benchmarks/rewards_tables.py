"""The parts of docs/results.md on learning from rewards, of shapes_rewards.json and rollout.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from line_chart import Line, Panel, svg

Record = dict[str, Any]
PICTURES = Path(__file__).parent.parent / "docs" / "images"


NAMES = {
    "shapes-checker": "checker",
    "shapes-annotator": "annotators",
    "jpeg_compressibility": "jpeg, kB",
    "shapes-clip": "CLIP",
}
WAYS = {"ddpm 10": "10 steps with noise", "ddim 10": "10 without", "ddim 25": "25 without"}


def rewards_tables(records: list[Record]) -> str:
    """The tables of ``benchmarks/shapes_rewards.py``; writes the pictures that they show."""
    lines = [
        "## Learning from rewards on the shapes world",
        "",
        f"Change of scores from the base model to the result on {records[0]['heldout_images']} held-out prompts, one "
        "image each, same seeds, drawn by plain diffusers at the run's own guidance by three samplers: in 10 steps "
        "with noise (`ddpm`, which is DDIM with eta 1: how DDPO's rollouts are drawn), in 10 without (those of the "
        "others), and in 25 without. Images are those that the run drew to train on. " + share(records),
    ]
    for experiment, reward in (("checker", "shapes-checker"), ("jpeg", "jpeg_compressibility")):
        group = [r for r in records if r["experiment"] == experiment]
        if group:
            lines += ["", *learned(experiment, reward, group)]
    if any(r["experiment"] == "hack" for r in records):
        whole = [r for r in records if (r["experiment"], r["method"]) == ("jpeg", "ddpo")]
        lines += ["", *hack([*whole, *(r for r in records if r["experiment"] == "hack")])]
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


def learned(experiment: str, reward: str, records: Sequence[Record]) -> list[str]:
    """One experiment: over the seeds, the curves, how many images methods need, and each run."""
    others = [name for name in NAMES if name != reward]
    lines = [
        f"### Trained on {NAMES[reward].partition(',')[0]}",
        "",
        f"Change of the {NAMES[reward]}, mean over the seeds; in brackets the lowest and the highest seed, in bold "
        "where the interval of every seed is above 0. The other judges, at 10 steps, with noise for DDPO.",
        "",
        f"| method | seeds | images | {' | '.join(WAYS.values())} | {' | '.join(NAMES[n] for n in others)} |",
        "|---|---|---|" + "---|" * (len(WAYS) + len(others)),
    ]
    for group in by_method(records).values():
        cells = [spread([r["change"][way][reward] for r in group]) for way in WAYS]
        cells += [spread([r["change"][own_way(r)][name] for r in group]) for name in others]
        images = f"{mean(r['images'] for r in group):,.0f}"
        lines.append(f"| {labelled(group[0])} | {len(group)} | {images} | " + " | ".join(cells) + " |")
    lines += ["", *picture(experiment, reward, records)]
    lines += [text for told in equal_reward(records, reward) for text in ("", told)]
    lines += [
        "",
        f"Each run: change of the {NAMES[reward]} with its 95 % interval over prompts.",
        "",
        f"| method | seed | {' | '.join(WAYS.values())} |",
        "|---|---|" + "---|" * len(WAYS),
    ]
    for r in records:
        lines.append(f"| {r['method']} | {r['seed']} | " + " | ".join(change(r, way, reward) for way in WAYS) + " |")
    return lines


def own_way(record: Record) -> str:
    """The sampler of a run's rollouts."""
    return "ddpm 10" if record["method"].startswith("ddpo") else "ddim 10"


def labelled(record: Record) -> str:
    """The method, and the reward that it learnt from where that is another than its experiment's."""
    proxy = record["trained_reward"] == "shapes-clip"
    return f"{record['method']}, on the CLIP" if proxy else record["method"]


def spread(changes: Sequence[Sequence[float]]) -> str:
    """Mean over seeds, and the range; bold where every seed's interval is above 0."""
    means = [c[0] for c in changes]
    text = f"{mean(means):+.3f} [{min(means):+.3f}, {max(means):+.3f}]"
    return f"**{text}**" if all(c[1] > 0 for c in changes) else text


def change(record: Record, way: str, reward: str) -> str:
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(*record["change"][way][reward])


def share(records: Sequence[Record]) -> str:
    """The largest share of a run's time that its reward took."""
    known = [(r["reward_share"], r) for r in records if r["reward_share"] is not None]
    if not known:
        return ""
    most, record = max(known, key=lambda pair: pair[0])
    return f"Rewards take {most:.2%} of the time of steps at most (`{record['trained_reward']}`, {record['method']})."


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
    methods = by_method(records)
    if not {"awm", "ddpo"} <= set(methods):
        return []
    drawn, timed = ({m: line(g, x, reward) for m, g in methods.items()} for x in ("images", "seconds"))
    level = min(max(drawn[m].mean) for m in ("awm", "ddpo"))
    need = {m: crossing(curve.x, curve.mean, level) for m, curve in drawn.items()}
    seconds = {m: crossing(timed[m].x, timed[m].mean, level) for m in ("awm", "ddpo")}
    told = ", ".join(f"{m} {n:,.0f}" if n is not None else f"{m} never" for m, n in need.items())
    text = (
        "Images drawn until the mean over the seeds of the curves, whose points are drawn with noise, is at "
        f"{level:.4g}, the lower of the best of AWM and DDPO: {told}."
    )
    if need["awm"] and need["ddpo"] and seconds["awm"] and seconds["ddpo"]:
        text += (
            f" DDPO / AWM: {need['ddpo'] / need['awm']:.2f} in images, {seconds['ddpo'] / seconds['awm']:.2f} in time."
        )
    return [text]


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
        "### A reward hacked",
        "",
        "DDPO on `jpeg_compressibility`, without a pull to the reference: the run above, and one that the checker "
        "judges every 4 steps and may stop. Held-out means at the start, at the step that the judges like best "
        "(`best/`), and at the end.",
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

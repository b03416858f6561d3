"""The part of docs/results.md on few-step students, of shapes_distil.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import log10
from pathlib import Path
from statistics import mean
from typing import Any

from line_chart import Line, Panel, svg

Record = dict[str, Any]
PICTURE = Path(__file__).parent.parent / "docs" / "images" / "shapes-distil-spectrum.svg"
NAMES = {
    "teacher": "teacher",
    "lcd": "LCD",
    "rg_lcd": "RG-LCD through the decoder",
    "rg_lcd-proxy": "RG-LCD by proxy",
    "rg_lcd-checker": "RG-LCD by proxy of the checker",
}


def distil_tables(result: dict[str, Any]) -> str:
    """The tables of ``benchmarks/shapes_distil.py``; writes the picture that they show."""
    records: list[Record] = result["records"]
    prompts, images = result["diverse"]
    lines = [
        "## Few-step students on the shapes world",
        "",
        f"{result['images']} held-out prompts, one image each, the same seeds for all. The teacher is drawn with "
        f"guidance {result['teacher_guidance']:g}, students by LCMScheduler without. The reward is the bundled CLIP, "
        "which RG-LCD is trained by, but where its proxy learns the checker. Win rates by the simulated annotators, "
        "ties half: against the teacher at 50 steps, and against LCD of the same seed, drawn alike. Students start "
        "at timestep 999, as LCMScheduler does by itself, or at 799. Diversity: distance "
        f"of 16-pixel thumbnails within a prompt, {images} images of each of {prompts}. Fine power: mean power from "
        "0.25 cycles a pixel on, relative to that of true pictures of the prompts. Mean over the seeds, in brackets "
        "lowest and highest; time is of one image in batches, all samplers taken in turns.",
        "",
        "| | from | steps | seeds | reward | checker | annotators | wins against the teacher at 50 | against LCD | "
        "diversity | time an image | fine power |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *(row(group, result) for group in grouped(records)),
        *(reference_row(name, found, result) for name, found in result.get("references", {}).items()),
        "",
        *win_rows(records),
    ]
    if "references" in result and any(r["name"] != "teacher" for r in records):
        PICTURE.parent.mkdir(exist_ok=True)
        PICTURE.write_text(spectrum_picture(result))
        lines += ["", f"![Power spectra, relative to true pictures](images/{PICTURE.name})", ""]
        lines += [
            "Power spectra in 2 steps from 799 (the teacher in 50), as powers of ten relative to true pictures.",
            "",
        ]
    lines += training_rows(records)
    lines += ["", f"```\n{result['command']}\n```", "", f"Machine: {result['machine']}. " + versions(result)]
    return "\n".join(lines) + "\n"


def grouped(records: Sequence[Record]) -> list[list[Record]]:
    """Records of one model and number of steps together, over the seeds, in the order of the page."""

    def key(r: Record) -> tuple[int, float, int]:
        return list(NAMES).index(r["name"]), -r["strength"], r["steps"]

    return [[r for r in records if key(r) == wanted] for wanted in sorted(set(map(key, records)))]


def start(r: Record) -> str:
    """The first timestep of a student, "" for the teacher."""
    return "" if r["name"] == "teacher" else f"{1000 * r['strength'] - 1:.0f}"


def row(group: Sequence[Record], result: dict[str, Any]) -> str:
    """One row of the table."""
    first = group[0]
    kind = "teacher" if first["name"] == "teacher" else "student"
    seconds = result.get("seconds", {}).get(f"{kind} {first['steps']}")
    cells = [
        NAMES[first["name"]],
        start(first),
        str(first["steps"]),
        str(len(group)) if kind == "student" else "",
        *(over_seeds(group, lambda r, n=name: r[n], digits) for name, digits in SCORES),
        over_seeds(group, lambda r: r["win_rate"][0], 3) if "win_rate" in first else "",
        over_seeds(group, lambda r: r["win_rate_plain"][0], 3) if "win_rate_plain" in first else "",
        over_seeds(group, lambda r: r["diversity"], 3),
        f"{1000 * seconds:.1f} ms" if seconds else "",
        over_seeds(group, lambda r: r["fine_power"] / true_power(result), 2) if true_power(result) else "",
    ]
    return f"| {' | '.join(cells)} |"


SCORES = (("reward", 2), ("checker", 3), ("annotator", 3))


def reference_row(name: str, found: Record, result: dict[str, Any]) -> str:
    """True pictures: no time and no win rate."""
    scores = [f"{found[score]:.{digits}f}" for score, digits in SCORES]
    return f"| {name} | | | | {' | '.join(scores)} | | | | | {found['fine_power'] / true_power(result):.2f} |"


def true_power(result: dict[str, Any]) -> float:
    """Fine power of true pictures; 0 where it is not measured yet."""
    found: float = result.get("references", {}).get("renderings", {}).get("fine_power", 0.0)
    return found


def over_seeds(group: Sequence[Record], value: Callable[[Record], float], digits: int) -> str:
    """mean [lowest, highest], or the number where there is one."""
    values = [value(record) for record in group]
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def win_rows(records: Sequence[Record]) -> list[str]:
    """The win rate of each run with its interval."""
    students = [r for group in grouped(records) for r in group if "win_rate" in r]
    if not students:
        return []
    lines = [
        "Win rates of each run, against the teacher at 50 steps and against LCD of its seed, drawn alike, with their "
        "95 % Wilson intervals:",
        "",
        "| | from | steps | seed | against the teacher | against LCD |",
        "|---|---|---|---|---|---|",
    ]
    for r in students:
        wins = (
            f"{r[n][0]:.3f} [{r[n][1]:.3f}, {r[n][2]:.3f}]" if n in r else "" for n in ("win_rate", "win_rate_plain")
        )
        lines.append(f"| {NAMES[r['name']]} | {start(r)} | {r['steps']} | {r['seed']} | {' | '.join(wins)} |")
    return lines


def training_rows(records: Sequence[Record]) -> list[str]:
    """What training took, of each student, over the seeds."""
    runs: dict[str, dict[int, Record]] = {}
    for r in records:
        if "train_seconds" in r:
            runs.setdefault(r["name"], {})[r["seed"]] = r
    if not runs:
        return []
    lines = [
        "What training took, and how far the proxy agrees with the reward on the pairs that it is taught by (in the "
        "first and last 20 steps, before it is taught them):",
        "",
        "| | steps | a step | peak memory | agreement, first | last |",
        "|---|---|---|---|---|---|",
    ]
    for name, by_seed in sorted(runs.items(), key=lambda item: list(NAMES).index(item[0])):
        group = list(by_seed.values())
        agreement = ["", ""]
        if "proxy_accuracy_first" in group[0]:
            agreement = [
                over_seeds(group, lambda r, p=part: r[f"proxy_accuracy_{p}"], 3) for part in ("first", "last")
            ]
        step = over_seeds(group, lambda r: r["step_seconds"], 2)
        memory = f"{mean(r['peak_memory_mib'] for r in group):,.0f} MiB"
        lines.append(f"| {NAMES[name]} | {group[0]['train_steps']} | {step} s | {memory} | {' | '.join(agreement)} |")
    return lines


def spectrum_picture(result: dict[str, Any]) -> str:
    """Power of the teacher and of students in 2 steps, over that of true pictures."""
    true = result["references"]["renderings"]["spectrum"]
    chosen: dict[str, list[Record]] = {}
    for r in result["records"]:
        teacher = r["name"] == "teacher"
        if r["steps"] == (50 if teacher else 2) and r["strength"] == (1.0 if teacher else 0.8):
            chosen.setdefault(r["name"], []).append(r)
    lines = {}
    for name in [n for n in NAMES if n in chosen]:
        curves = [[log10(p / t) for p, t in zip(r["spectrum"], true, strict=True)] for r in chosen[name]]
        columns = list(zip(*curves, strict=True))
        lines[name] = Line(result["frequencies"], *([f(c) for c in columns] for f in (mean, min, max)))
    return svg([Panel("power relative to true pictures, powers of ten", "cycles a pixel", lines)])


def distil_step_table(result: dict[str, Any]) -> str:
    """The table of ``benchmarks/distil_step.py``."""
    lines = [
        "## A step of distillation against a bare loop",
        "",
        "The same method at the same batch: written out on one batch in memory with nothing around it "
        "(`benchmarks/bare_distil.py`), and by diffalign. Steps are taken in turns; the ratio is the median over "
        "rounds, in brackets its quartiles. Memory is the peak over steps, each in a process of its own, on a CPU "
        "with the libraries. The bare loop asks the teacher in two passes instead of one, and decodes the batch at "
        "once; diffalign decodes `decode_batch_size` images at a time and again in the backward pass, which takes "
        "more time and the memory of one chunk.",
        "",
        "| | bare, a step | diffalign, a step | ratio | bare, peak | diffalign, peak |",
        "|---|---|---|---|---|---|",
    ]
    for name, r in result["ways"].items():
        low, high = r["ratio_quartiles"]
        lines.append(
            f"| {NAMES[name]} | {r['bare_seconds']:.3f} s | {r['loop_seconds']:.3f} s | "
            f"{r['ratio']:.3f} [{low:.3f}, {high:.3f}] | {r['bare_peak_mib']:,} MiB | {r['loop_peak_mib']:,} MiB |"
        )
    lines += ["", f"```\n{result['command']}\n```", ""]
    lines += [f"Batches of {result['batch_size']} images. {result['card']}, {result['machine']}. " + versions(result)]
    return "\n".join(lines) + "\n"


def versions(result: dict[str, Any]) -> str:
    """library version, library version."""
    return ", ".join(f"{name} {number}" for name, number in result["versions"].items()) + "."

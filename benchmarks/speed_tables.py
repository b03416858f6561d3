"""Tables of speed and of estimates, for ``render_results.py`` and for the benchmarks themselves; needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Record = Mapping[str, Any]

CASE = ("method", "resolution", "batch_size", "rank", "checkpointing", "mode")
STEP_HEAD = ("method", "pixels", "batch", "rank", "checkpointing", "mode", "samples/s", "peak GB")
STEP_HEAD += ("data / forward / backward / optimiser / rest, %", "waiting", "TFLOP/s", "of ceiling")
STEP_HEAD += ("of the plain loop",)
RATE_HEAD = ("method", "pixels", "at once", "images/s", "drawing", "rewards", "learning", "peak GB")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def step_row(row: Record, ceiling: float) -> list[str]:
    """A row of ``sdxl_step.py``, under :data:`STEP_HEAD`."""
    first = [str(row[name]) for name in CASE]
    if "out_of_memory" in row:
        return [*first, "out of memory", *[""] * (len(STEP_HEAD) - len(CASE) - 1)]
    ratio = row.get("ratio_to_plain")
    parts = ("data", "forward", "backward", "optimiser", "rest")
    return [
        *first,
        f"{row['samples_per_second']:.3g}",
        f"{row['peak_gb']:.1f}",
        " / ".join(f"{100 * row['share'][name]:.0f}" for name in parts),
        f"{100 * row['waiting_for_data']:.1f} %",
        f"{row['tflop_per_second']:.3g}",
        f"{100 * row['tflop_per_second'] / ceiling:.0f} %",
        f"{ratio:.2f}" if ratio else "",
    ]


def rate_row(row: Record) -> list[str]:
    """A row of ``rl_rate.py``, under :data:`RATE_HEAD`."""
    first = [str(row[name]) for name in ("method", "resolution", "batch_size")]
    if "out_of_memory" in row:
        return [*first, "out of memory", *[""] * 4]
    shares = [f"{100 * row['share'][name]:.0f} %" for name in ("drawing", "rewards", "learning")]
    return [*first, f"{row['images_per_second']:.3g}", *shares, f"{row['peak_gb']:.1f}"]


def step_tables(records: Sequence[Record]) -> str:
    """The tables of ``benchmarks/sdxl_step.py``: of each model, card and setting the latest record of each row."""
    lines = [
        "## A step at real size",
        "",
        "The method's own trainer on random weights and cached random latents, and in the same run the plain loop: "
        "VAE and both text encoders in each step, a call of the UNet for each image, a second UNet as reference "
        "([speed](speed.md#measure-it)).",
    ]
    for about, rows in latest(records, CASE, ("model", "card", "cap_gb", "settings")):
        shown = [step_row(row, record["ceiling_tflop_per_second"]) for record, row in rows]
        ceilings = sorted({record["ceiling_tflop_per_second"] for record, _ in rows})
        reached = " to ".join(f"{value:.3g}" for value in dict.fromkeys((ceilings[0], ceilings[-1])))
        lines += ["", f"{_title(about)}. A large matrix product reaches {reached} TFLOP/s.", ""]
        lines += [markdown(STEP_HEAD, shown), "", *source([record for record, _ in rows])]
    return "\n".join(lines) + "\n"


def rate_tables(records: Sequence[Record]) -> str:
    """The tables of ``benchmarks/rl_rate.py``."""
    lines = [
        "## Methods on rewards, end to end",
        "",
        "Images a second of whole rollouts on random weights: drawn, decoded, scored and learnt from.",
    ]
    for about, rows in latest(records, ("method", "resolution", "batch_size"), ("model", "card", "settings")):
        lines += ["", f"{_title(about)}.", "", markdown(RATE_HEAD, [rate_row(row) for _, row in rows])]
        lines += ["", *source([record for record, _ in rows])]
    return "\n".join(lines) + "\n"


def latest(
    records: Sequence[Record], case: Sequence[str], group: Sequence[str]
) -> list[tuple[Record, list[tuple[Record, Record]]]]:
    """The rows that count, by what records were made of.

    Args:
        records: the oldest first, each with rows.
        case: keys of a row that tell it from others; a later one takes the place of an earlier.
        group: keys of a record that tell its rows from those of others.

    Returns:
        (the last record of the group, [(record, row), ...]) of each group.
    """
    found: dict[str, tuple[Record, dict[tuple[Any, ...], tuple[Record, Record]]]] = {}
    for record in records:
        name = str([record.get(key) for key in group])
        _, rows = found.get(name, (record, {}))
        own = {tuple(row[key] for key in case): (record, row) for row in record["rows"]}
        found[name] = (record, {**rows, **own})
    return [(record, list(rows.values())) for record, rows in found.values()]


def _title(record: Record) -> str:
    parts = [f"`{record['model']}` on {record['card']}"]
    if record.get("cap_gb"):
        parts.append(f"at most {record['cap_gb']:g} GB of its memory")
    parts += [f"`{name}: {value}`" for name, value in (record.get("settings") or {}).items()]
    return ", ".join(parts)


def startup_table(records: Sequence[Record]) -> str:
    """The table of ``benchmarks/startup.py``: its last record."""
    last = records[-1]
    rows = [
        [name, f"{row['seconds']:.2f} s", f"{row['of_python']:.1f}", _below(row["seconds"], last["targets"].get(name))]
        for name, row in last["starts"].items()
    ]
    lines = [
        "## Starting",
        "",
        f"Processes of their own, the shortest of {last['rounds']}.",
        "",
        markdown(("", "time", "of Python's own", "target"), rows),
        "",
        *source([last]),
    ]
    return "\n".join(lines) + "\n"


def _below(seconds: float, target: float | None) -> str:
    if target is None:
        return ""
    return f"{target:g} s" if seconds < target else f"{target:g} s, missed"


def estimate_error_table(result: Record) -> str:
    """The table of ``benchmarks/estimate_error.py``."""
    rows = [
        [name, f"{row['predicted_mib']:.0f} MiB", f"{row['measured_mib']:.0f} MiB", f"{row['error']:+.1%}"]
        for name, row in result["cases"].items()
    ]
    lines = [
        "## Estimates of memory against real passes",
        "",
        "What a forward and backward pass adds to the memory of a process on a CPU, by `diffalign estimate` and "
        f"measured; at most {result['worst_error']:.1%} off ([what a run will need](estimate.md)).",
        "",
        markdown(("", "estimated", "measured", "error"), rows),
        "",
    ]
    if time := result.get("time"):
        lines += [
            f"An image by SDXL in 30 steps on an A100 80GB: {time['estimated_seconds']:.2f} s estimated, "
            f"{time['published_seconds']:.2f} s published ({time['error']:+.1%}).",
            "",
        ]
    return "\n".join([*lines, *source([result])]) + "\n"


def source(records: Sequence[Record]) -> list[str]:
    """The commands, and on what they ran."""
    last = records[-1]
    commands = list(dict.fromkeys(record["command"] for record in records))
    versions = ", ".join(f"{name} {number}" for name, number in last["versions"].items())
    when = f", {last['when']}, commit {last['commit']}" if "when" in last else ""
    return ["```", *commands, "```", "", f"Machine: {last['machine']}{when}. {versions}."]

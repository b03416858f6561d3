"""An estimate as text."""

from __future__ import annotations

from collections.abc import Sequence

from diffalign.estimation.cards import Calibration
from diffalign.estimation.estimate import Estimate, PhaseEstimate

_GIB = 2**30


def report(found: Estimate, calibration: Calibration, options: Sequence[tuple[str, Estimate]] = ()) -> str:
    """The tables of memory and time, whether it fits, and what would.

    Args:
        found: the estimate.
        calibration: it was made with.
        options: settings that would fit, with their estimates.
    """
    blocks = [_head(found), _memory(found), *([_time(found)] if found.step_seconds else []), _verdict(found, options)]
    return "\n\n".join([*blocks, _trust(found, calibration)])


def one_line(found: Estimate) -> str:
    """Memory and speed, for the head of a recipe."""
    text = f"{found.peak / _GIB:.1f} GiB"
    rate = found.samples_per_second
    if rate is None or found.step_seconds is None:
        return text
    speed = f"{rate:.2f} {found.work.unit}s/s" if rate >= 0.1 else f"{1 / rate:.0f} s for one {found.work.unit}"
    return f"{text}; {speed} on one {found.card.name}"


def as_dict(found: Estimate, options: Sequence[tuple[str, Estimate]] = ()) -> dict[str, object]:
    """What :func:`report` says, for programs: bytes and seconds."""
    rate = f"{found.work.unit}s_per_second"
    return {
        "card": found.card.name,
        "card_bytes": round(found.card.memory),
        "peak_bytes": found.peak,
        "needed_bytes": found.needed,
        "fits": found.fits,
        "trained_parameters": found.trained,
        "shapes_from": found.source,
        "tflop_per_step": found.flops / 1e12,
        "step_seconds": found.step_seconds,
        rate: found.samples_per_second,
        "run_seconds": found.run_seconds,
        "phases": {p.name: {"memory": p.memory, "seconds": p.seconds} for p in found.phases},
        "calibrated": found.memory_factor != 1 or found.time_factor != 1,
        "would_fit_with": [
            {"settings": name, "needed_bytes": other.needed, rate: other.samples_per_second} for name, other in options
        ],
    }


def duration(seconds: float) -> str:
    """Seconds in the unit a person would take."""
    if seconds < 120:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"


def _head(found: Estimate) -> str:
    model, work = found.work.model, found.work
    trains = "all weights" if model.full else f"LoRA rank {model.rank}"
    size = f"{model.height} x {model.width}" if model.height else "the model's own size"
    return "\n".join(
        [
            f"  model  {model.path}, {size}; shapes from {found.source}",
            f" trains  {found.trained:,} parameters ({trains}); {work.samples_per_step} {work.unit}s a step",
            f"   card  {found.card.name}, {found.card.memory / _GIB:.1f} GiB",
        ]
    )


def _memory(found: Estimate) -> str:
    names = list(dict.fromkeys(name for phase in found.phases for name in phase.memory))
    rows = [["GiB", *(phase.name for phase in found.phases)]]
    rows += [[name, *(_cell(phase, name) for phase in found.phases)] for name in names]
    rows.append(["peak", *(f"{phase.peak / _GIB:.2f}" for phase in found.phases)])
    return _table(rows)


def _cell(phase: PhaseEstimate, name: str) -> str:
    return f"{phase.memory[name] / _GIB:.2f}" if name in phase.memory else "-"


def _time(found: Estimate) -> str:
    total = found.step_seconds or 0.0
    rows = [["seconds of a step", "", "share"]]
    for phase in found.phases:
        for name, seconds in phase.seconds.items():
            label = name if phase.name == "step" else f"{phase.name}: {name}"
            scaled = seconds * found.time_factor
            rows.append([label, f"{scaled:.3f}", f"{scaled / total:.0%}"])
    rows.append(["all", f"{total:.3f}", ""])
    rate = found.samples_per_second or 0.0
    tail = f"{rate:.2f} {found.work.unit}s a second; {found.flops / 1e12:.1f} TFLOP a step"
    if found.run_seconds is not None:
        tail += f"; {found.work.steps:,} steps take {duration(found.run_seconds)}, without caching and validation"
    return f"{_table(rows)}\n{tail}"


def _verdict(found: Estimate, options: Sequence[tuple[str, Estimate]]) -> str:
    have, need = found.card.memory / _GIB, found.needed / _GIB
    if found.fits:
        return f"fits: needs {need:.1f} of {have:.1f} GiB"
    lines = [f"does not fit: needs {need:.1f} of {have:.1f} GiB, most in the phase {found.largest.name!r}."]
    if options:
        lines.append("It would with:")
        lines += [f"  {name}  ({_needs(other)})" for name, other in options]
    else:
        lines.append("No setting that was tried makes it fit: take a larger card, or share the weights out.")
    return "\n".join(lines)


def _needs(found: Estimate) -> str:
    speed = f", {found.samples_per_second:.2f} {found.work.unit}s/s" if found.samples_per_second else ""
    return f"{found.needed / _GIB:.1f} GiB{speed}"


def _trust(found: Estimate, calibration: Calibration) -> str:
    own = calibration.cards.get(found.card.name)
    if own:
        return (
            f"calibrated by {own['results']} results on this card: measured / estimated time {own.get('time', 1):.2f} "
            f"(error after it {own.get('time_error', 0):.0%}), memory {own.get('memory', 1):.2f} "
            f"(error {own.get('memory_error', 0):.0%})"
        )
    return (
        "not calibrated on this card: memory is counted from shapes, and was within "
        f"{calibration.memory_error:.1%} of real passes on a CPU;\ntime assumes "
        f"{calibration.matmul_efficiency:.0%} of its matrix products and {calibration.bandwidth_efficiency:.0%} of "
        f"its bandwidth, and was {calibration.time_error:.0%} off one published figure (docs/estimate.md).\n"
        "Activations of reward models are not counted."
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)

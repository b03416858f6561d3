"""``diffalign estimate --calibrate``: put what was measured on a card beside what is estimated for it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffalign.config import from_dict, write_text
from diffalign.errors import UserError
from diffalign.estimation.cards import CALIBRATION, find_card, load_calibration
from diffalign.estimation.estimate import estimate
from diffalign.trainers import load_method
from diffalign.training.config import DataConfig

_SDXL = "stabilityai/stable-diffusion-xl-base-1.0"
_NOT_NEEDED = {"output_dir": "-", "dataset_name": "-"}


def calibrate(results: Path, out: Path = CALIBRATION) -> list[str]:
    """Write the factors of each card in the results of ``benchmarks/sdxl_step.py``; returns a line for each card, and
    for each that is not known.

    Rows of methods on rollouts, of compiled runs and of selective checkpointing are left out: their step is measured
    without the rollout, or their blocks are not in the row.

    Args:
        results: the JSON file: a list of records.
        out: the calibration to bring up to date.

    Raises:
        UserError: no record is of a card that is known.
    """
    try:
        records = json.loads(results.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{results}: cannot be read as results of benchmarks/sdxl_step.py: {error}") from error
    ratios: dict[str, list[tuple[float, float]]] = {}
    unknown = []
    for record in records:
        if record.get("card") == "CPU":
            continue
        try:
            card = find_card(record["card"]).name
        except UserError as error:
            unknown.append(f"left out: {error}")
            continue
        pairs = [_ratios(row, record, card) for row in record["rows"] if _usable(row)]
        ratios.setdefault(card, []).extend(pair for pair in pairs if pair is not None)
    ratios = {card: pairs for card, pairs in ratios.items() if pairs}
    if not ratios:
        raise UserError("\n".join([f"{results}: no row of an eager run on a card that `--card list` knows", *unknown]))
    values = json.loads(out.read_text(encoding="utf-8"))
    for card, found in ratios.items():
        values["cards"][card] = _factors(found)
    write_text(out, json.dumps(values, indent=2) + "\n")
    return [*(_say(card, values["cards"][card]) for card in ratios), *dict.fromkeys(unknown)]


def _usable(row: Mapping[str, Any]) -> bool:
    return not row.get("out_of_memory") and row["mode"] == "eager" and row["checkpointing"] in ("none", "full")


def _ratios(row: Mapping[str, Any], record: Mapping[str, Any], card: str) -> tuple[float, float] | None:
    """Measured over estimated (time, memory) of one row."""
    config_class, trainer = load_method(row["method"])
    if not issubclass(config_class, DataConfig):
        return None
    config = from_dict(
        config_class,
        {
            **_NOT_NEEDED,
            "pretrained_model_name_or_path": _SDXL if record["model"] == "sdxl" else record["model"],
            "resolution": row["resolution"],
            "train_batch_size": row["batch_size"],
            "rank": row["rank"],
            "mixed_precision": "bf16",
            "gradient_checkpointing": row["checkpointing"] == "full",
            **record.get("settings", {}),
        },
        "results",
    )
    plain = load_calibration()
    found = estimate(trainer.work(config), find_card(card), type(plain)(**{**vars(plain), "cards": {}}))
    step = next(phase for phase in found.phases if phase.name == "step")
    return row["step_seconds"] / sum(step.seconds.values()), row["peak_gb"] * 1e9 / step.peak


def _factors(ratios: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Geometric means, and the typical error that is left after them."""
    values: dict[str, Any] = {"results": len(ratios)}
    for name, column in zip(("time", "memory"), zip(*ratios, strict=True), strict=True):
        logs = [math.log(ratio) for ratio in column]
        mean = sum(logs) / len(logs)
        values[name] = round(math.exp(mean), 4)
        spread = math.sqrt(sum((value - mean) ** 2 for value in logs) / len(logs))
        values[f"{name}_error"] = round(math.exp(spread) - 1, 4)
    return values


def _say(card: str, factors: Mapping[str, Any]) -> str:
    return (
        f"{card}: {factors['results']} results; time x {factors['time']:.3f} (error {factors['time_error']:.0%}), "
        f"memory x {factors['memory']:.3f} (error {factors['memory_error']:.0%})"
    )

"""What is said of a trained reward: accuracy and calibration on pairs that nothing was chosen by."""

from __future__ import annotations

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard, ModelCardData
from numpy.typing import NDArray

from diffalign.config import write_text
from diffalign.evaluation.calibration import (
    Accuracy,
    Bin,
    accuracy_by,
    accuracy_with_ties,
    expected_calibration_error,
    fit_tie_threshold,
    negative_log_likelihood,
    pairwise_accuracy,
    reliability,
)
from diffalign.evaluation.stats import win_rate
from diffalign.trainers.reward.config import RewardTrainingConfig
from diffalign.trainers.reward.data import Part, Parts, normalised

REPORT_FILE = "report.json"
_LIBRARIES = ("diffalign", "torch", "transformers", "accelerate", "peft")


@dataclass(frozen=True)
class Scores:
    """Scores of the pairs of a part, preferred image first: (N,) and (N,), float64."""

    chosen: NDArray[np.float64]
    rejected: NDArray[np.float64]

    @property
    def margins(self) -> NDArray[np.float64]:
        return self.chosen - self.rejected

    def divided(self, temperature: float) -> Scores:
        return Scores(self.chosen / temperature, self.rejected / temperature)


def make_report(
    parts: Parts, validation: Scores, heldout: Scores, temperature: float, applied: bool
) -> dict[str, Any]:
    """Everything measured, as plain values.

    Args:
        parts: the pairs.
        validation, heldout: scores by the best weights, before any temperature.
        temperature: fitted on the validation part.
        applied: whether the saved reward has its scores divided by it.
    """
    labels, margins = parts.heldout.labels, heldout.margins
    threshold = fit_tie_threshold(validation.margins / temperature, parts.validation.labels)
    users = [choice.user_id for choice in parts.heldout.choices]
    return {
        "pairs": {name: _count(getattr(parts, name)) for name in ("train", "validation", "heldout")},
        "training_pairs_dropped_for_heldout_prompts": parts.dropped,
        "heldout_accuracy": accuracy_of(parts.heldout, heldout),
        "heldout_accuracy_interval_over_prompts": _over_prompts(parts, heldout),
        "heldout_accuracy_with_ties": {
            "threshold": threshold,
            "accuracy": accuracy_with_ties(margins / temperature, labels, threshold),
        },
        "heldout_accuracy_by_user": {
            str(user): dataclasses.asdict(found) for user, found in accuracy_by(margins, labels, users).items()
        },
        "validation_accuracy": accuracy_of(parts.validation, validation),
        "calibration": {
            "temperature": temperature,
            "applied": applied,
            "before": _calibration(margins, labels, 1.0),
            "after": _calibration(margins, labels, temperature),
        },
    }


def accuracy_of(part: Part, scores: Scores) -> dict[str, Any]:
    """The fields of :class:`diffalign.evaluation.calibration.Accuracy` on a part."""
    found = pairwise_accuracy(scores.margins, part.labels)
    assert found is not None  # open_parts refuses parts that are all ties
    return dataclasses.asdict(found)


def _over_prompts(parts: Parts, scores: Scores) -> list[float]:
    """Bootstrap interval over prompts: pairs that share one are not independent."""
    decided = parts.heldout.labels != 0.5
    prompts = [normalised(choice.prompt) for choice in parts.heldout.choices if choice.label != 0.5]
    found = win_rate(scores.chosen[decided], scores.rejected[decided], groups=prompts, tie_tolerance=0)
    return [found.low, found.high]


def _calibration(margins: NDArray[np.float64], labels: NDArray[np.float64], temperature: float) -> dict[str, Any]:
    table = reliability(margins, labels, temperature)
    return {
        "expected_calibration_error": expected_calibration_error(table),
        "negative_log_likelihood": negative_log_likelihood(margins, labels, temperature),
        "reliability": [dataclasses.asdict(row) for row in table],
    }


def _count(part: Part) -> dict[str, int]:
    return {"pairs": len(part), "prompts": len(part.counts), "ties": int((part.labels == 0.5).sum())}


def write_report(report: Mapping[str, Any], config: RewardTrainingConfig, folder: Path) -> None:
    """Write ``report.json`` and the model card ``README.md``."""
    write_text(folder / REPORT_FILE, json.dumps(report, indent=2) + "\n")
    dataset = config.dataset_name
    data = ModelCardData(
        base_model=None if config.from_scratch else config.pretrained_model_name_or_path,
        library_name="transformers" if config.train_mode != "head" else None,
        license="other",
        tags=["reward-model", "preference", "diffalign"],
        datasets=[dataset],
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n{_card(report, config, folder)}").save(folder / "README.md")


def _card(report: Mapping[str, Any], config: RewardTrainingConfig, folder: Path) -> str:
    what = {"full": "all weights", "lora": f"a LoRA of rank {config.rank}, merged", "head": "a head on the embeddings"}
    start = "random weights of the shape of " if config.from_scratch else ""
    ran = report["run"]
    return f"""
# {folder.name}

A reward model: which of two images of a prompt is preferred. Trained from {start}\
`{config.pretrained_model_name_or_path}` ({what[config.train_mode]}) on `{config.dataset_name}` with the \
{config.objective} objective; the weights are those of step {ran["best_step"]} of {ran["steps"]}, chosen by \
{config.best_metric} on validation prompts.

Scale: `bt_logit`, a difference d between two images of one prompt means that the higher one is preferred with \
probability sigmoid(d). Scores of different prompts are not comparable.

## Use

```python
from diffalign.rewards import load_reward

reward = load_reward("trained:{folder.name}")
scores = reward(images, prompts).rewards
```
{_accuracy_section(report)}{_calibration_section(report["calibration"])}{_training_section(config)}"""


def _accuracy_section(report: Mapping[str, Any]) -> str:
    low, high = report["heldout_accuracy_interval_over_prompts"]
    pairs, with_ties = report["pairs"], report["heldout_accuracy_with_ties"]
    counts = [f"{pairs[name]['pairs']} ({pairs[name]['prompts']})" for name in ("train", "validation", "heldout")]
    return f"""
## Accuracy on held-out prompts

| | |
|---|---|
| preferred image scores higher ({pairs["heldout"]["ties"]} ties left out; Wilson interval) | \
{_text(report["heldout_accuracy"])} |
| the same, bootstrap interval over {pairs["heldout"]["prompts"]} prompts | [{low:.3f}, {high:.3f}] |
| before training | {_text(report["start_heldout_accuracy"])} |
| with ties (predicted within {with_ties["threshold"]:.2f} of probability, a threshold from validation) | \
{with_ties["accuracy"]:.3f} |
| validation prompts, by which the step was chosen | {_text(report["validation_accuracy"])} |
{_users(report["heldout_accuracy_by_user"])}
Pairs (prompts): {counts[0]} to train on, {counts[1]} to choose by, {counts[2]} held out. No prompt is in two parts.
"""


def _calibration_section(calibration: Mapping[str, Any]) -> str:
    after = calibration["after" if calibration["applied"] else "before"]
    return f"""
## Calibration on held-out prompts

Temperature {calibration["temperature"]:.3f}, fitted on the validation part, \
{"divided into the saved scores" if calibration["applied"] else "not applied"}. A tie counts as half a win of either. \
Expected calibration error {after["expected_calibration_error"]:.3f}, negative log-likelihood \
{after["negative_log_likelihood"]:.4f} (0.6931 knows nothing).

| predicted | pairs | mean prediction | preferred |
|---|---|---|---|
{_bins(after["reliability"])}
"""


def _training_section(config: RewardTrainingConfig) -> str:
    rows = "\n".join(f"| {name} | {version(name)} |" for name in _LIBRARIES)
    anew = " --resume_from_checkpoint none" if config.resume_from_checkpoint else ""
    return f"""
## Training

`config.yaml` holds every setting, `metrics.jsonl` one row a step, `report.json` these numbers. The same run again:

```
diffalign train-reward --config config.yaml --output_dir NEW_FOLDER{anew}
```

| library | version |
|---|---|
| python | {platform.python_version()} |
{rows}
"""


def _text(accuracy: Mapping[str, Any]) -> str:
    return str(Accuracy(**accuracy))


def _bins(table: list[Mapping[str, Any]]) -> str:
    bins = [Bin(**row) for row in table]
    return "\n".join(f"| {b.low:.2f} to {b.high:.2f} | {b.n} | {b.confidence:.3f} | {b.frequency:.3f} |" for b in bins)


def _users(table: Mapping[str, Mapping[str, Any]]) -> str:
    if not table:
        return ""
    shown = sorted(table.items(), key=lambda item: -item[1]["n"])[:20]
    more = f" (the {len(shown)} with most pairs of {len(table)})" if len(table) > len(shown) else ""
    rows = "\n".join(f"| {user} | {_text(accuracy)} |" for user, accuracy in shown)
    return f"\nBy user{more}:\n\n| user | accuracy |\n|---|---|\n{rows}\n"

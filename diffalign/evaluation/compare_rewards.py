"""``diffalign compare-rewards``: how far rewards agree with people's choices, and with each other.

On a set of pairs with labels: accuracy with its interval, whether one reward is right more often than another (sign
test of the pairs on which just one is), rank correlation, and calibration. The temperature that calibrates a reward is
fitted on one half of the pairs and judged on the other, both ways.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from diffalign.config import command_line, field
from diffalign.data.readers import PairSource, open_pairs
from diffalign.data.records import Pair
from diffalign.errors import UserError
from diffalign.evaluation import calibration
from diffalign.evaluation.folder import write_atomically, write_rows
from diffalign.evaluation.multiple import Correction, adjusted
from diffalign.evaluation.report import table as markdown
from diffalign.evaluation.score_file import plain
from diffalign.evaluation.stats import sign_test
from diffalign.rewards.combine import RewardSpec, load_rewards
from diffalign.rewards.failures import FailureLedger, FailurePolicy, guarded
from diffalign.rewards.reward_set import Member
from diffalign.rewards.score_cache import ScoreCache
from diffalign.rewards.statistics import correlation

Floats = NDArray[np.float64]


@dataclass(kw_only=True)
class CompareConfig:
    """Compare rewards with the choices of people (or of simulated ones), and with each other."""

    pairs: str = field(help="Pairs with labels: a file, a folder, a hub id, or shapes-pairs; also those of label.")
    split: str = field("train", help="Split to read.")
    columns: dict[str, str] | None = field(None, help="Field to column, where names differ: prompt=my_caption.")
    max_pairs: int | None = field(None, help="Use only the first so many pairs.")
    rewards: list[Any] = field([], help="Rewards: names, or mappings as in the rewards of a training run.")
    output_dir: str = field(help="Folder for scores.jsonl, summary.json and report.md.")
    correction: Correction = field("holm", help="p values for many comparisons: holm, bh (false discoveries) or none.")
    device: str | None = field(None, help="Device of the models. Default: a GPU if there is one.")
    batch_size: int = field(32, help="Pairs scored at once; as many are scored again after a kill.")
    on_failure: Literal["stop", "retry", "drop"] = field("stop", help="What to do about an image without a score.")

    def __post_init__(self) -> None:
        if not self.rewards:
            raise UserError("which rewards? Give --rewards NAME ...; diffalign rewards lists them")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")


def run_compare(config: CompareConfig) -> dict[str, Any]:
    """Score both images of every pair, write the report, and return what ``summary.json`` holds.

    Raises:
        UserError: pairs or rewards cannot be read, or a prompt cannot be judged.
        RewardError: an image cannot be scored, and the policy does not bear it. What was scored is kept.
    """
    source = open_pairs(config.pairs, split=config.split, columns=config.columns, ties="keep",
                        max_pairs=config.max_pairs)  # fmt: skip
    assert isinstance(source, PairSource)
    root = Path(config.output_dir)
    specs = [RewardSpec.of(item, f"rewards[{index}]") for index, item in enumerate(config.rewards)]
    rewards = load_rewards(
        [RewardSpec(spec.reward, spec.name, options=spec.options) for spec in specs],
        cache=ScoreCache(root / "cache"),
        device=config.device,
    )
    scores, ledger = {}, FailureLedger()
    for member in rewards.members:
        try:
            scores[member.name] = _score(member, source, config, ledger)
        finally:
            member.reward.close()
    facts = [(pair.id, pair.prompt, pair.label, pair.user_id) for pair in source]
    write_rows(root / "scores.jsonl", list(_rows(facts, scores)))
    labels, users = np.array([label for _, _, label, _ in facts]), [user for *_, user in facts]
    summary = {
        "command": command_line("diffalign compare-rewards", config),
        "pairs": len(facts),
        "ties": int((labels == 0.5).sum()),
        "rewards": {
            member.name: {"identity": member.reward.identity, **judged(scores[member.name], labels, users)}
            for member in rewards.members
        },
        "agreement": agreement(scores, labels, config.correction),
        "correction": config.correction,
    }
    write_atomically(root / "summary.json", json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    text = render(summary)
    write_atomically(root / "report.md", text)
    print(text)
    print(root / "report.md")
    return summary


def judged(scores: Floats, labels: Floats, users: Sequence[str | None]) -> dict[str, Any]:
    """A reward against labelled pairs.

    Args:
        scores: (n, 2) of the first and second image; pairs without one are left out.
        labels: (n,) probability that the first is preferred.
        users: (n,) who chose, None if not known.
    """
    known = np.asarray(np.isfinite(scores).all(1))
    margins, label = scores[known, 0] - scores[known, 1], labels[known]
    accuracy = calibration.pairwise_accuracy(margins, label)
    by_user = calibration.accuracy_by(margins, label, [u for u, ok in zip(users, known.tolist(), strict=True) if ok])
    # Readers put the preferred image first, so that labels hardly differ: both orders of each pair make them differ.
    ranks = correlation(np.r_[margins, -margins].tolist(), np.r_[label, 1 - label].tolist())
    found: dict[str, Any] = {
        "accuracy": None if accuracy is None else asdict(accuracy),
        "by_user": {str(user): asdict(one) for user, one in by_user.items()},
        "spearman_with_labels": _finite(ranks["spearman"]),
        "left_out": int((~known).sum()),
    }
    return found | (_calibrated(margins, label) if len(margins) > 1 else {})


def _calibrated(margins: Floats, labels: Floats) -> dict[str, Any]:
    """Temperature on all pairs; loss and calibration error with that of the other half."""
    half = np.arange(len(margins)) % 2 == 0
    scaled = np.empty_like(margins)
    for here in (half, ~half):
        scaled[here] = margins[here] / calibration.fit_temperature(margins[~here], labels[~here])
    # Which image comes first must not tell which is preferred: every second pair is turned round.
    table = calibration.reliability(np.where(half, scaled, -scaled), np.where(half, labels, 1 - labels))
    return {
        "temperature": calibration.fit_temperature(margins, labels),
        "log_loss": calibration.negative_log_likelihood(scaled, labels),
        "calibration_error": calibration.expected_calibration_error(table),
        "reliability": [asdict(row) for row in table],
    }


def agreement(scores: Mapping[str, Floats], labels: Floats, correction: Correction) -> list[dict[str, Any]]:
    """Every two rewards: rank correlation over images, how often they choose alike, which is right more often."""
    rows: list[dict[str, Any]] = []
    for a, b in combinations(scores, 2):
        known = np.isfinite(scores[a]).all(1) & np.isfinite(scores[b]).all(1)
        one, two = (scores[name][known, 0] - scores[name][known, 1] for name in (a, b))
        decided = labels[known] != 0.5
        right_a, right_b = (m[decided] * (labels[known][decided] - 0.5) > 0 for m in (one, two))
        ranks = correlation(scores[a].ravel().tolist(), scores[b].ravel().tolist())
        rows.append(
            {
                "a": a,
                "b": b,
                "spearman": _finite(ranks["spearman"]),
                "same_choice": float((np.sign(one) == np.sign(two)).mean()) if known.any() else None,
                "only_a_right": int((right_a & ~right_b).sum()),
                "only_b_right": int((right_b & ~right_a).sum()),
            }
        )
    p_values = adjusted([sign_test(row["only_a_right"], row["only_b_right"]) for row in rows], correction)
    return [row | {"p_adjusted": float(p)} for row, p in zip(rows, p_values, strict=True)]


def render(summary: Mapping[str, Any]) -> str:
    """The text of the report."""
    body = []
    for name, row in summary["rewards"].items():
        accuracy = row["accuracy"]
        shown = "-" if accuracy is None else f"{accuracy['rate']:.3f} [{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
        numbers = [row.get(key) for key in ("spearman_with_labels", "log_loss", "temperature", "calibration_error")]
        body.append([name, shown, *("-" if value is None else f"{value:.3g}" for value in numbers)])
    parts = [
        "# Rewards against choices",
        f"{summary['pairs']} pairs, {summary['ties']} of them ties, which accuracy leaves out. Log loss is in nats "
        "(0.693 knows nothing), with the temperature of the other half of the pairs.",
        markdown(("reward", "accuracy", "rank correlation", "log loss", "temperature", "calibration error"), body),
    ]
    if summary["agreement"]:
        head = ("a", "b", "rank correlation", "same choice", "only a right", "only b right", "p")
        parts += ["## Agreement", markdown(head, [_agreement(row) for row in summary["agreement"]])]
    scorers = [f"- {name}: `{row['identity']}`" for name, row in summary["rewards"].items()]
    return "\n\n".join([*parts, f"```bash\n{summary['command']}\n```", "\n".join(scorers)]) + "\n"


def _agreement(row: Mapping[str, Any]) -> list[str]:
    numbers = ["-" if row[key] is None else f"{row[key]:.3f}" for key in ("spearman", "same_choice")]
    return [row["a"], row["b"], *numbers, row["only_a_right"], row["only_b_right"], f"{row['p_adjusted']:.3g}"]


def _score(member: Member, source: PairSource, config: CompareConfig, ledger: FailureLedger) -> Floats:
    """Scores (n, 2) of the first and second image of each pair; NaN where there is none."""
    found = []
    for start in tqdm(range(0, len(source), config.batch_size), desc=member.name, unit="batch"):
        pairs: list[Pair] = [source[k] for k in range(start, min(start + config.batch_size, len(source)))]
        output = guarded(
            member.reward,
            [image.decode() for pair in pairs for image in (pair.chosen, pair.rejected)],
            [pair.prompt for pair in pairs for _ in range(2)],
            group_ids=[k for k in range(len(pairs)) for _ in range(2)] if member.reward.mode == "groupwise" else None,
            policy=FailurePolicy(config.on_failure),
            ledger=ledger,
            names=[f"{side} of {pair.where}" for pair in pairs for side in Pair.SIDES],
        )
        found.append(output.rewards.double().cpu().numpy().reshape(-1, 2))
    return np.concatenate(found)


def _rows(
    facts: Sequence[tuple[str, str, float, str | None]], scores: Mapping[str, Floats]
) -> Iterator[dict[str, Any]]:
    for k, (identity, prompt, label, user) in enumerate(facts):
        both = {name: [plain(v) if np.isfinite(v) else None for v in values[k]] for name, values in scores.items()}
        yield {"id": identity, "prompt": prompt, "label": label, "user_id": user, "scores": both}


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None

"""``report.md``: what ``summary.json`` holds, to be read and sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffalign.evaluation.multiple import DESCRIPTIONS

Summary = Mapping[str, Any]
_CAPTIONS = {
    "win-rates": "Win rates with 95 % intervals; the line at 0.5 is no difference.",
    "guidance": "Mean score over guidance, with 95 % intervals.",
    "scores": "Distribution of the scores.",
    "pareto": "What each setting gives; those on the line are beaten by none in both.",
    "training": "Rewards over training, of the training batches and of the held-out prompts.",
    "kl": "Rewards over the distance to the reference model.",
}


def render(summary: Summary, plots: Sequence[str] = ()) -> str:
    """The text of a report.

    Args:
        summary: as of :func:`diffalign.evaluation.summary.summarise`.
        plots: files, relative to the report.
    """
    shown = {name.rpartition("/")[2].partition(".")[0]: name for name in plots}
    sections = [
        _head(summary),
        _warnings(summary),
        _best(summary, shown),
        _equal(summary, shown),
        _models(summary, shown),
        _diversity(summary, shown),
        _categories(summary),
        _runs(summary, shown),
        _how(summary),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(summary: Summary) -> str:
    lines = [f"# {summary['title']}", ""]
    lines += [f"- {line}" for line in summary["conclusions"]] or ["One model: nothing to compare."]
    roles = [f"{r['name']} ({r['role']})" if r["role"] else r["name"] for r in summary["rewards"]]
    lines += ["", f"Rewards: {', '.join(roles)}."]
    return "\n".join(lines)


def _warnings(summary: Summary) -> str:
    return (
        "\n".join(["## To keep in mind", "", *(f"- {line}" for line in summary["warnings"])])
        if (summary["warnings"])
        else ""
    )


def _best(summary: Summary, plots: Mapping[str, str]) -> str:
    rows = summary["comparisons"]["best"]
    if not rows:
        return ""
    scales = summary["guidance"]
    means = table(
        ("reward", "model", *(f"guidance {s:g}" for s in scales[0]["scales"]), "best"),
        [(r["reward"], r["model"], *map(_number, r["means"]), f"{r['best']:g}") for r in scales if _same(r, scales)],
    )
    text = (
        "Each half of the prompts is compared at the guidance that is best on the other half, so that no model gains "
        "by having been tried at more settings."
    )
    parts = ["## Each model at its best guidance", text, _comparisons(rows), "Mean scores:", means]
    return "\n\n".join([*parts, *_images(plots, "guidance")])


def _same(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> bool:
    return bool(row["scales"] == rows[0]["scales"])


def _equal(summary: Summary, plots: Mapping[str, str]) -> str:
    rows = summary["comparisons"]["equal"]
    if not rows:
        return ""
    return "\n\n".join(["## The same settings for all", _comparisons(rows), *_images(plots, "win-rates")])


def _comparisons(rows: Sequence[Mapping[str, Any]]) -> str:
    medians = any(row["median_win"] for row in rows)
    category = any(row["category"] for row in rows)
    head = ["reward", "model", "against", "at"] + (["category"] if category else [])
    head += ["win rate", *(["of medians"] if medians else []), "wins, ties, losses", "difference", "p"]
    body = []
    for row in rows:
        win, change = row["win"], row["difference"]
        cells = [row["reward"], row["model"], row["against"], row["setting"]] + ([row["category"]] if category else [])
        cells.append(f"{win['rate']:.3f} [{win['low']:.3f}, {win['high']:.3f}]")
        if medians:
            cells.append(f"{row['median_win']['rate']:.3f}" if row["median_win"] else "")
        cells.append(f"{win['wins']}, {win['ties']}, {win['losses']}")
        cells.append(f"{change['mean']:+.3g} [{change['low']:+.3g}, {change['high']:+.3g}]")
        cells.append(_p(row["p_adjusted"]))
        body.append(cells)
    return table(head, body)


def _models(summary: Summary, plots: Mapping[str, str]) -> str:
    rewards = [reward["name"] for reward in summary["rewards"]]
    fid = any("fid" in model for model in summary["models"])
    head = ["model", *(f"{name}, {kind}" for name in rewards for kind in ("mean", "median")), *(["FID", "KID"] * fid)]
    body = []
    for model in summary["models"]:
        scores = [_number(model["scores"][name][kind]) for name in rewards for kind in ("mean", "median")]
        body.append([model["name"], *scores, *([_number(model["fid"]), f"{model['kid']:.4f}"] if fid else [])])
    failed = sum(model["scores"][name]["failed"] for model in summary["models"] for name in rewards)
    note = f"{failed} scores are missing." if failed else ""
    text = "Means are over images, medians over prompts of the median of each prompt's images."
    return "\n\n".join(filter(None, ["## Scores", text, table(head, body), note, *_images(plots, "scores")]))


def _diversity(summary: Summary, plots: Mapping[str, str]) -> str:
    measured = [model for model in summary["models"] if "vendi" in model]
    parts = []
    if measured:
        head = ("model", "mean distance", "Vendi score", "change of distance", "Vendi, ratio")
        changes = {row["model"]: row for row in summary["diversity"]}
        body = []
        for model in measured:
            change = changes.get(model["name"])
            shown = ("", "") if change is None else (
                f"{change['mean']:+.4f} [{change['low']:+.4f}, {change['high']:+.4f}]", f"{change['vendi_ratio']:.2f}"
            )  # fmt: skip
            body.append((model["name"], f"{model['distance']:.4f}", f"{model['vendi']:.3f}", *shown))
        text = (
            f"Of the images of one prompt ({summary['images_per_prompt']:g}) by CLIP: mean pairwise 1 - cosine, and "
            "the effective number of different images. Changes are against the baseline at the same guidance."
        )
        parts += [text, table(head, body)]
    for front in summary["fronts"]:
        on = [point["model"] for point in front["points"] if point["front"]]
        parts.append(f"Nothing beats in both {front['y']} and {front['x']}: {', '.join(on)}.")
    if not parts:
        return ""
    return "\n\n".join(["## Diversity and trade-offs", *parts, *_images(plots, "pareto")])


def _categories(summary: Summary) -> str:
    rows = summary["comparisons"]["categories"]
    return "\n\n".join(["## By category", _comparisons(rows)]) if rows else ""


def _runs(summary: Summary, plots: Mapping[str, str]) -> str:
    if not summary["runs"]:
        return ""
    lines = []
    for run in summary["runs"]:
        for name, row in run["heldout"].items():
            turned = "" if row["turned_at"] is None else (
                f"; it fell after step {row['turned_at']} while the trained reward rose"
            )  # fmt: skip
            lines.append(
                f"- {run['run']}: held-out {name} from {_number(row['first'])} to {_number(row['last'])}, best "
                f"{_number(row['best'])}{turned}"
            )
    return "\n\n".join(filter(None, ["## Training", "\n".join(lines), *_images(plots, "training", "kl")]))


def _how(summary: Summary) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    scorers = [f"- {reward['name']}: `{reward['identity']}`" for reward in summary["rewards"]]
    text = (
        f"{summary['prompts']} prompts, {summary['images_of_each_model']} images of each model at each setting. "
        "Models are compared image by image: same prompt, same seed; ties count half. Intervals are 95 %: Wilson's "
        "where each prompt has one image, else a bootstrap over prompts, as for differences of scores "
        f"({summary['bootstrap_draws']} draws); p is of the sign test over prompts; "
        f"{DESCRIPTIONS[summary['correction']]}."
    )
    command = f"```bash\n{summary['command']}\n```"
    return "\n\n".join(["## How it was made", text, command, f"Versions: {versions}.", "\n".join(scorers)])


def _images(plots: Mapping[str, str], *names: str) -> list[str]:
    return [f"![{_CAPTIONS[name]}]({plots[name]})" for name in names if name in plots]


def table(head: Iterable[str], body: Iterable[Iterable[Any]]) -> str:
    """A table of Markdown; a bar within a cell is escaped."""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (list(head), *body)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"

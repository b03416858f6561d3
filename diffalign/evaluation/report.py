"""``report.md``: what ``summary.json`` holds, to be read and sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from diffalign.evaluation.multiple import DESCRIPTIONS

Summary = Mapping[str, Any]
_MEASURES = {"distance": "CLIP distance", "lpips": "LPIPS", "vendi": "Vendi score"}
_CAPTIONS = {
    "win-rates": "Win rates with 95 % intervals; the line at 0.5 is no difference.",
    "examples": "Rows from the largest gain to the largest loss, each model at its best setting.",
    "guidance": "Mean score over guidance, with 95 % intervals.",
    "steps": "Mean score over denoising steps, with 95 % intervals.",
    "scale": "Mean score over the scale of the LoRA, with 95 % intervals; dotted: the baseline.",
    "trained": "Mean score of the checkpoints over training steps, with 95 % intervals; dotted: the baseline.",
    "scores": "Distribution of the scores.",
    "pareto": "What each setting gives; those on the line are beaten by none in both.",
    "training": "Over training, of the batches (thin: each, thick: their running mean) and of the held-out prompts.",
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
        *_images(shown, "examples"),
        _best(summary, shown),
        _equal(summary, shown),
        _sweep(summary, shown, "steps", "Numbers of steps"),
        _sweep(summary, shown, "scale", "Scales of the LoRA"),
        _sweep(summary, shown, "trained", "Over training"),
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
    text = (
        "Each half of the prompts is compared at the guidance that is best on the other half, so that no model gains "
        "by having been tried at more settings."
    )
    parts = ["## Each model at its best guidance", text, _comparisons(rows), "Mean scores:"]
    return "\n\n".join([*parts, _means(summary["sweeps"]["guidance"], "guidance"), *_images(plots, "guidance")])


def _sweep(summary: Summary, plots: Mapping[str, str], axis: str, title: str) -> str:
    rows = summary["sweeps"][axis]
    if not rows:
        return ""
    return "\n\n".join([f"## {title}", "Mean scores:", _means(rows, ""), *_images(plots, axis)])


def _means(rows: Sequence[Mapping[str, Any]], unit: str) -> str:
    """A table of mean scores over a setting; a dash where a model was not drawn at a value of it."""
    values = sorted({value for row in rows for value in row["at"]})
    body = []
    for row in rows:
        known = dict(zip(row["at"], row["means"], strict=True))
        body.append([row["reward"], row["model"], *(_number(known.get(v)) for v in values), f"{row['best']:g}"])
    return table(("reward", "model", *(f"{unit} {value:g}".strip() for value in values), "best"), body)


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
    parts = [*_spread(summary), *_reference(summary)]
    for front in summary["fronts"]:
        on = [point["model"] for point in front["points"] if point["front"]]
        parts.append(f"Nothing beats in both {front['y']} and {front['x']}: {', '.join(on)}.")
    if not parts:
        return ""
    return "\n\n".join(["## Diversity and trade-offs", *parts, *_images(plots, "pareto")])


def _spread(summary: Summary) -> list[str]:
    """How different the images of a prompt are, and how that changed."""
    names = [name for name in _MEASURES if any(name in model for model in summary["models"])]
    if not names:
        return []
    changes = {row["model"]: row for row in summary["diversity"]}
    pairwise = [name for name in names if name != "vendi"]
    head = ["model", *(_MEASURES[name] for name in names), *(f"change of {_MEASURES[name]}" for name in pairwise)]
    head += ["Vendi, ratio"] if "vendi" in names else []
    body = []
    for model in summary["models"]:
        change = changes.get(model["name"])
        cells = [model["name"], *(f"{model[name]:.4f}" for name in names)]
        for name in pairwise:
            one = change["changes"][name] if change is not None else None
            cells.append("" if one is None else f"{one['mean']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]")
        if "vendi" in names:
            cells.append("" if change is None else f"{change['vendi_ratio']:.2f}")
        body.append(cells)
    text = (
        f"Of the images of one prompt ({summary['images_per_prompt']:g}): their mean pairwise distances, and the "
        "effective number of different images (Vendi score, by CLIP). Changes are against the baseline at the same "
        "settings."
    )
    return [text, table(head, body)]


def _reference(summary: Summary) -> list[str]:
    if not summary["reference"]:
        return []
    reference = summary["reference"]
    return [
        f"Realism is the distance of all images of a model to those of `{reference['images']}` by the features of "
        f"{reference['features']}: see FID and KID under Scores."
    ]


def _categories(summary: Summary) -> str:
    rows = summary["comparisons"]["categories"]
    return "\n\n".join(["## By category", _comparisons(rows)]) if rows else ""


def _runs(summary: Summary, plots: Mapping[str, str]) -> str:
    if not summary["runs"]:
        return ""
    lines = []
    for run in summary["runs"]:
        course = [
            f"{name} from {_number(row['first'])} to {_number(row['last'])}" for name, row in run["shown"].items()
        ]
        lines.append(f"- {run['run']}: {run['steps']:g} steps" + (f"; {', '.join(course)}" if course else ""))
        for name, row in run["heldout"].items():
            turned = "" if row["turned_at"] is None else (
                f"; it fell after step {row['turned_at']} while the trained reward rose"
            )  # fmt: skip
            lines.append(
                f"  - held-out {name} from {_number(row['first'])} to {_number(row['last'])}, best "
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

"""``diffalign eval``: models x prompts x seeds -> images -> scores -> statistics, plots and a report.

The folder holds ``images/`` (a folder of each model at each setting, see :mod:`diffalign.evaluation.folder`),
``cache/`` (scores by content of the image), ``scores.jsonl`` (a row an image), ``images.html`` (all images side by
side), ``summary.json``, ``report.md`` and ``plots/``. Images and scores are kept as they are made, and everything else
is made from them: a run that was killed makes no image and no score twice, and ends with the report of one that was
not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from numpy.typing import NDArray
from tqdm.auto import tqdm

from diffalign.config import command_line, save_yaml, to_dict
from diffalign.data.prompts import Prompt
from diffalign.evaluation.comparisons import Scores, Variant
from diffalign.evaluation.curves import Curves, read_curves
from diffalign.evaluation.distribution import distances
from diffalign.evaluation.eval_config import EvalConfig
from diffalign.evaluation.folder import Case, SampleFolder, read_rows, write_atomically, write_rows
from diffalign.evaluation.html import page_of_rows, write_page
from diffalign.evaluation.report import render
from diffalign.evaluation.sampling import Drawer, plan, slug
from diffalign.evaluation.score_file import plain
from diffalign.evaluation.summary import Diversities, summarise
from diffalign.rewards.combine import RewardSpec, load_rewards
from diffalign.rewards.diversity import Diversity
from diffalign.rewards.failures import FailureLedger, guarded
from diffalign.rewards.inputs import as_rows
from diffalign.rewards.reward_set import Member
from diffalign.rewards.score_cache import CachedReward, ScoreCache

__all__ = ["EvalConfig", "EvalResult", "run_eval"]

Floats = NDArray[np.float64]
IMAGES, CACHE, PLOTS = "images", "cache", "plots"


@dataclass(frozen=True)
class EvalResult:
    """Where the report is, and what ``summary.json`` holds."""

    report: Path
    summary: Mapping[str, Any]


def run_eval(config: EvalConfig) -> EvalResult | None:
    """Draw what is missing, score what is missing, and write the report.

    Returns:
        None on processes other than the first, which only help to draw.

    Raises:
        UserError: a model, reward, prompt or setting is wrong, or the folder holds other images; before anything is
            drawn, as far as it can be known.
        RewardError: an image cannot be scored, and the policy does not bear it. What was scored is kept.
    """
    if config.plots:
        from diffalign.evaluation.plots import need_matplotlib

        need_matplotlib()
    variants, prompts, root = config.variants(), config.read_prompts(), Path(config.output_dir)
    cases = plan(
        [prompt.text for prompt in prompts],
        seeds=config.seeds,
        seed=config.seed,
        num_images_per_prompt=config.num_images_per_prompt,
    )
    judge = _Judge(config, prompts, cases)
    drawer = Drawer(config)
    folders = {
        variant: drawer.draw(spec, cases, root / IMAGES / name)
        for (variant, spec), name in zip(variants.items(), _folder_names(list(variants)), strict=True)
    }
    if not PartialState().is_main_process:
        return None
    drawer.release()
    save_yaml(to_dict(config), root / "config.yaml")
    scores = {member.name: judge.scores(member, folders) for member in judge.members}
    diversities = judge.diversities(folders)
    table = [_aligned(name, by_variant, cases, prompts) for name, by_variant in scores.items()]
    _write_scores(root, folders, cases, prompts, scores, diversities)
    curves = read_curves(config.runs)
    summary = summarise(
        table,
        diversities=diversities,
        distances=distances(config.reference_images, folders, cases, config.device),
        curves=curves,
        rewards=judge.described(config.roles(list(variants.values()))),
        config=config,
    )
    result = EvalResult(root / "report.md", summary)
    _write_report(config, result, table, curves)
    return result


class _Judge:
    """The rewards of an evaluation; each is loaded alone, and let go when it has scored everything."""

    def __init__(self, config: EvalConfig, prompts: Sequence[Prompt], cases: Sequence[Case]) -> None:
        self.config, self.prompts, self.cases = config, prompts, cases
        self.ledger = FailureLedger()
        self.cache = ScoreCache(Path(config.output_dir) / CACHE)
        options: dict[str, Any] = {"device": config.device, "batch_size": config.score_batch_size}
        # Here every reward judges, and none is trained by: that is what eval_only tells apart in training.
        specs = [
            replace(RewardSpec.of(item, f"rewards[{index}]"), eval_only=False)
            for index, item in enumerate(config.rewards)
        ]
        self.members = load_rewards(specs, cache=self.cache, **options).members
        several = len({case.index for case in cases}) < len(cases)
        self.diversity = (
            Member("diversity", CachedReward(Diversity(config.diversity, **options), self.cache))
            if several and config.diversity is not None
            else None
        )
        # Before hours of drawing, find out that a prompt cannot be judged or a checkpoint is not there.
        for member in [*self.members, *([self.diversity] if self.diversity else [])]:
            as_rows(
                [prompt.metadata for prompt in prompts], len(prompts), member.name, member.reward.required_metadata
            )
            member.reward.check_prompts([prompt.text for prompt in prompts])
            assert member.reward.identity

    def described(self, roles: Mapping[str, str]) -> list[dict[str, str]]:
        """Name, identity and role of each reward; roles are known by the text of the list, in its order."""
        return [
            {"name": member.name, "identity": member.reward.identity, "role": role}
            for member, role in zip(self.members, roles.values(), strict=True)
        ]

    def scores(self, member: Member, folders: Mapping[Variant, SampleFolder]) -> dict[Variant, Floats]:
        """Scores of each model's images, (n,), NaN where there is none."""
        return {variant: rewards for variant, (rewards, _) in self._outputs(member, folders).items()}

    def diversities(self, folders: Mapping[Variant, SampleFolder]) -> Diversities | None:
        """Mean distances and Vendi scores by model and prompt; None where each prompt has one image."""
        if self.diversity is None:
            return None
        outputs = self._outputs(self.diversity, folders)
        groups = [case.index for case in self.cases]
        order = list(dict.fromkeys(groups))
        first = np.array([groups.index(index) for index in order])
        distance = {
            variant: np.array([np.mean(rewards[[g == index for g in groups]]) for index in order])
            for variant, (rewards, _) in outputs.items()
        }
        return Diversities(order, distance, {v: details["vendi"][first] for v, (_, details) in outputs.items()})

    def _outputs(
        self, member: Member, folders: Mapping[Variant, SampleFolder]
    ) -> dict[Variant, tuple[Floats, dict[str, Floats]]]:
        try:
            return {variant: self._output(member, variant, folder) for variant, folder in folders.items()}
        finally:
            member.reward.close()

    def _output(self, member: Member, variant: Variant, folder: SampleFolder) -> tuple[Floats, dict[str, Floats]]:
        rewards, details = [], []
        with tqdm(total=len(self.cases), unit="image", desc=f"{member.name}: {variant.name}") as bar:
            for chunk in self._chunks():
                output = guarded(
                    member.reward,
                    [folder.image(case) for case in chunk],
                    [case.prompt for case in chunk],
                    [self.prompts[case.index].metadata for case in chunk],
                    group_ids=[case.index for case in chunk] if member.reward.mode == "groupwise" else None,
                    policy=self.config.policy(),
                    ledger=self.ledger,
                    names=[str(folder.path / case.file) for case in chunk],
                )
                rewards.append(output.rewards.double().cpu().numpy())
                details.append({key: value.double().cpu().numpy() for key, value in output.details.items()})
                bar.update(len(chunk))
        shared = set(details[0]).intersection(*details)
        return np.concatenate(rewards), {key: np.concatenate([d[key] for d in details]) for key in shared}

    def _chunks(self) -> Iterator[list[Case]]:
        """Cases that are scored together: whole prompts, about ``score_batch_size`` images."""
        chunk: list[Case] = []
        for position, case in enumerate(self.cases):
            if len(chunk) >= self.config.score_batch_size and case.index != self.cases[position - 1].index:
                yield chunk
                chunk = []
            chunk.append(case)
        yield chunk


def _folder_names(variants: Sequence[Variant]) -> list[str]:
    """A folder of each; numbered where two names differ only in what a folder cannot be called."""
    names: list[str] = []
    for variant in variants:
        name = slug(f"{variant.model}-g{variant.guidance:g}-s{variant.steps}")
        taken = {other.lower() for other in names}
        names.append(name if name.lower() not in taken else f"{name}-{len(names)}")
    return names


def _category(prompt: Prompt) -> str:
    value = prompt.metadata.get("category")
    return "" if value is None else str(value)


def _aligned(
    name: str, by_variant: Mapping[Variant, Floats], cases: Sequence[Case], prompts: Sequence[Prompt]
) -> Scores:
    indices = np.array([case.index for case in cases], dtype=np.int64)
    return Scores(name, by_variant, indices, [_category(prompts[case.index]) for case in cases])


def _write_scores(
    root: Path,
    folders: Mapping[Variant, SampleFolder],
    cases: Sequence[Case],
    prompts: Sequence[Prompt],
    scores: Mapping[str, Mapping[Variant, Floats]],
    diversities: Diversities | None,
) -> None:
    write_rows(
        root / "scores.jsonl",
        [
            {
                "prompt_index": case.index,
                "prompt": case.prompt,
                "category": _category(prompts[case.index]),
                "seed": case.seed,
                "model": variant.name,
                "base_name": variant.model,
                "guidance_scale": variant.guidance,
                "num_inference_steps": variant.steps,
                "file": f"{IMAGES}/{folder.path.name}/{case.file}",
                "scores": {name: _number(by_variant[variant][k]) for name, by_variant in scores.items()},
            }
            for variant, folder in folders.items()
            for k, case in enumerate(cases)
        ],
    )
    if diversities is None:
        return
    rows = [
        {"model": v.name, "prompt_index": index, "distance": plain(distance[k]), "vendi": plain(vendi[k])}
        for v in folders
        for distance, vendi in [(diversities.distance[v], diversities.vendi[v])]
        for k, index in enumerate(diversities.prompts)
    ]
    write_rows(root / "diversity.jsonl", rows)


def _number(score: float) -> float | None:
    return plain(score) if math.isfinite(score) else None


def _write_report(config: EvalConfig, result: EvalResult, table: Sequence[Scores], curves: Sequence[Curves]) -> None:
    root = result.report.parent
    names: list[str] = []
    if config.plots:
        from diffalign.evaluation.plots import draw_plots

        names = draw_plots(root / PLOTS, result.summary, table, curves)
    text = json.dumps(result.summary, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(root / "summary.json", text + "\n")
    write_atomically(result.report, render(result.summary, [f"{PLOTS}/{name}" for name in names]))
    if config.html != "none":
        page = page_of_rows(
            read_rows(root / "scores.jsonl"),
            root,
            title=config.title,
            footer="All images and their scores, by model and setting.",
            command=command_line("diffalign eval", config),
        )
        write_page(root / "images.html", page, config.html)
    for line in result.summary["conclusions"]:
        print(line)
    print(result.report)

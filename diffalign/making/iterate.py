"""``diffalign iterate``: rounds of drawing, scoring and training, each on the model that the round before left.

    output_dir/round-0/prompts.jsonl    the round's prompts
              /round-0/pairs/           images, scores and train.parquet of ``diffalign pairs``
              /round-0/train/           a run of ``diffalign train METHOD``, with the round's LoRA
              /round-0/round.json       what came out; the round is done when this is there
              /round-1/...
              /pytorch_lora_weights.safetensors   the LoRA of the last round

Every round's LoRA is one for the base model: a round goes on with the LoRA of the round before (``initial_lora``).
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from accelerate import PartialState
from diffusers.training_utils import free_memory

from diffalign import recipes
from diffalign.config import field, from_dict, load_yaml, to_dict
from diffalign.data.prompts import Prompt, read_prompts
from diffalign.errors import UserError
from diffalign.evaluation.folder import read_rows, write_atomically, write_rows
from diffalign.making.pairs import PairsConfig, run_pairs
from diffalign.making.settings import hold_to
from diffalign.pipelines.lora import WEIGHTS_NAME
from diffalign.trainers import load_method
from diffalign.training.config import PairConfig

logger = logging.getLogger(__name__)

SEED_STRIDE = 1_000_003
"""Distance of the seeds of two rounds' images."""
_SET_BY_ROUND = {
    "pairs": (
        "prompts",
        "prompts_file",
        "max_prompts",
        "lora",
        "output_dir",
        "split",
        "overwrite_output_dir",
        "seeds",
    ),
    "train": ("dataset_name", "dataset_split", "output_dir", "initial_lora", "reference", "resume_from_checkpoint"),
}


@dataclass(kw_only=True)
class IterateConfig:
    """Iterated (online) preference learning: draw, score, train, and again with the model that came out.

    A run that was stopped goes on where it was when the same command is given again.
    """

    pretrained_model_name_or_path: str = field(help="Pipeline folder, hub id, or a bundled name such as shapes-sdxl.")
    output_dir: str = field(help="Folder for the rounds (also: --out).")
    overwrite_output_dir: bool = field(False, help="Delete the rounds that an earlier run left in output_dir.")
    rounds: int = field(3, help="Rounds; more can be added to a finished run.")
    prompts_file: str = field(help="Text file (a prompt a line), JSONL file, shapes-train or shapes-heldout.")
    prompts_per_round: int = field(256, help="Prompts of a round; the next round takes the next ones, around the end.")
    seed: int = field(0, help="Seed of images and training; each round has its own.")
    reference: Literal["start", "base"] = field(
        "start", help="What a round compares with: the model that the round starts from, or the base model."
    )
    pairs: dict[str, Any] = field({}, help="Settings of diffalign pairs: rewards, select, num_images_per_prompt, ...")
    method: str = field("dpo", help="A method that learns from pairs.")
    recipe: str | None = field(None, help="Recipe or YAML file with settings of the method.")
    train: dict[str, Any] = field({}, help="Settings of the method; they win over the recipe's.")

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts_per_round"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for part, names in _SET_BY_ROUND.items():
            for name in names:
                if name in getattr(self, part):
                    raise UserError(f"{part}.{name} is set by the rounds; leave it out")
        self.pairs_config(0, Path("prompts.jsonl"))
        self.train_config(0)

    def folder(self, number: int) -> Path:
        """The folder of a round."""
        return Path(self.output_dir) / f"round-{number}"

    def start(self, number: int) -> Path | None:
        """The LoRA that a round starts from; None for the first."""
        return self.folder(number - 1) / "train" if number else None

    def pairs_config(self, number: int, prompts: Path) -> PairsConfig:
        """What a round draws and chooses."""
        start = self.start(number)
        settings = {
            "pretrained_model_name_or_path": self.pretrained_model_name_or_path,
            "seed": self.seed + SEED_STRIDE * number,
            **self.pairs,
            "prompts_file": str(prompts),
            "lora": [str(start)] if start else [],
            "output_dir": str(self.folder(number) / "pairs"),
        }
        return from_dict(PairsConfig, settings, "pairs")

    def train_config(self, number: int) -> PairConfig:
        """What a round trains."""
        config_class, _ = load_method(self.method)
        if not issubclass(config_class, PairConfig):
            raise UserError(
                f"method {self.method} does not learn from pairs; iterate needs one that does, such as dpo"
            )
        start = self.start(number)
        base = load_yaml(recipes.resolve(self.recipe)) if self.recipe else {}
        settings = {
            **base,
            "seed": self.seed + number,
            **self.train,
            "pretrained_model_name_or_path": self.pretrained_model_name_or_path,
            "dataset_name": str(self.folder(number) / "pairs"),
            "output_dir": str(self.folder(number) / "train"),
            "initial_lora": str(start) if start else None,
            "reference": self.reference,
            "resume_from_checkpoint": "latest",
        }
        config: PairConfig = from_dict(config_class, settings, "train")
        if config.train_mode != "lora":
            raise UserError("iterate hands a LoRA from round to round: train_mode must be lora")
        return config


def run_iterate(config: IterateConfig) -> Path:
    """Run the rounds that are not done, and return the folder with the last LoRA.

    Raises:
        UserError: a setting is wrong, or the folder holds rounds of another configuration.
    """
    root = Path(config.output_dir)
    state = PartialState()
    if state.is_main_process:
        if config.overwrite_output_dir:
            for folder in root.glob("round-*"):
                shutil.rmtree(folder)
        settings = {
            k: v for k, v in to_dict(config).items() if k not in ("rounds", "overwrite_output_dir", "output_dir")
        }
        remedy = "Choose another --output_dir, or give --overwrite_output_dir to begin anew."
        hold_to(root / "iterate.json", settings, remedy, overwrite=config.overwrite_output_dir)
    state.wait_for_everyone()
    prompts = read_prompts(config.prompts_file, limit=config.rounds * config.prompts_per_round, seed=config.seed)
    for number in range(config.rounds):
        if not (config.folder(number) / "round.json").exists():
            _run_round(config, number, _share(prompts, config, number), state)
        if state.is_main_process:
            print(_line(number, json.loads((config.folder(number) / "round.json").read_text(encoding="utf-8"))))
    if state.is_main_process:
        _copy(config.folder(config.rounds - 1) / "train" / WEIGHTS_NAME, root / WEIGHTS_NAME)
        print(root / WEIGHTS_NAME)
    state.wait_for_everyone()
    return root


def _run_round(config: IterateConfig, number: int, prompts: Sequence[Prompt], state: PartialState) -> None:
    folder = config.folder(number)
    file = folder / "prompts.jsonl"
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_rows(file, [{"prompt": prompt.text, **prompt.metadata} for prompt in prompts])
        print(f"round {number}: {len(prompts)} prompts", flush=True)
    state.wait_for_everyone()
    run_pairs(config.pairs_config(number, file))
    _, trainer = load_method(config.method)
    trainer(config.train_config(number)).train()
    free_memory()
    if state.is_main_process:
        write_atomically(folder / "round.json", json.dumps(_summary(config, number), indent=2) + "\n")
    state.wait_for_everyone()


def _share(prompts: Sequence[Prompt], config: IterateConfig, number: int) -> list[Prompt]:
    """The prompts of a round: the next ones, beginning again at the end of the list; never one twice."""
    count = min(config.prompts_per_round, len(prompts))
    return [prompts[(number * count + i) % len(prompts)] for i in range(count)]


def _summary(config: IterateConfig, number: int) -> dict[str, Any]:
    """What is known of a finished round: its samples are of the model that it started from."""
    import pyarrow.parquet as pq

    folder = config.folder(number)
    rows = read_rows(folder / "pairs" / "train.scores.jsonl")
    names = list(rows[0]["scores"])
    start = config.start(number)
    return {
        "round": number,
        "started_from": str(start) if start else config.pretrained_model_name_or_path,
        "reference": "base" if start is None or config.reference == "base" else str(start),
        "images": len(rows),
        "pairs": pq.read_metadata(folder / "pairs" / "train.parquet").num_rows,
        "mean_total": _mean([row["total"] for row in rows]),
        "mean_scores": {name: _mean([row["scores"][name] for row in rows]) for name in names},
        "lora": str(folder / "train" / WEIGHTS_NAME),
    }


def _mean(values: Sequence[float | None]) -> float:
    return float(np.mean([value for value in values if value is not None]))


def _line(number: int, summary: dict[str, Any]) -> str:
    scores = ", ".join(f"{name} {value:.4g}" for name, value in summary["mean_scores"].items())
    return f"round {number}: samples of {summary['started_from']} score {scores}; {summary['pairs']} pairs trained on"


def _copy(source: Path, target: Path) -> None:
    aside = target.with_name(f".{target.name}.tmp")
    shutil.copyfile(source, aside)
    aside.replace(target)

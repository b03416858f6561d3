"""``diffalign difficulty``: which pairs are too hard to learn from, and the set without them.

Gao et al., "Principled Data Selection for Alignment: The Hidden Risks of Difficult Examples", 2025, arXiv 2502.09650
(Selective DPO). A pair's difficulty is its loss under models that were not trained on it: for each of ``seeds`` the
set is cut in two halves, a model is trained on each, and each judges the other half (3 seeds: 6 models, 3 losses a
pair). The easiest share is kept, sorted from easy to hard, to be trained on in that order (``data_order sequential``).

What differs from the paper, which is about language models: halves are cut between prompts, so that no prompt is in
both; and a loss is a mean over ``draws`` timesteps and noises of a pair, the same for all models.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import PartialState
from diffusers.training_utils import free_memory
from numpy.typing import NDArray
from tqdm.auto import tqdm

from diffalign import recipes
from diffalign.config import field, from_dict, load_yaml
from diffalign.data.order import collate
from diffalign.data.readers import PairSource, open_pairs
from diffalign.data.selection import easiest
from diffalign.data.write import PairRow, write_pairs
from diffalign.diffusion.random import keyed_permutation
from diffalign.errors import UserError
from diffalign.evaluation.folder import write_rows
from diffalign.making.ledger import Ledger
from diffalign.pipelines.lora import WEIGHTS_NAME
from diffalign.trainers import load_method
from diffalign.training.pair_loss import PairLossConfig, PairTrainer

logger = logging.getLogger(__name__)

Half = Literal["a", "b"]
_OTHER: dict[Half, Half] = {"a": "b", "b": "a"}
_SET_HERE = (
    *("dataset_name", "dataset_split", "output_dir", "seed", "initial_lora", "reference", "resume_from_checkpoint"),
    *("columns", "ties", "max_train_samples", "dataset_config_name", "train_mode"),
)


@dataclass(kw_only=True)
class DifficultyConfig:
    """Sort pairs from easy to hard by the loss of models that did not see them, and keep the easy ones.

    The result is <output_dir>/<split>.parquet. A stopped run goes on; another --keep trains nothing anew.
    """

    dataset_name: str = field(help="Pairs: a folder, a parquet or JSONL file, a hub id, or the bundled shapes-pairs.")
    dataset_config_name: str | None = field(None, help="Configuration of the hub data set.")
    dataset_split: str = field("train", help="Split to sort.")
    columns: dict[str, str] | None = field(None, help="Column names, where they differ: {prompt: my_caption, ...}.")
    max_pairs: int | None = field(None, help="Use only the first so many pairs.")
    output_dir: str = field(help="Folder for the result (also: --out).")
    overwrite_output_dir: bool = field(False, help="Begin anew where output_dir holds the work of an earlier run.")
    keep: float = field(0.5, help="Share of the pairs to keep, the easiest. Paper: 0.5, with a single model 0.6.")
    seeds: int = field(3, help="Ways to cut the set in halves; each trains two models.")
    draws: int = field(8, help="Timesteps and noises that a pair's loss is a mean over.")
    method: str = field("dpo", help="The method whose loss is the difficulty; one with a logit against a reference.")
    recipe: str | None = field(None, help="Recipe or YAML file with settings of the method.")
    train: dict[str, Any] = field({}, help="Settings of the method; they win over the recipe's.")
    seed: int = field(0, help="Seed of the halves and of training.")

    def __post_init__(self) -> None:
        for name in ("seeds", "draws"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.keep <= 1:
            raise UserError(f"keep must be a share in (0, 1], got {self.keep}")
        for name in _SET_HERE:
            if name in self.train:
                raise UserError(f"train.{name} is set here; leave it out")
        self.train_config(Path("half"), Path("model"), 0)

    def train_config(self, half: Path, folder: Path, number: int) -> PairLossConfig:
        """A run on the pairs in the folder ``half``."""
        config_class, trainer = load_method(self.method)
        if not issubclass(trainer, PairTrainer):
            raise UserError(f"method {self.method} does not learn from pairs, so it has no loss of a pair")
        base = load_yaml(recipes.resolve(self.recipe)) if self.recipe else {}
        settings = {key: value for key, value in base.items() if key not in _SET_HERE}
        settings |= self.train | {
            "dataset_name": str(half),
            "output_dir": str(folder),
            "seed": self.seed + number,
            "resume_from_checkpoint": "latest",
        }
        config: PairLossConfig = from_dict(config_class, settings, "train")
        return config


def run_difficulty(config: DifficultyConfig) -> Path:
    """Train what is missing of the models, sort, and return the parquet file.

    Raises:
        UserError: a setting or the set is wrong, the folder holds other work, or there are several processes.
    """
    if PartialState().num_processes > 1:
        raise UserError("diffalign difficulty runs on one process; start it without accelerate launch")
    root = Path(config.output_dir)
    if config.overwrite_output_dir:
        shutil.rmtree(root / "models", ignore_errors=True)
    source = open_pairs(
        config.dataset_name,
        split=config.dataset_split,
        config_name=config.dataset_config_name,
        columns=config.columns,
        max_pairs=config.max_pairs,
    )
    if not isinstance(source, PairSource):
        raise UserError(f"{config.dataset_name} is streamed; sorting needs a set that stays where it is.")
    ledger = Ledger(root, f"{config.dataset_split}.losses", _settings(config))
    ledger.open(overwrite=config.overwrite_output_dir)
    prompts = [pair.prompt for pair in source]
    for number in range(config.seeds):
        halves = split_by_prompt(prompts, config.seed, number)
        for half in halves:
            if f"{number} {half}" not in ledger:
                losses = _losses_of(config, source, halves, half, number)
                ledger.add(f"{number} {half}", losses)
    return _write(config, source, ledger)


def split_by_prompt(prompts: Sequence[str], seed: int, number: int) -> dict[Half, list[int]]:
    """Indices of the pairs in each half: about equally many, and no prompt in both.

    Args:
        prompts: of each pair; they are equal whatever their case and the spaces around them.
        seed, number: each number is another way to cut.

    Raises:
        UserError: there is only one prompt.
    """
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt.strip().lower(), []).append(index)
    if len(groups) < 2:
        raise UserError(f"halves are cut between prompts, and there is only one: {next(iter(groups))!r}")
    members = list(groups.values())
    halves: dict[Half, list[int]] = {"a": [], "b": []}
    for place in keyed_permutation(len(members), seed, "halves", number).tolist():
        smaller: Half = "a" if len(halves["a"]) <= len(halves["b"]) else "b"
        halves[smaller] += members[place]
    return {half: sorted(indices) for half, indices in halves.items()}


def _settings(config: DifficultyConfig) -> dict[str, Any]:
    train = config.train_config(Path("half"), Path("model"), 0)
    own = {key: value for key, value in vars(train).items() if key not in ("cache_dir", "report_to", "output_dir")}
    names = ("dataset_name", "dataset_config_name", "dataset_split", "columns", "max_pairs", "draws", "method", "seed")
    return {**{name: getattr(config, name) for name in names}, "train": own}


def _losses_of(
    config: DifficultyConfig, source: PairSource, halves: Mapping[Half, Sequence[int]], half: Half, number: int
) -> dict[str, float]:
    """Train on one half; the loss of each pair of the other, by its index in the source."""
    folder = Path(config.output_dir) / "models" / f"{number}-{half}"
    data = {side: folder / f"pairs-{side}" for side in halves}
    for side, indices in halves.items():
        if not (data[side] / "train.parquet").exists():
            write_pairs(data[side] / "train.parquet", _rows(source, indices))
    _, trainer = load_method(config.method)
    trained = folder / "run"
    run = config.train_config(data[half], trained, number)
    if run.train_mode != "lora":
        raise UserError("diffalign difficulty trains LoRAs: train_mode must be lora")
    trainer(run).train()
    free_memory()
    judge = replace(
        config.train_config(data[_OTHER[half]], folder / "held-out", 0),
        initial_lora=str(trained / WEIGHTS_NAME),
        proportion_empty_prompts=0.0,
        random_flip=False,
        random_crop=False,
        lora_dropout=0.0,
        validation_prompts=None,
        report_to=["none"],
    )
    losses = held_out_losses(trainer(judge), config.draws)
    free_memory()
    # The LoRA stays to be looked at; the copies of the data and the state of the run are of no more use.
    for place in (*data.values(), folder / "held-out", *trained.glob("checkpoint-*")):
        shutil.rmtree(place, ignore_errors=True)
    return losses


def held_out_losses(trainer: PairTrainer[Any], draws: int) -> dict[str, float]:
    """The loss of each of a trainer's pairs under its policy as it is, a mean over ``draws``, by the pair's id."""
    items, size = trainer.batches.items, trainer.config.train_batch_size
    totals = torch.zeros(len(items), dtype=torch.float64)
    chunks = _chunks(items.bucket_of, size)
    with torch.no_grad(), trainer.policy.evaluating(), trainer.accelerator.autocast():
        for draw in tqdm(range(draws), desc="held-out losses", unit="draw"):
            for chunk in chunks:
                batch = collate([items[index] for index in chunk])
                keys = trainer.batches.sample_keys(batch["id"].tolist(), draw, 0)
                losses, _ = trainer.loss(trainer.errors(trainer.batches.make_batch(batch, keys)))
                totals[chunk] += losses.double().cpu()
    return dict(zip(items.ids, (totals / draws).tolist(), strict=True))


def _chunks(bucket_of: Sequence[int], size: int) -> list[list[int]]:
    """All indices, at most ``size`` of one bucket together."""
    buckets: dict[int, list[int]] = {}
    for index, bucket in enumerate(bucket_of):
        buckets.setdefault(bucket, []).append(index)
    return [own[start : start + size] for own in buckets.values() for start in range(0, len(own), size)]


def _rows(source: PairSource, indices: Sequence[int]) -> Iterator[PairRow]:
    """Pairs whose id is their index in the source, which is theirs alone."""
    for index in indices:
        yield PairRow.of(source[index], id=str(index))


def _write(config: DifficultyConfig, source: PairSource, ledger: Ledger) -> Path:
    root, split = Path(config.output_dir), config.dataset_split
    found: dict[int, list[float]] = {}
    for number in range(config.seeds):
        for half in _OTHER:
            for index, loss in ledger[f"{number} {half}"].items():
                found.setdefault(int(index), []).append(loss)
    indices = sorted(found)
    difficulty: NDArray[np.float64] = np.array([np.mean(found[index]) for index in indices])
    order = easiest(difficulty, 1.0)
    report = [
        {"pair": source[indices[k]].id, "prompt": source[indices[k]].prompt, "difficulty": difficulty[k]}
        for k in order
    ]
    write_rows(root / f"{split}.difficulty.jsonl", report)
    kept = easiest(difficulty, config.keep)
    path = root / f"{split}.parquet"
    source_name = f"{config.dataset_name} {split}"
    rows = (PairRow.of(source[indices[k]], difficulty=float(difficulty[k]), source=source_name) for k in kept)
    write_pairs(path, rows, overwrite=True)
    low, middle, high = np.quantile(difficulty, [0.05, 0.5, 0.95])
    print(f"difficulty of {len(indices)} pairs: 5 % below {low:.3f}, half below {middle:.3f}, 95 % below {high:.3f}")
    if len(indices) < len(source):
        print(f"{len(source) - len(indices)} pairs have a picture that cannot be used and were left out")
    print(f"the {len(kept)} easiest (difficulty up to {difficulty[kept[-1]]:.3f}), easy to hard: {path}")
    return path

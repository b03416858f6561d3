"""The settings of ``diffalign train-reward``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffalign.config import field
from diffalign.errors import UserError
from diffalign.rewards.objectives import TIE_CONSTANT
from diffalign.training.config import RunConfig


@dataclass(kw_only=True)
class RewardTrainingConfig(RunConfig):
    """Train a reward model on preference pairs: a CLIP, a LoRA of one, or a head on its embeddings."""

    method: Literal["reward"] = field("reward", help="Says in a recipe what it is for; nothing else can stand here.")

    # Model
    pretrained_model_name_or_path: str = field(help="CLIP to start from: folder, hub id, or shapes-clip.")
    revision: str | None = field(None, help="Revision of the model on the hub.")
    processor_name_or_path: str | None = field(
        None, help="Where tokenizer and image processor are, if not with the model."
    )
    from_scratch: bool = field(False, help="Take only config, tokenizer and processor; draw the weights at random.")
    model_config: dict[str, int | float | str] | None = field(
        None, help="For from_scratch, what to change in the config: vision_config.num_hidden_layers=4 ..."
    )
    train_mode: Literal["full", "lora", "head"] = field(
        "full", help="Train all weights, a LoRA (merged at the end), or a head on the frozen embeddings."
    )
    head_hidden: int | None = field(None, help="Width of the head's hidden layer. Default: a linear head.")
    head_dropout: float = field(0.0, help="Dropout before the head's last layer.")

    # Data
    dataset_name: str = field(help="Pairs: a folder, a parquet or JSONL file, a hub id, or the bundled shapes-pairs.")
    dataset_config_name: str | None = field(None, help="Configuration of the hub data set.")
    dataset_split: str = field("train", help="Split to train on.")
    heldout_split: str | None = field(
        None, help="Split to judge on at the end. Default: heldout_share of the prompts."
    )
    heldout_share: float = field(0.1, help="Share of prompts to judge on, where there is no heldout_split.")
    validation_share: float = field(0.1, help="Share of prompts to choose the best step and the temperature by.")
    split_seed: int = field(0, help="Seed of the split by prompt; keep it to compare runs of different seeds.")
    columns: dict[str, str] | None = field(None, help="Column names, where they differ: {prompt: my_caption, ...}.")
    ties: Literal["drop", "keep", "error"] = field("keep", help="What to do with undecided pairs; kept: label 0.5.")
    max_train_samples: int | None = field(None, help="Use only the first so many pairs.")
    max_bad_rows: int = field(10, help="Skip and list up to this many unreadable rows; more is an error.")
    random_flip: bool = field(False, help="Flip half of the pairs; wrong where prompts say left and right.")
    random_shift: float = field(0.0, help="Shift both images of a pair alike, by up to this share of their side.")

    # Objective
    objective: Literal["pickscore", "rao_kupper"] = field(
        "pickscore", help="Bradley-Terry with soft labels, or Rao and Kupper's form in which a tie is an outcome."
    )
    tie_constant: float = field(TIE_CONSTANT, help="k of rao_kupper, above 1: the higher, the more ties.")
    weight_by_prompt: bool = field(True, help="Weigh a pair by 1 / the number of pairs of its prompt.")
    contrastive_weight: float = field(
        0.0, help="Weight of CLIP's own loss on the preferred images; for towers that are not trained yet."
    )

    # Evaluation and export
    eval_steps: int = field(100, help="Score the validation part every so many steps, and at step 0.")
    eval_batch_size: int = field(64, help="Pairs in one forward pass of an evaluation.")
    best_metric: Literal["accuracy", "loss"] = field("accuracy", help="What the best step is chosen by.")
    early_stopping_patience: int | None = field(None, help="Stop after so many evaluations without a new best.")
    calibrate: bool = field(True, help="Divide scores by the temperature that fits the validation part.")
    save_dtype: Literal["float32", "float16"] = field("float32", help="Type of the saved weights.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("eval_steps", "eval_batch_size"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("rank", self.train_mode != "lora" or self.rank >= 1, "at least 1; it is the width of the LoRA")
        self._require("head_hidden", self.head_hidden is None or self.head_hidden >= 1, "at least 1, or none")
        self._require("head_dropout", 0 <= self.head_dropout < 1, "in [0, 1)")
        self._require("validation_share", 0 < self.validation_share < 1, "in (0, 1): the best step is chosen by it")
        share = self.validation_share + (0 if self.heldout_split else self.heldout_share)
        self._require("heldout_share", self.heldout_share > 0 and share < 1, "above 0 and leave prompts to train on")
        self._require("random_shift", 0 <= self.random_shift < 0.5, "in [0, 0.5)")
        self._require("tie_constant", self.tie_constant > 1, "above 1; at 1 a tie is impossible")
        self._require("contrastive_weight", self.contrastive_weight >= 0, "0 or more")
        self._require("max_bad_rows", self.max_bad_rows >= 0, "0 or more")
        samples, patience = self.max_train_samples, self.early_stopping_patience
        self._require("max_train_samples", samples is None or samples >= 1, "at least 1")
        self._require("early_stopping_patience", patience is None or patience >= 1, "at least 1, or none")
        self._refuse_what_nothing_reads()

    def _refuse_what_nothing_reads(self) -> None:
        """Settings that would be silently without effect are errors."""
        if self.model_config and not self.from_scratch:
            raise UserError("model_config changes the shape of the model, so it needs from_scratch")
        if self.from_scratch and self.train_mode != "full":
            raise UserError(
                f"from_scratch needs train_mode full: weights at random have no use in a {self.train_mode}"
            )
        if self.train_mode != "head" and (self.head_hidden or self.head_dropout):
            raise UserError(f"head_hidden and head_dropout need train_mode head, got {self.train_mode}")
        if self.train_mode == "head" and (self.random_flip or self.random_shift or self.contrastive_weight):
            raise UserError(
                "train_mode head computes the embeddings once: random_flip, random_shift and contrastive_weight need "
                "train_mode lora or full"
            )

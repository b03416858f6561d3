"""The run of ``diffalign train-reward``."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from diffalign.assets import BUNDLED
from diffalign.config import write_text
from diffalign.data.order import SampleOrder, collate
from diffalign.evaluation.calibration import fit_temperature, negative_log_likelihood, pairwise_accuracy
from diffalign.rewards.objectives import bradley_terry_losses, contrastive_loss, rao_kupper_losses
from diffalign.rewards.trained import FORMAT, REWARD_FILE
from diffalign.trainers.reward.config import RewardTrainingConfig
from diffalign.trainers.reward.data import (
    EmbeddedPairs,
    Key,
    Part,
    PixelPairs,
    StepSampler,
    indices_of_step,
    normalised,
    open_parts,
)
from diffalign.trainers.reward.report import Scores, accuracy_of, make_report, write_report
from diffalign.trainers.reward.scorer import (
    MAX_LOGIT_SCALE,
    HeadScorer,
    divide,
    embed_all,
    load_trained_state,
    make_encoder,
    make_scorer,
    processor_of,
    save_model,
    trained_state,
)
from diffalign.training.checkpoints import find_checkpoints, load_state, space_errors
from diffalign.training.run_log import RunLog
from diffalign.training.steps import Batches, StepLoop

logger = logging.getLogger(__name__)

_STATE_FILE = "weights.safetensors"
Pairs = Dataset[dict[str, object]]


@dataclass
class PreferenceBatch:
    """B pairs on the device, preferred image first."""

    images: Tensor
    """Pixels (2B, 3, H, W) or unit embeddings (2B, P); the preferred ones first."""
    texts: Tensor
    """Token ids (B, L) or unit embeddings (B, P)."""
    label: Tensor
    """Probability that the first is preferred, (B,)."""
    weight: Tensor
    """(B,); the mean over micro-batches and processes of sum(weight * loss) is the step's weighted mean loss."""
    same: Tensor
    """Which pairs have the same prompt, (B, B) bool."""


class PreferenceBatches(Batches[PreferenceBatch]):
    """Streams the training part in the order of the run."""

    def __init__(self, trainer: RewardTrainer, part: Part, pairs: Pairs) -> None:
        self.trainer, self.part, self.pairs = trainer, part, pairs
        self.samples = len(part)
        config, accelerator = trainer.config, trainer.accelerator
        self.order = SampleOrder(
            [0] * len(part),
            seed=config.seed,
            train_batch_size=config.train_batch_size,
            world_size=accelerator.num_processes,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
        )

    def stream(self, start_step: int, stop_step: int) -> Iterator[PreferenceBatch]:
        config, rank = self.trainer.config, self.trainer.accelerator.process_index
        sampler = StepSampler(self.order, start_step=start_step, stop_step=stop_step, rank=rank)
        loader = iter(
            DataLoader(
                self.pairs,
                batch_sampler=sampler,
                num_workers=config.dataloader_num_workers,
                collate_fn=collate,
                # Otherwise it draws from the global stream, of which the dropout of the first step is made.
                generator=torch.Generator(),
            )
        )
        for step in range(start_step, stop_step):
            total = self.weights(indices_of_step(self.order, step)).sum()
            for _ in range(config.gradient_accumulation_steps):
                items = next(loader)
                weight = self.weights(items["index"].tolist()) / total
                weight *= config.gradient_accumulation_steps * self.order.world_size
                yield self.batch(items, weight)

    def weights(self, indices: Sequence[int]) -> Tensor:
        """Unnormalised weights of pairs, (len(indices),)."""
        if not self.trainer.config.weight_by_prompt:
            return torch.ones(len(indices))
        return 1 / self.part.sharing(indices)

    def batch(self, items: dict[str, Any], weight: Tensor) -> PreferenceBatch:
        device = self.trainer.accelerator.device
        choices = [self.part[index] for index in items["index"].tolist()]
        names = [normalised(choice.prompt) for choice in choices]
        images, texts = self.trainer.inputs(items, [choice.prompt for choice in choices])
        label = torch.tensor([choice.label for choice in choices])
        same = torch.tensor([[a == b for b in names] for a in names])
        return PreferenceBatch(images, texts, label.to(device), weight.to(device), same.to(device))


class RewardTrainer(StepLoop[RewardTrainingConfig, PreferenceBatch]):
    """Trains a reward model. ``RewardTrainer(config).train()`` returns its folder.

    Raises:
        UserError: see :func:`.data.open_parts` and :func:`.scorer.make_encoder`.
    """

    method = "reward"
    usual_causes = ", or images that are not what the model was trained on"

    def __init__(self, config: RewardTrainingConfig) -> None:
        super().__init__(config)
        self.parts = open_parts(config)
        self.encoder = make_encoder(config)
        self.scorer = make_scorer(config, self.encoder)
        self._warn_of_cut_prompts()
        self.pairs = {name: self._pairs(getattr(self.parts, name)) for name in ("train", "validation", "heldout")}
        self.model = self.accelerator.prepare(self.scorer)
        self.batches = PreferenceBatches(self, self.parts.train, self.pairs["train"])
        self.make_optimizer()
        self.best: dict[str, Any] = {}
        self.start: dict[str, Any] = {}
        self.scorer.train()

    def _pairs(self, part: Part) -> Pairs:
        config, preprocess = self.config, self.encoder.preprocess
        pixels = PixelPairs(part, preprocess, flip=config.random_flip, shift=config.random_shift, seed=config.seed)
        return self._embed(part, pixels) if config.train_mode == "head" else pixels

    def _embed(self, part: Part, pixels: PixelPairs) -> EmbeddedPairs:
        """The embeddings of a part, each picture and prompt once. Every process makes its own."""
        encoder, size, device = (
            self.encoder.to(self.accelerator.device),
            self.config.eval_batch_size,
            self.accelerator.device,
        )
        loader = DataLoader(
            pixels,
            sampler=[(index, -1) for index in range(len(part))],
            batch_size=size,
            num_workers=self.config.dataloader_num_workers,
            collate_fn=collate,
        )
        sides: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
        with torch.no_grad():
            for items in loader:
                for side, found in sides.items():
                    found.append(embed_all(encoder, items[side], size, device))
            prompts = list(dict.fromkeys(choice.prompt for choice in part.choices))
            texts = torch.cat([encoder.embed_prompts(prompts[i : i + size]) for i in range(0, len(prompts), size)])
        encoder.to("cpu")
        row = {prompt: index for index, prompt in enumerate(prompts)}
        own = texts.cpu()[[row[choice.prompt] for choice in part.choices]]
        return EmbeddedPairs(torch.cat(sides["chosen"]), torch.cat(sides["rejected"]), own)

    def inputs(self, items: dict[str, Any], prompts: list[str]) -> tuple[Tensor, Tensor]:
        """What the scorer takes, on the device: images (2B, ...), the preferred ones first, and texts (B, ...)."""
        device = self.accelerator.device
        images = torch.cat([items["chosen"], items["rejected"]]).to(device)
        if "text" in items:
            return images, items["text"].to(device)
        encoder = self.encoder
        options = {"padding": encoder.padding, "truncation": True, "max_length": encoder.context}
        return images, encoder.tokenizer(prompts, return_tensors="pt", **options).input_ids.to(device)

    def _warn_of_cut_prompts(self) -> None:
        prompts = list(dict.fromkeys(choice.prompt for choice in self.parts.train.choices))
        cut = sum(length > self.encoder.context for length in self.encoder.lengths(prompts))
        if cut:
            logger.warning(
                "%d of %d prompts are longer than %d tokens and are cut", cut, len(prompts), self.encoder.context
            )

    def compute_loss(self, batch: PreferenceBatch) -> tuple[Tensor, dict[str, Tensor]]:
        config = self.config
        scores, images, texts = self.model(batch.images, batch.texts)
        first, second = scores.chunk(2)
        if config.objective == "pickscore":
            losses = bradley_terry_losses(first, second, batch.label)
        else:
            losses = rao_kupper_losses(first, second, batch.label, config.tie_constant)
        preference = (losses * batch.weight).sum()
        margin, decided = (first - second).detach(), batch.label != 0.5
        right = torch.where(decided, (margin > 0).float(), 0.5)
        metrics = {
            "preference_loss": preference,
            "batch_accuracy": right.mean(),
            "margin": margin.mean(),
            "scale": self.scorer.logit_scale.detach().exp(),
        }
        if not config.contrastive_weight:
            return preference, metrics
        matching = contrastive_loss(images.chunk(2)[0], texts, self.scorer.logit_scale.exp(), batch.same)
        return preference + config.contrastive_weight * matching, {**metrics, "contrastive_loss": matching}

    def parameters(self) -> Sequence[nn.Parameter]:
        return [p for p in self.scorer.parameters() if p.requires_grad]

    def prepared(self) -> Sequence[nn.Module]:
        return [self.model]

    @torch.no_grad()
    def after_update(self) -> None:
        self.scorer.logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def summary(self) -> str:
        config, plan = self.config, self.plan
        trained, total = (sum(p.numel() for p in ps) for ps in (self.parameters(), self.scorer.parameters()))
        rate = config.learning_rate * (plan.effective_batch if config.scale_lr else 1)
        sizes = ", ".join(
            f"{len(part)} {name} ({len(part.counts)} prompts)"
            for name, part in (
                ("train", self.parts.train),
                ("validation", self.parts.validation),
                ("held-out", self.parts.heldout),
            )
        )
        rows = {
            "model": f"{config.pretrained_model_name_or_path}{' from scratch' if config.from_scratch else ''}",
            "pairs": sizes,
            "objective": config.objective + (" weighted by prompt" if config.weight_by_prompt else ""),
            "batch": f"{plan.effective_batch} = {config.train_batch_size} per process x "
            f"{config.gradient_accumulation_steps} accumulated x {self.accelerator.num_processes} processes",
            "steps": f"{plan.steps:,} ({plan.steps * plan.effective_batch / plan.samples:.2f} passes over the data)",
            "trains": f"{trained:,} of {total:,} parameters ({config.train_mode})",
            "learning rate": f"{rate:g}, {config.lr_scheduler}, {config.lr_warmup_steps} warm-up steps",
            "precision": f"{config.mixed_precision} on {self.accelerator.device}",
        }
        width = max(map(len, rows))
        return "\n".join(f"{name:>{width}}  {value}" for name, value in rows.items())

    def at_start(self, log: RunLog) -> None:
        self.start = accuracy_of(self.parts.heldout, self.score("heldout"))
        metrics = self._evaluate()
        log.say(f"before training: validation accuracy {metrics['validation_accuracy']:.3f}")

    def training_step(self, stream: Iterator[PreferenceBatch]) -> dict[str, float]:
        metrics = super().training_step(stream)
        if self.step % self.config.eval_steps == 0 or self.step == self.plan.steps:
            metrics |= self._evaluate()
        return metrics

    def after_step(self, log: RunLog, metrics: Mapping[str, float]) -> None:
        if "validation_accuracy" not in metrics:
            return
        log.say(
            f"step {self.step}: validation accuracy {metrics['validation_accuracy']:.3f}, "
            f"loss {metrics['validation_loss']:.4f} (best: step {self.best['step']})"
        )
        patience = self.config.early_stopping_patience
        if patience is not None and self.best["evaluations_since"] >= patience:
            log.say(f"stopped early: no new best in {patience} evaluations")
            self.done = True

    def _evaluate(self) -> dict[str, float]:
        """Score the validation part, and keep the weights aside where they are the best so far."""
        scores, labels = self.score("validation"), self.parts.validation.labels
        found = pairwise_accuracy(scores.margins, labels)
        assert found is not None
        loss = negative_log_likelihood(scores.margins, labels)
        value = found.rate if self.config.best_metric == "accuracy" else -loss
        if not self.best or value > self.best["value"]:
            self.best = {"step": self.step, "value": value, "evaluations_since": 0}
            if self.accelerator.is_main_process:
                self._keep_best()
        else:
            self.best["evaluations_since"] += 1
        self.accelerator.wait_for_everyone()
        return {"validation_accuracy": found.rate, "validation_loss": loss, "best_step": self.best["step"]}

    def _best_file(self, step: int) -> Path:
        return self.output_dir / f"best-{step}.safetensors"

    def _keep_best(self) -> None:
        """Write the weights; a resume from any checkpoint must find the best ones of its time, so those stay too."""
        final = self._best_file(self.best["step"])
        aside = final.with_suffix(".tmp")
        with space_errors(self.output_dir):
            save_file(trained_state(self.scorer), aside)
            aside.replace(final)
        needed = {load_state(path)["best"]["step"] for path in find_checkpoints(self.output_dir)}
        keep = {self._best_file(step) for step in (*needed, self.best["step"])}
        for path in set(self.output_dir.glob("best-*.safetensors")) - keep:
            path.unlink()

    @torch.no_grad()
    def score(self, name: str) -> Scores:
        """Scores of the "validation" or "heldout" part by the weights as they are, on every process."""
        part: Part = getattr(self.parts, name)
        world, rank, size = self.accelerator.num_processes, self.accelerator.process_index, self.config.eval_batch_size
        mine: list[Key] = [(index, -1) for index in range(rank, len(part), world)]
        workers = self.config.dataloader_num_workers
        loader = DataLoader(self.pairs[name], sampler=mine, batch_size=size, num_workers=workers, collate_fn=collate)
        self.scorer.eval()
        rows: list[tuple[int, float, float]] = []
        for items in loader:
            indices = items["index"].tolist()
            with self.accelerator.autocast():
                scores, _, _ = self.scorer(*self.inputs(items, [part[index].prompt for index in indices]))
            first, second = scores.double().cpu().chunk(2)
            rows += zip(indices, first.tolist(), second.tolist(), strict=True)
        self.scorer.train()
        found = np.array(sorted(gather_object(rows)))
        return Scores(found[:, 1], found[:, 2])

    def counters(self) -> dict[str, Any]:
        return {**super().counters(), "best": self.best, "start_heldout_accuracy": self.start}

    def save_weights(self, folder: Path) -> None:
        save_file(trained_state(self.scorer), folder / _STATE_FILE)

    def load_weights(self, folder: Path, state: Mapping[str, Any]) -> None:
        load_trained_state(self.scorer, load_file(folder / _STATE_FILE))
        self.best, self.start = dict(state["best"]), state["start_heldout_accuracy"]

    def before_export(self) -> None:
        load_trained_state(self.scorer, load_file(self._best_file(self.best["step"])))
        validation, heldout = self.score("validation"), self.score("heldout")
        temperature = fit_temperature(validation.margins, self.parts.validation.labels)
        self.report = make_report(self.parts, validation, heldout, temperature, self.config.calibrate)
        self.report["start_heldout_accuracy"] = self.start
        self.report["run"] = {
            "steps": self.step,
            "best_step": self.best["step"],
            "best_metric": self.config.best_metric,
        }
        if self.config.calibrate:
            divide(self.scorer, temperature)
            heldout, validation = heldout.divided(temperature), validation.divided(temperature)
        self._usual = np.concatenate([validation.chosen, validation.rejected])

    def export(self) -> None:
        config, mean, spread = self.config, float(self._usual.mean()), float(self._usual.std())
        dtype = torch.float16 if config.save_dtype == "float16" else torch.float32
        save_model(self.scorer, self.encoder, processor_of(config), self.output_dir, dtype)
        write_report(self.report, config, self.output_dir)
        facts: dict[str, Any] = {
            "format": FORMAT,
            "kind": "clip",
            "scale": "bt_logit",
            # Of the mean of a batch of images: their spread is a generous bound.
            "typical": [mean - 2 * spread, mean + 2 * spread],
            "heldout_accuracy": self.report["heldout_accuracy"],
        }
        if isinstance(self.scorer, HeadScorer):
            head = self.scorer.head
            facts |= {
                "kind": "head",
                "base": _lasting(config.pretrained_model_name_or_path),
                "base_processor": _lasting(config.processor_name_or_path or config.pretrained_model_name_or_path),
                "base_revision": config.revision,
                "head": {"dim": head.dim, "hidden": head.hidden},
            }
        write_text(self.output_dir / REWARD_FILE, json.dumps(facts, indent=2) + "\n")


def _lasting(place: str) -> str:
    """A name that still means the same from another working folder."""
    path = Path(place).expanduser()
    return str(path.resolve()) if place not in BUNDLED and path.exists() else place

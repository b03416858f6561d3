"""What makes a caption slightly or badly wrong, for the rejected image of a pair (DCPO-p and DCPO-h).

Saeidi et al. 2025, arXiv 2502.06023, use the paraphraser DIPPER-XXL at lexical diversity 40, 60 and 80 (weak, medium,
strong). ``words`` and ``shapes`` need no model, and are no paraphrasers: they change what a caption says.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from diffalign.diffusion.random import key_seed
from diffalign.errors import UserError
from diffalign.imports import find_callable, is_import_path
from diffalign.making.hub import load_pretrained, model_identity
from diffalign.shapes.disturb import change_fact, changeable_facts
from diffalign.shapes.scene import parse

Strength = Literal["weak", "medium", "strong"]
LEXICAL_DIVERSITY = {"weak": 40, "medium": 60, "strong": 80}
"""DIPPER's lexical diversity, of 100; the control text gives 100 minus it."""
WORD_SHARE = {"weak": 0.2, "medium": 0.4, "strong": 0.6}
"""Share of a caption's words that ``words`` touches (at least one)."""
FACT_COUNT = {"weak": 1, "medium": 2, "strong": 3}
"""Facts of a caption of the shapes world that ``shapes`` changes."""
DIPPER_PREFIX = "Paraphrase and slightly perturb this caption of an image."
_SENTENCES_A_WINDOW = 3
_TOP_P = 0.75
_MAX_LENGTH = 256


class Paraphraser(ABC):
    """Changes captions. ``identity`` is what decides the result beside the caption and the seed."""

    identity: str

    @abstractmethod
    def change(self, caption: str, seed: int) -> str:
        """Another caption; the same for the same caption and seed."""

    def prepare(self, captions: Sequence[str]) -> None:  # noqa: B027
        """See all prompts of the set before the first change."""


class WordPerturber(Paraphraser):
    """Drops, swaps and replaces words at random; new words come from the other prompts of the set.

    No meaning is kept on purpose, and none is lost on purpose: a touched "the" changes nothing, a touched "red"
    much. It is what can be done without a model.
    """

    def __init__(self, strength: Strength) -> None:
        self.share = WORD_SHARE[strength]
        self.identity = f"words {strength}"
        self._vocabulary: list[str] = []

    def prepare(self, captions: Sequence[str]) -> None:
        self._vocabulary = sorted({word for caption in captions for word in caption.split()})

    def change(self, caption: str, seed: int) -> str:
        rng = np.random.default_rng(seed)
        words = caption.split()
        if not words:
            return caption
        touched = rng.choice(len(words), max(1, round(self.share * len(words))), replace=False)
        dropped: set[int] = set()
        for index in sorted(int(i) for i in touched):
            action = rng.choice(["drop", "swap", "replace"])
            if action == "drop" and len(words) - len(dropped) > 1:
                dropped.add(index)
            elif action == "swap":
                other = int(rng.integers(len(words)))
                words[index], words[other] = words[other], words[index]
            elif self._vocabulary:
                words[index] = self._vocabulary[int(rng.integers(len(self._vocabulary)))]
        return " ".join(word for index, word in enumerate(words) if index not in dropped)


class ShapesPerturber(Paraphraser):
    """Changes facts of a caption of the shapes world: one, two or three different ones, by strength."""

    def __init__(self, strength: Strength) -> None:
        self.count = FACT_COUNT[strength]
        self.identity = f"shapes {strength}"

    def change(self, caption: str, seed: int) -> str:
        """Raises UserError for a caption outside the grammar."""
        rng = np.random.default_rng(seed)
        try:
            spec = parse(caption)
        except ValueError as error:
            raise UserError(f"the paraphraser 'shapes' understands the shapes world only: {error}") from error
        # A changed count takes a thing away, and with it facts that were to change.
        facts = [fact for fact in changeable_facts(spec) if fact != "count" or self.count == 1]
        chosen = rng.choice(facts, min(self.count, len(facts)), replace=False)
        # Swapping the things last leaves their facts where the names say they are.
        for fact in sorted(map(str, chosen), key=lambda name: name == "relation"):
            spec = change_fact(spec, rng, fact)
        return spec.caption()


class FunctionParaphraser(Paraphraser):
    """A function ``f(caption, seed)`` that returns a text."""

    def __init__(self, function: Callable[..., Any], identity: str) -> None:
        self.function, self.identity = function, identity

    def change(self, caption: str, seed: int) -> str:
        changed = self.function(caption, seed)
        if not isinstance(changed, str):
            raise UserError(f"the paraphraser {self.identity} gave {changed!r:.80}, which is no text")
        return changed


class ModelParaphraser(Paraphraser):
    """A text-to-text model of transformers, sampled with top-p 0.75.

    A DIPPER (by its name, or ``style="dipper"``) is given its control text, window after window of three sentences,
    with what it wrote so far as context. Any other model is given ``instruction``.

    Args:
        path: folder or hub id; DIPPER is ``kalpeshk2011/dipper-paraphraser-xxl``.
        strength: lexical diversity of DIPPER; other models have no such knob.
        tokenizer: folder or hub id, where the model has none of its own (DIPPER: ``google/t5-v1_1-xxl``).
        instruction: with ``{prompt}`` for the caption; for models other than DIPPER.
    """

    def __init__(
        self,
        path: str,
        strength: Strength,
        *,
        tokenizer: str | None = None,
        instruction: str = "paraphrase: {prompt}",
        style: Literal["auto", "dipper", "plain"] = "auto",
        device: str | None = None,
    ) -> None:
        self.path, self.tokenizer_path, self.instruction = path, tokenizer or path, instruction
        self.diversity = LEXICAL_DIVERSITY[strength]
        self.dipper = style == "dipper" or (style == "auto" and "dipper" in path.lower())
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        how = f"lexical diversity {self.diversity}" if self.dipper else instruction
        self.identity = f"{model_identity(path)} {how}"
        self._model: Any = None
        self._tokenizer: Any = None

    def load(self) -> None:
        """Read the model; called with the first caption."""
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self._tokenizer = load_pretrained(AutoTokenizer, self.tokenizer_path, "tokenizer of a paraphraser")
        self._model = load_pretrained(AutoModelForSeq2SeqLM, self.path, "paraphraser", dtype=dtype)
        self._model.to(self.device).eval()

    def change(self, caption: str, seed: int) -> str:
        if self._model is None:
            self.load()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            if not self.dipper:
                return self._generate(self.instruction.replace("{prompt}", caption))
            written: list[str] = []
            for window in windows(caption):
                context = " ".join([DIPPER_PREFIX, *written])
                written.append(self._generate(dipper_text(window, self.diversity, context)))
            return " ".join(written)

    def _generate(self, text: str) -> str:
        inputs = self._tokenizer(text, return_tensors="pt", truncation=True).to(self.device)
        with torch.no_grad():
            ids = self._model.generate(**inputs, do_sample=True, top_p=_TOP_P, top_k=0, max_length=_MAX_LENGTH)
        return " ".join(str(self._tokenizer.decode(ids[0], skip_special_tokens=True)).split())


def dipper_text(window: str, diversity: int, context: str) -> str:
    """DIPPER's input: control codes (100 minus the diversity; order diversity 0), context, and the text in tags."""
    return f"lexical = {100 - diversity}, order = 100 {context} <sent> {window} </sent>"


def windows(text: str, size: int = _SENTENCES_A_WINDOW) -> list[str]:
    """The text in pieces of ``size`` sentences; a sentence ends with ``.``, ``!`` or ``?`` and a space."""
    sentences = [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]
    return [" ".join(sentences[i : i + size]) for i in range(0, len(sentences), size)]


def caption_seed(seed: int, key: str) -> int:
    """The seed of one caption's change, by a run's seed and what the caption belongs to."""
    return key_seed(seed, "paraphrase", key) % 2**32


def load_paraphraser(name: str, strength: Strength = "medium", **options: Any) -> Paraphraser:
    """Find a paraphraser.

    Args:
        name: "words" or "shapes"; ``package.module:object`` or ``path/to/file.py:object``, a function of
            ``(caption, seed)`` or a class without arguments whose instances are one; or the folder or hub id of a
            text-to-text model.
        strength: see :data:`LEXICAL_DIVERSITY`, :data:`WORD_SHARE`, :data:`FACT_COUNT`; a function of one's own is
            not told.
        options: of :class:`ModelParaphraser`.

    Raises:
        UserError: nothing of this.
    """
    if name == "words":
        return WordPerturber(strength)
    if name == "shapes":
        return ShapesPerturber(strength)
    if is_import_path(name) and not Path(name).exists():
        found = find_callable(name, "paraphraser")
        made: Any = found() if inspect.isclass(found) else found
        return made if isinstance(made, Paraphraser) else FunctionParaphraser(made, name)
    return ModelParaphraser(name, strength, **options)

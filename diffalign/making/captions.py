"""``diffalign captions``: a caption of its own for each image of each pair, by the three ways of DCPO.

Saeidi et al., "Dual Caption Preference Optimization for Diffusion Models", 2025, arXiv 2502.06023. With c the prompt:

============  =======================  ========================================
mode          chosen image             rejected image
============  =======================  ========================================
``caption``   captioner(chosen, c)     captioner(rejected, c)
``perturb``   c                        paraphraser(c)
``hybrid``    captioner(chosen, c)     paraphraser(captioner(rejected, c))
============  =======================  ========================================
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from diffalign.config import field
from diffalign.data.images import BadImage, EncodedImage
from diffalign.data.readers import PairSource, PairStream, open_pairs
from diffalign.data.records import Pair
from diffalign.data.write import PairRow, write_pairs
from diffalign.errors import UserError
from diffalign.evaluation.folder import write_atomically
from diffalign.making.captioners import INSTRUCTION, Captioner, load_captioner
from diffalign.making.ledger import Ledger
from diffalign.making.paraphrasers import Paraphraser, Strength, caption_seed, load_paraphraser

logger = logging.getLogger(__name__)

CLIP_LENGTH = 77
"""Tokens that the text encoders of Stable Diffusion and SDXL read, with start and end."""


@dataclass(kw_only=True)
class CaptionsConfig:
    """Make a caption for each image of the pairs of a set, for `diffalign train dcpo`.

    The result is a folder with <split>.parquet: the pairs with caption_0 and caption_1. A stopped run goes on.
    """

    dataset_name: str = field(help="Pairs: a folder, a parquet or JSONL file, a hub id, or the bundled shapes-pairs.")
    dataset_config_name: str | None = field(None, help="Configuration of the hub data set.")
    dataset_split: str = field("train", help="Split to caption.")
    columns: dict[str, str] | None = field(None, help="Column names, where they differ: {prompt: my_caption, ...}.")
    max_pairs: int | None = field(None, help="Use only the first so many pairs.")
    max_bad_rows: int = field(10, help="Skip and list up to this many unreadable rows; more is an error.")
    output_dir: str = field(help="Folder for the result (also: --out).")
    overwrite_output_dir: bool = field(False, help="Caption anew what an earlier run left in output_dir.")

    mode: Literal["caption", "perturb", "hybrid"] = field(
        "caption", help="Captions of both images; the prompt and a changed prompt; or captions with a changed one."
    )
    captioner: str | None = field(
        None,
        help="shapes-checker, package.module:function, file.py:function, or a vision-language model (folder, hub id).",
    )
    instruction: str = field(INSTRUCTION, help="What such a model is asked; {prompt} is the image's prompt.")
    max_new_tokens: int = field(64, help="Length of a caption that such a model may write.")
    captioner_revision: str | None = field(None, help="Revision of such a model on the hub.")

    paraphraser: str | None = field(
        None,
        help="words, shapes, package.module:function, file.py:function, or a text-to-text model such as DIPPER.",
    )
    strength: Strength = field("medium", help="How much a paraphraser changes.")
    paraphraser_tokenizer: str | None = field(None, help="Tokenizer of such a model. Default: its own.")
    paraphrase_instruction: str = field("paraphrase: {prompt}", help="What a model other than DIPPER is given.")
    seed: int = field(0, help="Seed of the changes.")

    pretrained_model_name_or_path: str | None = field(
        None, help="Count cut captions by this model's text encoders. Default: 77 tokens of CLIP."
    )
    batch_size: int = field(8, help="Images captioned at once.")
    device: str | None = field(None, help="Device of the models, such as cuda:1 or cpu. Default: the best there is.")

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.mode != "perturb" and not self.captioner:
            raise UserError(
                f"mode {self.mode} needs a --captioner: shapes-checker, a vision-language model (folder or hub id), "
                "or package.module:function"
            )
        if self.mode != "caption" and not self.paraphraser:
            raise UserError(
                f"mode {self.mode} needs a --paraphraser: words, shapes, a text-to-text model (folder or hub id), or "
                "package.module:function"
            )

    def load_captioner(self) -> Captioner | None:
        """The captioner, where the mode has one."""
        if self.mode == "perturb" or self.captioner is None:
            return None
        return load_captioner(
            self.captioner,
            instruction=self.instruction,
            max_new_tokens=self.max_new_tokens,
            revision=self.captioner_revision,
            device=self.device,
        )

    def load_paraphraser(self) -> Paraphraser | None:
        """The paraphraser, where the mode has one."""
        if self.mode == "caption" or self.paraphraser is None:
            return None
        return load_paraphraser(
            self.paraphraser,
            self.strength,
            tokenizer=self.paraphraser_tokenizer,
            instruction=self.paraphrase_instruction,
            device=self.device,
        )


@dataclass(frozen=True)
class Report:
    """What became of a set: pairs, captions that fell back to the prompt, that are equal, that are too long."""

    pairs: int
    captions: int
    fallbacks: int
    equal: int
    cut: dict[str, int]
    counted_by: str

    def lines(self) -> list[str]:
        """For people."""
        share = {name: f"{count / max(1, self.pairs):.1%}" for name, count in self.cut.items()}
        return [
            f"{self.pairs} pairs",
            f"{self.fallbacks} of {self.captions} captions are the prompt, since the captioner found nothing to say",
            f"{self.equal} pairs have the same caption twice: for them DCPO is DPO",
            f"longer than {self.counted_by}, so cut in training: " + ", ".join(f"{k} {v}" for k, v in share.items()),
        ]


def run_captions(config: CaptionsConfig) -> Path:
    """Caption the pairs of a config and return the parquet file.

    Raises:
        UserError: a setting, the set, or a model is wrong, or the folder holds another configuration's work.
    """
    folder = Path(config.output_dir)
    path = folder / f"{config.dataset_split}.parquet"
    source = open_pairs(
        config.dataset_name,
        split=config.dataset_split,
        config_name=config.dataset_config_name,
        columns=config.columns,
        ties="keep",
        max_bad_rows=config.max_bad_rows,
        max_pairs=config.max_pairs,
    )
    if isinstance(source, PairStream):
        raise UserError(f"{config.dataset_name} is streamed; captions need a set that stays where it is.")
    captioner, paraphraser = config.load_captioner(), config.load_paraphraser()
    ledger = Ledger(folder, f"{config.dataset_split}.captions", _settings(config, captioner, paraphraser))
    ledger.open(overwrite=config.overwrite_output_dir)
    prompts = [pair.prompt for pair in source]
    if captioner:
        _caption_all(source, captioner, ledger, config.batch_size)
    if paraphraser:
        paraphraser.prepare(prompts)
        _change_all(source, config, paraphraser, ledger)
    rows = _Rows(source, config, ledger)
    write_pairs(path, rows, overwrite=True)
    report = rows.report(config)
    write_atomically(folder / f"{config.dataset_split}.report.json", json.dumps(vars(report), indent=2) + "\n")
    for line in report.lines():
        print(line)
    print(path)
    return path


def _settings(config: CaptionsConfig, captioner: Captioner | None, paraphraser: Paraphraser | None) -> dict[str, Any]:
    """All that decides a caption beside the pair."""
    settings: dict[str, Any] = {"source": config.dataset_name, "split": config.dataset_split, "mode": config.mode}
    if captioner:
        settings["captioner"] = captioner.identity
        if hasattr(captioner, "instruction"):
            settings |= {"instruction": config.instruction, "max_new_tokens": config.max_new_tokens}
    if paraphraser:
        settings |= {"paraphraser": paraphraser.identity, "seed": config.seed}
    return settings


def _sides(pair: Pair) -> tuple[tuple[str, EncodedImage], tuple[str, EncodedImage]]:
    return ("chosen", pair.chosen), ("rejected", pair.rejected)


def _caption_all(source: PairSource, captioner: Captioner, ledger: Ledger, batch_size: int) -> None:
    """A caption in the ledger for each image with its prompt; an image of several pairs is captioned once."""
    waiting: list[tuple[str, EncodedImage, str]] = []
    seen: set[str] = set()
    with tqdm(total=2 * len(source), unit="image", desc="captions") as bar:
        for pair in source:
            for _, image in _sides(pair):
                key = _image_key(source, image, pair.prompt)
                if key is None or key in ledger or key in seen:
                    bar.update()
                    continue
                seen.add(key)
                waiting.append((key, image, pair.prompt))
            if len(waiting) >= batch_size:
                _caption_batch(captioner, waiting, ledger)
                bar.update(len(waiting))
                waiting = []
        if waiting:
            _caption_batch(captioner, waiting, ledger)
            bar.update(len(waiting))


def _image_key(source: PairSource, image: EncodedImage, prompt: str) -> str | None:
    """What a caption belongs to; None, and a bad row, for an image that cannot be read."""
    try:
        return f"{image.inspect().digest} {prompt}"
    except BadImage as error:
        if str(error) not in source.bad_rows.reasons:
            source.bad_rows.add(error)
        return None


def _caption_batch(captioner: Captioner, waiting: Sequence[tuple[str, EncodedImage, str]], ledger: Ledger) -> None:
    captions = captioner([image.decode() for _, image, _ in waiting], [prompt for *_, prompt in waiting])
    for (key, _, _), caption in zip(waiting, captions, strict=True):
        ledger.add(key, caption)


def _change_all(source: PairSource, config: CaptionsConfig, paraphraser: Paraphraser, ledger: Ledger) -> None:
    """A changed caption in the ledger for the rejected image of each pair."""
    for pair in tqdm(source, total=len(source), unit="pair", desc="changes"):
        if _change_key(pair) in ledger:
            continue
        captioned = _captioned(source, pair, ledger) if config.mode == "hybrid" else {"rejected": pair.prompt}
        if captioned is not None:
            changed = paraphraser.change(captioned["rejected"], caption_seed(config.seed, pair.id))
            ledger.add(_change_key(pair), " ".join(changed.split()) or pair.prompt)


def _change_key(pair: Pair) -> str:
    return f"change {pair.id} {pair.prompt}"


def _captioned(source: PairSource, pair: Pair, ledger: Ledger) -> dict[str, str] | None:
    """The captions of both images, the prompt where there is none; None for a pair with an unreadable image."""
    keys = {side: _image_key(source, image, pair.prompt) for side, image in _sides(pair)}
    if None in keys.values():
        return None
    return {side: ledger[str(key)] or pair.prompt for side, key in keys.items()}


class _Rows:
    """The pairs with their captions, counted on the way."""

    def __init__(self, source: PairSource, config: CaptionsConfig, ledger: Ledger) -> None:
        self.source, self.config, self.ledger = source, config, ledger
        self.captions: dict[str, list[str]] = {"prompt": [], "chosen": [], "rejected": []}
        self.counts: Counter[str] = Counter()

    def __iter__(self) -> Iterator[PairRow]:
        for pair in self.source:
            keys = [_image_key(self.source, image, pair.prompt) for _, image in _sides(pair)]
            if None in keys:
                continue
            chosen = rejected = pair.prompt
            if self.config.mode != "perturb":
                found = [self.ledger[str(key)] for key in keys]
                self.counts["fallbacks"] += found.count(None)
                self.counts["captions"] += 2
                chosen, rejected = (caption or pair.prompt for caption in found)
            if self.config.mode != "caption":
                rejected = self.ledger[_change_key(pair)]
            self.counts["pairs"] += 1
            self.counts["equal"] += chosen == rejected
            for name, text in (("prompt", pair.prompt), ("chosen", chosen), ("rejected", rejected)):
                self.captions[name].append(text)
            source = f"{self.config.dataset_name} {self.config.dataset_split}"
            yield PairRow.of(pair, caption_0=chosen, caption_1=rejected, source=source)

    def report(self, config: CaptionsConfig) -> Report:
        """Counts, after the rows were taken."""
        counted_by, cut = _cut(config.pretrained_model_name_or_path, self.captions)
        names = ("pairs", "captions", "fallbacks", "equal")
        return Report(**{name: self.counts[name] for name in names}, cut=cut, counted_by=counted_by)


def _cut(model: str | None, captions: dict[str, list[str]]) -> tuple[str, dict[str, int]]:
    """How many captions of each kind are longer than the text encoders read, and what that is measured by."""
    if model is not None:
        from diffalign.pipelines import load_family

        family = load_family(model)
        length = min(tokenizer.model_max_length for tokenizer in family.tokenizers.values())
        return f"the {length} tokens of {model}", {k: len(family.truncated(v)) for k, v in captions.items()}
    from open_clip.tokenizer import SimpleTokenizer

    # The tokenizer of CLIP comes with open_clip, so that this needs no download; it adds start and end itself later.
    encode = SimpleTokenizer().encode
    counts = {name: sum(len(encode(text)) + 2 > CLIP_LENGTH for text in texts) for name, texts in captions.items()}
    return f"the {CLIP_LENGTH} tokens of CLIP", counts

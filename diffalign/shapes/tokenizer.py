"""The tokenizer of the bundled models: a CLIP tokenizer in which every word of the grammar is one token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

from diffalign.shapes.scene import BACKGROUNDS, COLORS, SHAPES, SIZES

MAX_LENGTH = 32
"""Tokens of a prompt with its start and end tokens; the longest caption of the world has 16."""
WORDS = ("a", "an", "and", "of", "on", "left", "right", "background", *SIZES, *COLORS, *BACKGROUNDS, *SHAPES)
END_OF_WORD = "</w>"

Merge = tuple[str, str]


def word_merges(words: Sequence[str]) -> list[Merge]:
    """Merges, in order of rank, under which byte-pair encoding turns each word into one token.

    Each word is first cut by the merges so far, then the pieces are joined from the left. A later merge ranks lower
    and so fires only when no earlier one can: it cannot change how an earlier word is cut.
    """
    merges: list[Merge] = []
    for word in words:
        pieces = _encode([*word[:-1], word[-1] + END_OF_WORD], merges)
        while len(pieces) > 1:
            merges.append((pieces[0], pieces[1]))
            pieces[:2] = [pieces[0] + pieces[1]]
    return merges


def _encode(pieces: list[str], merges: list[Merge]) -> list[str]:
    for first, second in merges:
        index = 0
        while index < len(pieces) - 1:
            if (pieces[index], pieces[index + 1]) == (first, second):
                pieces[index : index + 2] = [first + second]
            index += 1
    return pieces


def build_tokenizer(folder: str | Path, pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Write a tokenizer folder that plain ``CLIPTokenizer.from_pretrained`` loads, and return it loaded.

    Words of the grammar are one token each, any other text falls back to bytes. As in CLIP, the first token is "!"
    and the last two are the start and the end of a text; SDXL's second tokenizer pads with "!" (``pad_token="!"``).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    merges = word_merges(WORDS)
    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters), *(first + second for first, second in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    CLIPTokenizer(vocab=vocab, merges=merges, pad_token=pad_token, model_max_length=MAX_LENGTH).save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)

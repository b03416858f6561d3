"""Prompts to token ids, saying once how many were too long."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from transformers import CLIPTokenizer

from diffalign.errors import UserError


class Tokens(NamedTuple):
    """Token ids and attention mask, int64 (B, L) each; the mask is 0 on padding."""

    ids: Tensor
    mask: Tensor


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> tuple[Tokens, list[int]]:
    """Prompts, padded and cut to the tokenizer's length, and the indices of those that were cut.

    Raises:
        UserError: a prompt is not a string.
    """
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise UserError(f"prompt {i} is {prompt!r}, not a string. An empty prompt is written ''.")
    length = tokenizer.model_max_length
    tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    cut = [i for i, row in enumerate(tokenizer(list(prompts), verbose=False).input_ids) if len(row) > length]
    return Tokens(tokens.input_ids, tokens.attention_mask), cut


def warn_truncated(prompts: Sequence[str], cut: Sequence[int], length: int) -> None:
    """Warn once that the prompts with indices ``cut`` lost what lies beyond ``length`` tokens."""
    if cut:
        first = prompts[cut[0]]
        warnings.warn(
            f"{len(cut)} of {len(prompts)} prompts are longer than {length} tokens; the rest of each is ignored. "
            f"First: {first[:80] + '...' if len(first) > 80 else first!r}",
            stacklevel=3,
        )

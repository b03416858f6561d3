"""The bundled tokenizer, loaded as a user would load it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from diffalign.shapes.scene import sample_captions
from diffalign.shapes.tokenizer import MAX_LENGTH, WORDS, build_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("word", WORDS)
def test_every_word_of_the_grammar_is_one_token(tokenizer: CLIPTokenizer, word: str) -> None:
    assert tokenizer.tokenize(word) == [word + "</w>"]


def test_captions_have_a_token_a_word_and_fit(tokenizer: CLIPTokenizer) -> None:
    for caption in sample_captions(300, seed=0):
        ids = tokenizer(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= MAX_LENGTH
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_other_text_falls_back_to_bytes_and_comes_back(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("zebra 7 \u00e9").input_ids
    assert tokenizer.eos_token_id not in ids[1:-1]
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "zebra7\u00e9"


def test_padding_start_and_end_are_those_of_clip(tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer("a red circle", padding="max_length").input_ids
    assert len(ids) == tokenizer.model_max_length == MAX_LENGTH
    assert ids[0] == tokenizer.bos_token_id == len(tokenizer) - 2
    assert set(ids[4:]) == {tokenizer.eos_token_id} == {len(tokenizer) - 1}
    assert len(tokenizer("a " * 50, truncation=True).input_ids) == MAX_LENGTH


def test_the_second_sdxl_tokenizer_pads_with_token_zero(tmp_path: Path) -> None:
    tokenizer = build_tokenizer(tmp_path, pad_token="!")
    ids = tokenizer("a red circle", padding="max_length").input_ids
    assert ids[4] == tokenizer.eos_token_id
    assert set(ids[5:]) == {0} == {tokenizer.pad_token_id}


def test_vocab_and_merges_alone_make_the_same_tokenizer(
    folder: Path, tokenizer: CLIPTokenizer, tmp_path: Path
) -> None:
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    text = "a small red circle left of a zebra"
    assert CLIPTokenizer.from_pretrained(tmp_path)(text).input_ids == tokenizer(text).input_ids
    assert AutoTokenizer.from_pretrained(folder)(text).input_ids == tokenizer(text).input_ids

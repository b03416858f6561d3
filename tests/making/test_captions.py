from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.data.readers import open_pairs
from diffalign.errors import UserError
from diffalign.making import captioners, paraphrasers
from diffalign.making.captioners import load_captioner
from diffalign.making.captions import CaptionsConfig, run_captions
from diffalign.making.paraphrasers import dipper_text, load_paraphraser, windows
from diffalign.shapes import checker
from diffalign.shapes.checker import describe, read
from diffalign.shapes.scene import complete, parse


def config(source: Path, out: Path, **settings: Any) -> CaptionsConfig:
    return CaptionsConfig(dataset_name=str(source), output_dir=str(out), **settings)


def read_all(folder: Path) -> list[tuple[str, str | None, str | None]]:
    return [(pair.prompt, pair.chosen_prompt, pair.rejected_prompt) for pair in open_pairs(folder)]


def test_captions_by_the_checker(shapes_pairs: Path, tmp_path: Path) -> None:
    run_captions(config(shapes_pairs, tmp_path, captioner="shapes-checker"))
    before, after = open_pairs(shapes_pairs), open_pairs(tmp_path)
    assert len(after) == len(before) == 8
    for pair, own in zip(before, after, strict=True):
        assert (own.id, own.prompt, own.user_id) == (pair.id, pair.prompt, "3")
        assert own.chosen.read() == pair.chosen.read() and own.rejected.read() == pair.rejected.read()
        assert own.chosen_prompt == describe(read(pair.chosen.decode()))
        assert checker.score(own.rejected.decode(), str(own.rejected_prompt)) == 1.0
        assert own.chosen_prompt != own.rejected_prompt
    report = json.loads((tmp_path / "train.report.json").read_text())
    assert (report["pairs"], report["captions"], report["fallbacks"]) == (8, 16, 0)


def test_perturbed_and_hybrid(shapes_pairs: Path, tmp_path: Path) -> None:
    run_captions(config(shapes_pairs, tmp_path / "p", mode="perturb", paraphraser="shapes", strength="weak"))
    for prompt, chosen, rejected in read_all(tmp_path / "p"):
        assert chosen == prompt and rejected != prompt
        parse(str(rejected))
    settings = {"captioner": "shapes-checker", "paraphraser": "words"}
    run_captions(config(shapes_pairs, tmp_path / "h", mode="hybrid", **settings))
    run_captions(config(shapes_pairs, tmp_path / "c", captioner="shapes-checker"))
    for hybrid, caption in zip(read_all(tmp_path / "h"), read_all(tmp_path / "c"), strict=True):
        assert hybrid[:2] == caption[:2] and hybrid[2] != caption[2]


def test_a_stopped_run_captions_nothing_twice(shapes_pairs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[str] = []
    original = captioners.ShapesCaptioner.captions

    def counted(self: Any, images: Any, prompts: Any) -> Any:
        if len(seen) >= 8:
            raise KeyboardInterrupt
        seen.extend(prompts)
        return original(self, images, prompts)

    monkeypatch.setattr(captioners.ShapesCaptioner, "captions", counted)
    settings = {"captioner": "shapes-checker", "batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        run_captions(config(shapes_pairs, tmp_path / "a", **settings))
    assert len(seen) == 8 and not (tmp_path / "a" / "train.parquet").exists()
    with (tmp_path / "a" / "train.captions.jsonl").open("a") as stream:
        stream.write('{"key": "cut o')
    monkeypatch.setattr(
        captioners.ShapesCaptioner, "captions", lambda *given: (seen.extend(given[2]), original(*given))[1]
    )
    run_captions(config(shapes_pairs, tmp_path / "a", **settings))
    assert len(seen) == 16
    run_captions(config(shapes_pairs, tmp_path / "b", **settings))
    assert (tmp_path / "a" / "train.parquet").read_bytes() == (tmp_path / "b" / "train.parquet").read_bytes()
    with pytest.raises(UserError, match="mode is 'caption' there"):
        run_captions(config(shapes_pairs, tmp_path / "a", mode="perturb", paraphraser="words"))


def test_a_function_captions_and_an_empty_caption_is_the_prompt(shapes_pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def describe(images, prompts):\n"
        "    return [f' {p}  seen ' if i.size == (64, 64) and 'brown' in p else '' for i, p in zip(images, prompts)]\n"
        "def short(images, prompts):\n    return ['one']\n"
    )
    name = f"{tmp_path / 'mine.py'}:describe"
    run_captions(config(shapes_pairs, tmp_path / "out", captioner=name))
    for prompt, chosen, rejected in read_all(tmp_path / "out"):
        assert chosen == rejected == (f"{prompt} seen" if "brown" in prompt else prompt)
    report = json.loads((tmp_path / "out" / "train.report.json").read_text())
    assert report["equal"] == 8 and 0 < report["fallbacks"] < 16
    with pytest.raises(UserError, match="1 captions for"):
        run_captions(config(shapes_pairs, tmp_path / "b", captioner=f"{tmp_path / 'mine.py'}:short"))


def test_long_captions_are_counted(shapes_pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def describe(images, prompts):\n    return ['word ' * 80 for _ in prompts]\n")
    run_captions(config(shapes_pairs, tmp_path / "out", captioner=f"{tmp_path / 'mine.py'}:describe"))
    report = json.loads((tmp_path / "out" / "train.report.json").read_text())
    assert report["cut"] == {"prompt": 0, "chosen": 8, "rejected": 8}


def test_what_the_checker_cannot_tell_comes_from_the_prompt() -> None:
    prompt = "a large red circle left of a small blue square on a gray background"
    seen = parse("a large red circle left of a small green square on a gray background")
    reading = checker.Reading.of_scene(complete(seen, _rng()))
    first, second = reading.things
    blob, other = replace(first, shape=None), replace(second, shape=None)
    for things in ((blob, second), (first, other), (blob, other)):
        assert describe(replace(reading, things=things)) is None
        assert describe(captioners._with_shapes_of(replace(reading, things=things), prompt)) == seen.caption()
    # The red thing stands on the right: it is still the circle.
    swapped = replace(reading, things=(second, blob))
    assert [t.shape for t in captioners._with_shapes_of(swapped, prompt).things] == ["square", "circle"]
    alone = replace(reading, things=(blob,))
    assert captioners._with_shapes_of(alone, prompt) == alone
    empty = Image.new("RGB", (64, 64), (128, 128, 128))
    assert load_captioner("shapes-checker")([empty], [prompt]) == [None]


def _rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({}, "needs a --captioner"),
        ({"mode": "perturb"}, "needs a --paraphraser"),
        ({"mode": "hybrid", "captioner": "shapes-checker"}, "needs a --paraphraser"),
        ({"captioner": "shapes-checker", "batch_size": 0}, "batch_size"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        config(tmp_path, tmp_path, **settings)


def test_words_change_with_strength_and_seed() -> None:
    caption = "a small red circle left of a large blue square on a white background"
    changed = {}
    for strength in ("weak", "medium", "strong"):
        own = load_paraphraser("words", strength)
        own.prepare([caption, "an entirely different prompt about mountains"])
        results = [own.change(caption, seed) for seed in range(30)]
        assert results == [own.change(caption, seed) for seed in range(30)] and len(set(results)) > 10
        changed[strength] = np.mean([len(set(caption.split()) & set(r.split())) for r in results])
    assert changed["weak"] > changed["medium"] > changed["strong"]
    assert load_paraphraser("words", "strong").change("", 0) == ""


def test_shapes_changes_so_many_facts() -> None:
    caption = "a small red circle left of a large blue square on a white background"
    for strength, count in paraphrasers.FACT_COUNT.items():
        own = load_paraphraser("shapes", strength)  # type: ignore[arg-type]
        for seed in range(20):
            reading = checker.Reading.of_scene(complete(parse(caption), _rng()))
            held = checker.facts(reading, parse(own.change(caption, seed)))
            assert 1 <= sum(not value for value in held.values()) <= 2 * count + 1
    with pytest.raises(UserError, match="shapes world only"):
        load_paraphraser("shapes").change("a castle at night", 0)


def test_the_control_text_of_dipper() -> None:
    text = "One is red. Two is blue! Is three? Four."
    assert windows(text) == ["One is red. Two is blue! Is three?", "Four."]
    assert windows("") == [] and windows("no end") == ["no end"]
    assert dipper_text("Four.", 60, "ctx") == "lexical = 40, order = 100 ctx <sent> Four. </sent>"

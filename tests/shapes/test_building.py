"""The build stages of CLIP, aesthetic head and pairs, each for a handful of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from diffalign.rewards.clip import embed_images
from diffalign.shapes import scene
from diffalign.shapes.annotators import ANNOTATORS
from diffalign.shapes.building import aesthetic, clip, pairs
from diffalign.shapes.checker import Reading, facts, read
from diffalign.shapes.disturb import change_fact
from diffalign.shapes.scene import is_heldout, parse

FEW = {"log_every": 2, "save_every": 2, "warmup": 1}


class Painter:
    """Stands in for the base model: renders that are often wrong. Counts what it was asked for."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
        self.drawn += len(prompts)
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = np.random.default_rng(seed)
            spec = parse(prompt)
            images.append(np.asarray(scene.render(scene.complete(change_fact(spec, rng) if seed % 2 else spec, rng))))
        return np.stack(images)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with pairs, and a CLIP and a head of a few steps."""
    work = tmp_path_factory.mktemp("work")
    pairs.make_pairs(Painter(), work / "shapes-pairs", work, 0, {"train": 60, "heldout": 20})
    few = replace(clip.CONTRASTIVE, steps=2, **FEW)
    clip.train_contrastive(work / "contrastive", work, 0, "cpu", few, scenes=64, reading=few)
    return work


def test_pairs_have_the_columns_and_splits_of_pick_a_pic(built: Path) -> None:
    for split, count in (("train", 60), ("heldout", 20)):
        table = load_dataset("parquet", data_files=str(built / f"shapes-pairs/{split}.parquet"), split="train")
        assert table.column_names == pairs.SCHEMA.names
        assert len(table) == count
        assert all(is_heldout(caption) == (split == "heldout") for caption in table["caption"])
        assert set(table["user_id"]) <= set(ANNOTATORS)
    assert f"| pairs | {60} | {20} |" in (built / "shapes-pairs/README.md").read_text(encoding="utf-8")


def test_rows_agree_with_themselves(built: Path) -> None:
    rows = pq.read_table(built / "shapes-pairs/train.parquet").to_pylist()
    by_prompt = {row["caption"]: [other for other in rows if other["caption"] == row["caption"]] for row in rows}
    for row in rows:
        assert row["label_0"] + row["label_1"] == 1
        best = {1.0: row["image_0_uid"], 0.0: row["image_1_uid"], 0.5: "tie"}[row["label_0"]]
        assert row["best_image_uid"] == best
        assert row["jpg_0"] != row["jpg_1"] and row["image_0_uid"] != row["image_1_uid"]
        assert row["num_example_per_prompt"] == len(by_prompt[row["caption"]])
    for session in by_prompt.values():
        assert len({(row["ranking_id"], row["user_id"]) for row in session}) == 1
        for row, following in zip(session[:-1], session[1:], strict=True):
            assert row["best_image_uid"] in ("tie", following["image_0_uid"], following["image_1_uid"])


def test_pairs_repeat_and_go_on_where_they_stopped(built: Path, tmp_path: Path) -> None:
    again = Painter()
    pairs.make_pairs(again, tmp_path / "again", built, 0, {"train": 60, "heldout": 20})
    assert again.drawn == 0
    fresh = Painter()
    pairs.make_pairs(fresh, tmp_path / "fresh", tmp_path, 0, {"train": 60, "heldout": 20})
    assert fresh.drawn > 80
    expected = (built / "shapes-pairs/train.parquet").read_bytes()
    assert (tmp_path / "again/train.parquet").read_bytes() == expected
    assert (tmp_path / "fresh/train.parquet").read_bytes() == expected


def test_pairs_show_what_was_sampled(built: Path) -> None:
    row = pq.read_table(built / "shapes-pairs/train.parquet").to_pylist()[0]
    session = pairs.draw_sessions("train", 60, 0)[0]
    image = Painter()([session.caption], [session.seeds[0]])[0]
    assert row["jpg_0"] == pairs.to_jpeg(image)
    assert row["image_0_uid"] == pairs.image_uid(session.caption, session.seeds[0])


def test_wrong_captions_are_false_and_own_captions_true() -> None:
    rng = np.random.default_rng(0)
    drawn, pictures = clip.draw_scenes(40, seed=0)
    for its_scene, picture in zip(drawn, pictures, strict=True):
        spec = clip.say_some(its_scene, rng)
        assert not is_heldout(spec.caption())
        reading = Reading.of_scene(its_scene)
        assert all(facts(reading, spec).values())
        assert not all(facts(reading, clip.say_wrong(spec, its_scene, rng)).values())
        assert len(read(picture.permute(1, 2, 0).numpy()).things) == len(its_scene.things)


def test_contrastive_loss_falls_as_captions_find_their_images() -> None:
    unit = torch.eye(8)
    model = SimpleNamespace(logit_scale=torch.nn.Parameter(torch.tensor(2.0)))
    wrong = unit.roll(1, 0).repeat_interleave(2, 0)
    right, mixed_up = (clip.contrastive_loss(model, unit, texts, wrong) for texts in (unit, unit.roll(1, 0)))  # type: ignore[arg-type]
    assert right < 0.1 * mixed_up


def test_our_preprocessing_is_the_processors(built: Path) -> None:
    processor = CLIPProcessor.from_pretrained(built / "contrastive")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    batch = processor(images=pictures, text=["a red circle", "a cross"], padding=True, return_tensors="pt")
    torch.testing.assert_close(batch["pixel_values"], clip.clip_pixels(images, processor))
    assert (
        batch["input_ids"].tolist() == clip.tokenize(processor.tokenizer, ["a red circle", "a cross"], "cpu").tolist()
    )


def test_clip_is_small_and_plain_transformers_loads_it(built: Path) -> None:
    model = CLIPModel.from_pretrained(built / "contrastive")
    assert 2e5 < model.num_parameters() < 5e5
    assert model.config.projection_dim == clip.PROJECTION
    processor = CLIPProcessor.from_pretrained(built / "contrastive")
    accuracy = clip.caption_accuracy(model, processor, 10, seed=0)
    assert 0 <= accuracy["all"] <= 1 and {"count", "shape"} <= set(accuracy)


def test_a_stage_that_is_done_is_read_not_trained(built: Path) -> None:
    before = (built / "contrastive/model.safetensors").read_bytes()
    model = clip.train_contrastive(built / "contrastive", built, 1, "cpu")
    assert (built / "contrastive/model.safetensors").read_bytes() == before
    assert not model.training


def test_preferences_are_learnt(built: Path, tmp_path: Path) -> None:
    """On the pairs it trains on, or the objective has its sign wrong."""
    few = replace(clip.PREFERENCES, steps=60, learning_rate=2e-3, ema_decay=0.5, **FEW | {"save_every": 60})
    result = clip.train_on_preferences(
        tmp_path / "clip", built / "contrastive", built / "shapes-pairs", tmp_path, 0, "cpu", few
    )
    train = clip.PreferenceSet.read(built / "shapes-pairs/train.parquet")
    processor = CLIPProcessor.from_pretrained(tmp_path / "clip")
    accuracy = {
        name: clip.preference_accuracy(clip.load_clip(path, "cpu"), processor, train)
        for name, path in (("before", built / "contrastive"), ("after", tmp_path / "clip"))
    }
    assert accuracy["after"] > max(0.65, accuracy["before"])
    assert set(result) == {"before", "after"}
    assert CLIPModel.from_pretrained(tmp_path / "clip").dtype == torch.float16


def test_aesthetic_head_is_trained_saved_and_read(built: Path, tmp_path: Path) -> None:
    samples = torch.from_numpy(Painter()(["a red circle"] * 20, list(range(20)))).permute(0, 3, 1, 2)
    few = replace(aesthetic.SCHEDULE, steps=150, ema_decay=0.5, **FEW | {"save_every": 150, "log_every": 150})
    folder = tmp_path / "shapes-aesthetic"
    result = aesthetic.train_aesthetic(folder, built / "contrastive", samples, tmp_path, 0, "cpu", few, renders=180)
    assert result["rmse"] < 1.2 * result["deviation"]
    head = aesthetic.load_head(folder)
    model, processor = (
        clip.load_clip(built / "contrastive", "cpu"),
        CLIPProcessor.from_pretrained(built / "contrastive"),
    )
    scores = head(embed_images(model, clip.clip_pixels(samples, processor)))
    assert scores.shape == (20,) and bool(((scores > 0) & (scores < 11)).all())

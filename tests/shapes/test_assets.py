"""What is bundled: small, loaded by plain libraries, good enough to start from and with room to improve."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from diffalign.assets import BUNDLED, ROOT, resolve
from diffalign.errors import UserError
from diffalign.evaluation.draw import sample_images
from diffalign.evaluation.shapes import GUIDANCE, STEPS, heldout_prompts
from diffalign.shapes import checker, scene


def test_together_they_are_under_12_megabytes() -> None:
    files = [path for path in ROOT.rglob("*") if path.is_file()]
    assert 5e6 < sum(path.stat().st_size for path in files) < 12e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".ckpt")]


@pytest.mark.parametrize("name", BUNDLED)
def test_a_bundled_name_is_a_folder(name: str) -> None:
    assert Path(resolve(name)).is_dir()


def test_a_local_folder_of_the_same_name_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shapes-sdxl").mkdir()
    monkeypatch.chdir(tmp_path)
    assert resolve("shapes-sdxl") == "shapes-sdxl"


def test_a_missing_bundle_is_an_error_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffalign.assets.ROOT", tmp_path)
    with pytest.raises(UserError, match="missing from this installation.*make shapes"):
        resolve("shapes-clip")


def test_the_vae_keeps_99_percent_of_the_facts() -> None:
    vae = AutoencoderKL.from_pretrained(resolve("shapes-sdxl"), subfolder="vae")
    rng = np.random.default_rng(0)
    specs = [scene.sample_spec(rng) for _ in range(96)]
    pictures = np.stack([np.asarray(scene.render(scene.complete(spec, rng))) for spec in specs])
    with torch.no_grad():
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
        output = ((vae(pixels).sample.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    held = [
        fact
        for image, spec in zip(output, specs, strict=True)
        for fact in checker.facts(checker.read(image), spec).values()
    ]
    assert np.mean(held) >= 0.99


def test_plain_diffusers_draws_recognisable_pictures_with_room_to_improve() -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(resolve("shapes-sdxl"))
    prompts = heldout_prompts(48, seed=1)
    images = sample_images(
        pipe, prompts, list(range(48)), num_inference_steps=STEPS, guidance_scale=GUIDANCE, batch_size=48
    )
    # 0.82 on many prompts; the standard error on 48 is about 0.03.
    assert 0.7 < checker.scores(images, prompts).mean() < 0.92
    backgrounds = [
        checker.read(i).background == b
        for i, p in zip(images, prompts, strict=True)
        if (b := scene.parse(p).background)
    ]
    assert np.mean(backgrounds) > 0.8


@pytest.mark.parametrize(("split", "least"), [("train", 2000), ("heldout", 500)])
def test_the_pairs_are_many_with_about_a_tenth_ties_and_split_by_prompt(split: str, least: int) -> None:
    table = pq.read_table(os.path.join(resolve("shapes-pairs"), f"{split}.parquet"))
    assert {"caption", "jpg_0", "jpg_1", "label_0", "label_1", "user_id"} <= set(table.column_names)
    labels = np.array(table["label_0"].to_pylist())
    assert len(labels) >= least and set(labels) == {0.0, 0.5, 1.0}
    assert 0.07 < (labels == 0.5).mean() < 0.15
    assert {scene.is_heldout(caption) for caption in table["caption"].to_pylist()} == {split == "heldout"}


def test_held_out_prompts_are_in_no_training_pair() -> None:
    table = pq.read_table(os.path.join(resolve("shapes-pairs"), "train.parquet"), columns=["caption"])
    assert not set(heldout_prompts(500)) & set(table["caption"].to_pylist())

"""SFT and Diffusion-KTO end to end on a tiny SDXL pipeline, from pairs and from single images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import UserError
from diffalign.trainers import load_method


@pytest.fixture
def start(tiny_sdxl_path: str, pairs_folder: Path, tmp_path: Path) -> Any:
    """A trainer of a method on the images of nine pairs; keyword arguments override."""

    def make(method: str, **overrides: Any) -> Any:
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": tiny_sdxl_path,
            "dataset_name": str(pairs_folder),
            "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "run"),
            "resolution": 16,
            "max_train_steps": 3,
            "train_batch_size": 4,
            "learning_rate": 1e-2,
            "rank": 2,
            "report_to": ["none"],
        }
        config, trainer = load_method(method)
        return trainer(config(**{**settings, **overrides}))

    return make


@pytest.fixture
def labelled(pairs_folder: Path, tmp_path: Path) -> Any:
    """Writes a JSONL folder of single images with these labels."""

    def write(*labels: Any, **extra: Any) -> str:
        folder = tmp_path / "images"
        shutil.copytree(pairs_folder, folder)
        files = sorted(path.name for path in folder.glob("*.png"))
        rows = [
            {"prompt": "toy", "file_name": file, "label": label, **extra}
            for file, label in zip(files, labels, strict=False)
        ]
        (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(folder)

    return write


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_sft_trains_on_the_chosen_images_of_pairs(start: Any) -> None:
    trainer = start("sft")
    assert trainer.batches.samples == 9 and trainer.policy.frozen_bytes == 0
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    table = rows(trainer.train())
    assert table[0]["loss"] == table[0]["error"] > 0
    assert not all(torch.equal(p, before[name]) for name, p in trainer.policy.parameters.items())


def test_sft_masks_what_is_disliked(start: Any, capsys: Any) -> None:
    trainer = start("sft", disliked="mask", train_batch_size=18)
    table = rows(trainer.train())
    assert "9 liked and 9 disliked" in capsys.readouterr().out
    assert table[0]["liked_share"] == 0.5
    assert table[0]["loss"] == pytest.approx(0.5 * table[0]["liked_error"], rel=1e-5)


def test_sft_weights(start: Any, labelled: Any) -> None:
    folder = labelled(*[1] * 6, weight=0.25)
    weighted = rows(start("sft", dataset_name=folder, max_train_steps=1).train())[0]
    assert weighted["loss"] == pytest.approx(0.25 * weighted["error"], rel=1e-5)
    table = rows(start("sft", snr_gamma=5.0, max_train_steps=1, overwrite_output_dir=True).train())
    assert 0 < table[0]["loss"] < table[0]["error"]


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_kto_starts_at_one_half_and_then_moves(start: Any, mode: str) -> None:
    table = rows(
        start("kto", train_mode=mode, learning_rate=1e-3, desirable_weight=2.0, undesirable_weight=2.0).train()
    )
    assert table[0]["loss"] == 1.0 and table[0]["kl"] == 0.0 and table[0]["right_side"] == 0.0
    assert table[1]["loss"] != 1.0


def test_kto_draws_the_share_of_likes_it_is_told(start: Any, capsys: Any) -> None:
    trainer = start("kto")
    batches = trainer.batches
    assert (batches.likes, batches.dislikes) == (9, 9)
    drawn = torch.cat([batch.label for batch in batches.stream(0, 100)])
    assert drawn.mean().item() == pytest.approx(0.8, abs=0.05)
    trainer.train()
    out = capsys.readouterr().out
    assert "without the factor 1/2, as beta_dpo 10000 in DPO" in out and "0.8 of them liked" in out


def test_noise_and_timestep_are_each_images_own(start: Any) -> None:
    batch = next(start("kto", train_batch_size=16).batches.stream(0, 1))
    assert len({tuple(row) for row in batch.latents.flatten(1).tolist()}) < 16, "some image must come twice"
    assert len({tuple(row) for row in batch.noise.flatten(1).tolist()}) == 16
    assert len(set(batch.timesteps.tolist())) > 8


@pytest.mark.parametrize(
    "options",
    [
        {"kl_estimate": "mismatched", "cache_latents": False},
        {"kl_estimate": "labels", "utility": "loss_averse", "kl_ema_decay": 0.5},
        {"utility": "risk_seeking", "beta_kto": 10.0, "positive_ratio": None, "merge_duplicates": False},
        {"train_text_encoder": True, "aspect_ratio_buckets": "16,16;16,32", "random_flip": True},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_kto_train(start: Any, options: dict[str, Any]) -> None:
    trainer = start("kto", **options)
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    table = rows(trainer.train())
    first = {"loss_averse": 1 + torch.tensor(2.0).log().item(), "risk_seeking": 1 - torch.tensor(2.0).log().item()}
    assert table[0]["loss"] == pytest.approx(first.get(options.get("utility", ""), 0.5), abs=1e-6)
    assert all(row["skipped_steps"] == 0 for row in table)
    assert not all(torch.equal(p, before[name]) for name, p in trainer.policy.parameters.items())


def test_kto_resumes_to_the_same_bits(start: Any, tmp_path: Path) -> None:
    options = {"kl_ema_decay": 0.9, "beta_kto": 200.0, "max_train_steps": 4, "checkpointing_steps": 2}
    whole = start("kto", output_dir=str(tmp_path / "whole"), **options)
    table = rows(whole.train())
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    resumed = start("kto", output_dir=str(tmp_path / "again"), resume_from_checkpoint="latest", **options)
    resumed_table = rows(resumed.train())
    assert len({row["kl"] for row in table}) > 2
    assert [r["loss"] for r in resumed_table] == [r["loss"] for r in table]
    assert [r["kl"] for r in resumed_table] == [r["kl"] for r in table]
    assert resumed.kl_average == whole.kl_average is not None
    ours, theirs = whole.policy.parameters, resumed.policy.parameters
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_warnings_of_kto(start: Any, caplog: Any) -> None:
    start("kto", positive_ratio=0.2)
    assert "estimated on 4 images; below 8" in caplog.text and "0.2 of the images in a batch are liked" in caplog.text
    caplog.clear()
    start("kto", train_batch_size=8)
    assert "diffalign.trainers.kto" not in {record.name for record in caplog.records}


def test_one_kind_of_label_is_an_error_before_training(start: Any, labelled: Any) -> None:
    with pytest.raises(UserError, match="of 4 images 4 are liked and 0 disliked"):
        start("kto", dataset_name=labelled(1, 1, 1, 1))


@pytest.mark.parametrize(("method", "options"), [("kto", {}), ("sft", {"disliked": "mask"})])
def test_images_without_labels_are_refused_with_what_makes_them(
    start: Any, labelled: Any, method: str, options: dict[str, Any]
) -> None:
    folder = Path(labelled(1, 0))
    text = (folder / "metadata.jsonl").read_text().replace('"label"', '"stars"')
    (folder / "metadata.jsonl").write_text(text)
    with pytest.raises(UserError, match=r"does not say which images are liked.*label: my_column.*diffalign pairs"):
        start(method, dataset_name=str(folder), **options)
    assert start("sft", dataset_name=str(folder)).batches.samples == 2

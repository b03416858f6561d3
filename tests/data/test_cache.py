"""The cache: keyed by content and model, resumable, shared, and checked."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from diffalign.data import shards
from diffalign.data.cache import build_cache, default_cache_dir
from diffalign.data.geometry import Geometry
from diffalign.data.readers import open_pairs
from diffalign.errors import UserError


def files(folder, kind="latents"):
    return sorted((Path(folder) / kind).rglob("*.safetensors"))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ENTRIES", 2)


def test_second_run_encodes_nothing(tmp_path, fake):
    first = fake.build(fake.rows(), fake.Family(), tmp_path)
    family = fake.Family()
    second = fake.build(fake.rows(), family, tmp_path)
    assert (family.images, family.prompts) == (0, [])
    assert torch.equal(first[3]["chosen_latents"], second[3]["chosen_latents"])


def test_equal_pictures_and_prompts_are_encoded_once(tmp_path, fake):
    data = fake.rows(4)
    for row in data[1:]:
        row["rejected"] = data[0]["chosen"]
    family = fake.Family()
    cached = fake.build(data, family, tmp_path)
    assert family.images == 5
    assert sorted(family.prompts) == ["", "prompt 0", "prompt 1"]
    assert torch.equal(cached[3]["rejected_latents"], cached[0]["chosen_latents"])


@pytest.mark.parametrize(
    ("parts", "geometry", "images", "prompts"),
    [
        ({"vae": "vae-2"}, Geometry(32), 12, 0),
        ({"text": "text-2"}, Geometry(32), 0, 4),
        ({}, Geometry(24), 12, 0),
        ({}, Geometry((32, 24)), 12, 0),
        ({}, Geometry(32, flip=True, seed=3), 8, 0),
    ],
)
def test_another_model_or_crop_never_reuses_a_stale_entry(tmp_path, parts, geometry, images, prompts, fake):
    fake.build(fake.rows(), fake.Family(), tmp_path)
    family = fake.Family(**parts)
    fake.build(fake.rows(), family, tmp_path, geometry=geometry)
    assert (family.images, len(family.prompts)) == (images, prompts)


def test_random_crop_is_part_of_the_key(tmp_path, fake):
    data = [{"prompt": "p", "chosen": fake.noise(0, (64, 32)), "rejected": fake.noise(1, (64, 32))}]
    seeds = [
        fake.build(data, fake.Family(), tmp_path, geometry=Geometry(32, crop="random", seed=seed)) for seed in (1, 2)
    ]
    first, second = (cached[0] for cached in seeds)
    assert first["chosen_sizes"][3] != second["chosen_sizes"][3]
    assert not torch.equal(first["chosen_latents"], second["chosen_latents"])
    assert first["chosen_sizes"].tolist() == first["rejected_sizes"].tolist()


def test_interruption_keeps_what_was_encoded(tmp_path, small_shards, fake):
    with pytest.raises(KeyboardInterrupt):
        fake.build(fake.rows(8), fake.Family(fail_after=8), tmp_path)
    family = fake.Family()
    fake.build(fake.rows(8), family, tmp_path)
    assert family.images == 8
    assert family.prompts == []


def test_a_killed_write_is_ignored(tmp_path, fake):
    fake.build(fake.rows(), fake.Family(), tmp_path)
    shard = files(tmp_path)[0]
    (shard.parent / f".{shard.name}.123.tmp").write_bytes(shard.read_bytes()[:100])
    family = fake.Family()
    fake.build(fake.rows(), family, tmp_path)
    assert family.images == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_shard_is_encoded_again(tmp_path, small_shards, caplog, damage, fake):
    good = fake.build(fake.rows(), fake.Family(), tmp_path)[0]["chosen_latents"]
    shard = files(tmp_path)[2]
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    shard.write_bytes({"flip": content, "truncate": content[:-7], "empty": b""}[damage])
    family = fake.Family()
    cached = fake.build(fake.rows(), family, tmp_path)
    assert family.images == 2
    assert f"{shard} is damaged" in caplog.text
    assert torch.equal(cached[0]["chosen_latents"], good)


def test_runs_share_a_cache(tmp_path, fake):
    fake.build(fake.rows(4), fake.Family(), tmp_path)
    family = fake.Family()
    assert len(fake.build(fake.rows(6), family, tmp_path)) == 6
    assert family.images == 4


def test_latent_dtypes(tmp_path, fake):
    exact = fake.build(fake.rows(), fake.Family(), tmp_path)
    half = fake.build(fake.rows(), fake.Family(), tmp_path, latent_dtype="float16")
    assert half[0]["chosen_latents"].dtype == torch.float32
    error = (half[0]["chosen_latents"] - exact[0]["chosen_latents"]).abs() / exact[0]["chosen_latents"].abs()
    assert 0 < error.max() <= 2**-11
    with pytest.raises(UserError, match="latent_dtype 'int8' is unknown"):
        fake.build(fake.rows(), fake.Family(), tmp_path, latent_dtype="int8")


def test_long_prompts_are_counted_in_one_warning(tmp_path, caplog, fake):
    data = fake.rows(4)
    data[2]["prompt"] = data[3]["prompt"] = "a prompt of more than twenty letters"
    fake.build(data, fake.Family(), tmp_path)
    fake.build(data, fake.Family(), tmp_path)
    assert caplog.text.count("1 of 2 different prompts are too long") == 2


def test_bad_pictures_are_skipped_and_listed(tmp_path, caplog, fake):
    data = fake.rows(8)
    data[2]["rejected"] = b""
    data[5]["chosen"] = Image.new("RGB", (1, 1))
    source = open_pairs(data)
    cached = build_cache(source, fake.Family(), tmp_path, geometry=Geometry(32), progress=False)
    assert cached.ids == ["0", "1", "3", "4", "6", "7"]
    assert "row 2, column rejected is empty (0 bytes)" in caplog.text
    assert "row 5, column chosen is 1x1 pixels" in caplog.text
    assert "6 pairs, 2 bad rows skipped" in caplog.text
    with pytest.raises(UserError, match=r"(?s)2 bad rows, more than max_bad_rows = 1.*row 2.*row 5"):
        build_cache(open_pairs(data, max_bad_rows=1), fake.Family(), tmp_path, geometry=Geometry(32), progress=False)


def test_black_images_are_found(tmp_path, fake):
    family = fake.Family()
    family.encode_images = lambda images: torch.full((len(images), 4, 4, 4), float("nan"))
    with pytest.raises(UserError, match=r"row 0, column chosen: its latent is not finite.*float32 or bfloat16"):
        fake.build(fake.rows(), family, tmp_path)
    assert files(tmp_path) == []


def test_latents_beyond_half_precision(tmp_path, fake):
    family = fake.Family()
    family.encode_images = lambda images: torch.full((len(images), 4, 4, 4), 1e5)
    with pytest.raises(UserError, match=r"in torch.float16 is not finite.*Store latents in float32"):
        fake.build(fake.rows(), family, tmp_path, latent_dtype="float16")


def test_full_disk(tmp_path, monkeypatch, fake):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"no space left for the cache in .*MB are free. Make room, choose another"):
        fake.build(fake.rows(), fake.Family(), tmp_path)


def test_a_disk_that_is_too_small_is_found_before_it_is_full(tmp_path, monkeypatch, fake):
    monkeypatch.setattr("diffalign.data.encoding.free_space", lambda folder: 1000)
    family = fake.Family()
    with pytest.raises(UserError, match=r"it needs 0.002304 MB more"):
        fake.build(fake.rows(), family, tmp_path)
    assert family.images == 4


def test_cache_dir_that_cannot_be_made(tmp_path, fake):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*Choose another cache_dir"):
        fake.build(fake.rows(), fake.Family(), tmp_path / "file" / "cache")


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("DIFFALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache_dir() == tmp_path / "x" / "diffalign"


def save_parquet(fake, data, path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(fake.encoded(data)).to_parquet(str(path))


def test_unchanged_files_are_not_looked_at_again(tmp_path, monkeypatch, fake):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    path = tmp_path / "train.parquet"
    save_parquet(fake, fake.rows(4), path)
    first = fake.build(path, fake.Family(), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("diffalign.data.images.EncodedImage.inspect", lambda image: pytest.fail("looked again"))
        again = fake.build(path, fake.Family(), tmp_path / "cache")
    assert torch.equal(again[2]["chosen_latents"], first[2]["chosen_latents"])
    save_parquet(fake, fake.rows(5), path)
    assert len(fake.build(path, fake.Family(), tmp_path / "cache")) == 5


@pytest.mark.parametrize("streamed", [False, True])
def test_processes_share_the_work(tmp_path, streamed, fake):
    data = fake.encoded(fake.rows(9))
    data[4]["chosen"] = b""
    families, results = [fake.Family(), fake.Family()], {}
    meeting = threading.Barrier(2)

    def process(rank):
        given = data
        if streamed:
            datasets = pytest.importorskip("datasets")
            given = datasets.IterableDataset.from_generator(lambda: iter(data))
        results[rank] = build_cache(
            open_pairs(given),
            families[rank],
            tmp_path,
            geometry=Geometry(32),
            rank=rank,
            world_size=2,
            barrier=meeting.wait,
            progress=False,
        )

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results[0].ids == results[1].ids == [str(i) for i in range(9) if i != 4]
    assert min(family.images for family in families) > 0
    assert sum(family.images for family in families) == 16
    single = fake.build(data, fake.Family(), tmp_path / "single")
    for index in range(8):
        for rank in (0, 1):
            assert torch.equal(results[rank][index]["chosen_latents"], single[index]["chosen_latents"])
    assert [path for path in (tmp_path / "exchange").iterdir() if path.is_dir()] == []

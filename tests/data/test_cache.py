"""The cache: keyed by content and model, resumable, shared, and checked."""

from __future__ import annotations

import copy
import errno
import io
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from diffalign.data import shards
from diffalign.data.cache import build_cache, default_cache_dir
from diffalign.data.geometry import Geometry
from diffalign.data.items import encode_on_the_fly
from diffalign.data.order import OrderSampler, PairOrder, collate
from diffalign.data.readers import open_pairs
from diffalign.diffusion.random import key_seed
from diffalign.errors import UserError


class FakeFamily:
    """Latents are 8x8 means of the pixels, a prompt's embedding is made of its length; calls are counted."""

    def __init__(self, vae="vae-1", text="text-1", fail_after=None):
        self.prints = {"vae": vae, "text_encoders": text}
        self.fail_after = fail_after
        self.images, self.prompts = 0, []

    def fingerprint(self, part):
        return self.prints[part]

    def encode_images(self, images):
        if self.fail_after is not None and self.images >= self.fail_after:
            raise KeyboardInterrupt
        self.images += len(images)
        return torch.nn.functional.avg_pool2d(images * 2 - 1, 8)

    def encode_prompts(self, prompts, *, warn):
        assert not warn
        self.prompts += prompts
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return {"prompt_embeds": lengths.view(-1, 1, 1).expand(-1, 4, 6), "pooled_prompt_embeds": lengths.view(-1, 1)}

    def truncated(self, prompts):
        return [index for index, prompt in enumerate(prompts) if len(prompt) > 20]


def noise(seed, size=(32, 32)):
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rows(count=6, **extra):
    return [
        {"prompt": f"prompt {i // 2}", "chosen": noise(2 * i), "rejected": noise(2 * i + 1)} | extra
        for i in range(count)
    ]


def encoded(data):
    """The rows with their pictures as the bytes of PNG files."""

    def encode(image):
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    return [row | {"chosen": encode(row["chosen"]), "rejected": encode(row["rejected"])} for row in data]


def build(data, family, folder, resolution=32, **options):
    geometry = options.pop("geometry", Geometry(resolution))
    return build_cache(open_pairs(data), family, folder, geometry=geometry, batch_size=4, progress=False, **options)


def files(folder, kind="latents"):
    return sorted((Path(folder) / kind).rglob("*.safetensors"))


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_ENTRIES", 2)


def test_items(tmp_path):
    data = rows(3, label=0.75)
    cached = build(data, FakeFamily(), tmp_path)
    assert len(cached) == 3
    item = cached[1]
    pixels = torch.from_numpy(np.array(data[1]["chosen"])).permute(2, 0, 1)[None] / 255
    assert torch.allclose(item["chosen_latents"], FakeFamily().encode_images(pixels)[0], atol=1e-6)
    assert item["rejected_latents"].shape == (3, 4, 4)
    assert item["chosen_sizes"].tolist() == [32, 32, 0, 0, 32, 32]
    assert item["label"].item() == 0.75
    assert item["id"].item() == key_seed("pair", "1")
    assert {name: tuple(tensor.shape) for name, tensor in item["text"].items()} == {
        "prompt_embeds": (4, 6),
        "pooled_prompt_embeds": (1,),
    }
    assert item["text"]["prompt_embeds"][0, 0] == len("prompt 0")
    assert set(item) == {"id", "chosen_sizes", "rejected_sizes", "label", "chosen_latents", "rejected_latents", "text"}
    assert cached.empty_text["pooled_prompt_embeds"].tolist() == [0.0]
    assert cached.prompts == ["prompt 0", "prompt 0", "prompt 1"]


def test_second_run_encodes_nothing(tmp_path):
    first = build(rows(), FakeFamily(), tmp_path)
    family = FakeFamily()
    second = build(rows(), family, tmp_path)
    assert (family.images, family.prompts) == (0, [])
    assert torch.equal(first[3]["chosen_latents"], second[3]["chosen_latents"])


def test_equal_pictures_and_prompts_are_encoded_once(tmp_path):
    data = rows(4)
    for row in data[1:]:
        row["rejected"] = data[0]["chosen"]
    family = FakeFamily()
    cached = build(data, family, tmp_path)
    assert family.images == 5
    assert sorted(family.prompts) == ["", "prompt 0", "prompt 1"]
    assert torch.equal(cached[3]["rejected_latents"], cached[0]["chosen_latents"])


@pytest.mark.parametrize(
    ("family", "geometry", "images", "prompts"),
    [
        (FakeFamily(vae="vae-2"), Geometry(32), 12, 0),
        (FakeFamily(text="text-2"), Geometry(32), 0, 4),
        (FakeFamily(), Geometry(24), 12, 0),
        (FakeFamily(), Geometry((32, 24)), 12, 0),
        (FakeFamily(), Geometry(32, flip=True, seed=3), 8, 0),
    ],
)
def test_another_model_or_crop_never_reuses_a_stale_entry(tmp_path, family, geometry, images, prompts):
    build(rows(), FakeFamily(), tmp_path)
    build(rows(), family, tmp_path, geometry=geometry)
    assert (family.images, len(family.prompts)) == (images, prompts)


def test_random_crop_is_part_of_the_key(tmp_path):
    data = [{"prompt": "p", "chosen": noise(0, (64, 32)), "rejected": noise(1, (64, 32))}]
    seeds = [build(data, FakeFamily(), tmp_path, geometry=Geometry(32, crop="random", seed=seed)) for seed in (1, 2)]
    first, second = (cached[0] for cached in seeds)
    assert first["chosen_sizes"][3] != second["chosen_sizes"][3]
    assert not torch.equal(first["chosen_latents"], second["chosen_latents"])
    assert first["chosen_sizes"].tolist() == first["rejected_sizes"].tolist()


def test_interruption_keeps_what_was_encoded(tmp_path, small_shards):
    with pytest.raises(KeyboardInterrupt):
        build(rows(8), FakeFamily(fail_after=8), tmp_path)
    family = FakeFamily()
    build(rows(8), family, tmp_path)
    assert family.images == 8
    assert family.prompts == []


def test_a_killed_write_is_ignored(tmp_path):
    build(rows(), FakeFamily(), tmp_path)
    shard = files(tmp_path)[0]
    (shard.parent / f".{shard.name}.123.tmp").write_bytes(shard.read_bytes()[:100])
    family = FakeFamily()
    build(rows(), family, tmp_path)
    assert family.images == 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_shard_is_encoded_again(tmp_path, small_shards, caplog, damage):
    good = build(rows(), FakeFamily(), tmp_path)[0]["chosen_latents"]
    shard = files(tmp_path)[2]
    content = bytearray(shard.read_bytes())
    if damage == "flip":
        content[-5] ^= 1
    shard.write_bytes({"flip": content, "truncate": content[:-7], "empty": b""}[damage])
    family = FakeFamily()
    cached = build(rows(), family, tmp_path)
    assert family.images == 2
    assert f"{shard} is damaged" in caplog.text
    assert torch.equal(cached[0]["chosen_latents"], good)


def test_runs_share_a_cache(tmp_path):
    build(rows(4), FakeFamily(), tmp_path)
    family = FakeFamily()
    assert len(build(rows(6), family, tmp_path)) == 6
    assert family.images == 4


def test_latent_dtypes(tmp_path):
    exact = build(rows(), FakeFamily(), tmp_path)
    half = build(rows(), FakeFamily(), tmp_path, latent_dtype="float16")
    assert half[0]["chosen_latents"].dtype == torch.float32
    error = (half[0]["chosen_latents"] - exact[0]["chosen_latents"]).abs() / exact[0]["chosen_latents"].abs()
    assert 0 < error.max() <= 2**-11
    with pytest.raises(UserError, match="latent_dtype 'int8' is unknown"):
        build(rows(), FakeFamily(), tmp_path, latent_dtype="int8")


def test_double_captions_and_margins(tmp_path):
    data = rows(2, margin=1.5)
    data[0] |= {"chosen_prompt": "good!", "rejected_prompt": "bad"}
    cached = build(data, FakeFamily(), tmp_path)
    lengths = [
        [cached[i][name]["pooled_prompt_embeds"].item() for name in ("text", "chosen_text", "rejected_text")]
        for i in (0, 1)
    ]
    assert lengths == [[8, 5, 3], [8, 8, 8]]
    assert cached[0]["margin"].item() == 1.5


def test_prompts_instead_of_embeddings(tmp_path):
    family = FakeFamily()
    cached = build(rows(2), family, tmp_path, encode_text=False)
    assert cached[0]["prompt"] == "prompt 0"
    assert "text" not in cached[0]
    assert family.prompts == []


def test_long_prompts_are_counted_in_one_warning(tmp_path, caplog):
    data = rows(4)
    data[2]["prompt"] = data[3]["prompt"] = "a prompt of more than twenty letters"
    build(data, FakeFamily(), tmp_path)
    build(data, FakeFamily(), tmp_path)
    assert caplog.text.count("1 of 2 different prompts are too long") == 2


def test_bad_pictures_are_skipped_and_listed(tmp_path, caplog):
    data = rows(8)
    data[2]["rejected"] = b""
    data[5]["chosen"] = Image.new("RGB", (1, 1))
    source = open_pairs(data)
    cached = build_cache(source, FakeFamily(), tmp_path, geometry=Geometry(32), progress=False)
    assert cached.ids == ["0", "1", "3", "4", "6", "7"]
    assert "row 2, column rejected is empty (0 bytes)" in caplog.text
    assert "row 5, column chosen is 1x1 pixels" in caplog.text
    assert "6 pairs, 2 bad rows skipped" in caplog.text
    with pytest.raises(UserError, match=r"(?s)2 bad rows, more than max_bad_rows = 1.*row 2.*row 5"):
        build_cache(open_pairs(data, max_bad_rows=1), FakeFamily(), tmp_path, geometry=Geometry(32), progress=False)


def png_with_a_damaged_middle():
    buffer = io.BytesIO()
    noise(9, (64, 64)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[2000:2100] = bytes(100)
    return bytes(content)


def test_damage_that_only_decoding_shows(tmp_path, caplog):
    data = rows(4)
    data[1]["chosen"] = png_with_a_damaged_middle()
    cached = build(data, FakeFamily(), tmp_path)
    assert cached.ids == ["0", "2", "3"]
    assert "row 1, column chosen cannot be decoded" in caplog.text
    assert len(encode_on_the_fly(open_pairs(data), Geometry(32), tmp_path, progress=False)) == 4
    assert len(encode_on_the_fly(open_pairs(data), Geometry(32), tmp_path, thorough=True, progress=False)) == 3


def test_no_pairs_left(tmp_path):
    with pytest.raises(UserError, match="no pairs are left"):
        build([rows(1)[0] | {"chosen": b""}], FakeFamily(), tmp_path)


def test_black_images_are_found(tmp_path):
    family = FakeFamily()
    family.encode_images = lambda images: torch.full((len(images), 4, 4, 4), float("nan"))
    with pytest.raises(UserError, match=r"row 0, column chosen: its latent is not finite.*float32 or bfloat16"):
        build(rows(), family, tmp_path)
    assert files(tmp_path) == []


def test_latents_beyond_half_precision(tmp_path):
    family = FakeFamily()
    family.encode_images = lambda images: torch.full((len(images), 4, 4, 4), 1e5)
    with pytest.raises(UserError, match=r"in torch.float16 is not finite.*Store latents in float32"):
        build(rows(), family, tmp_path, latent_dtype="float16")


def test_full_disk(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match=r"no space left for the cache in .*MB are free. Make room, choose another"):
        build(rows(), FakeFamily(), tmp_path)


def test_a_disk_that_is_too_small_is_found_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr("diffalign.data.encoding.free_space", lambda folder: 1000)
    family = FakeFamily()
    with pytest.raises(UserError, match=r"it needs 0.002304 MB more"):
        build(rows(), family, tmp_path)
    assert family.images == 4


def test_cache_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write to .*Choose another cache_dir"):
        build(rows(), FakeFamily(), tmp_path / "file" / "cache")


def test_default_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path))
    assert default_cache_dir() == tmp_path
    monkeypatch.delenv("DIFFALIGN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert default_cache_dir() == tmp_path / "x" / "diffalign"


def save_parquet(data, path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(encoded(data)).to_parquet(str(path))


def test_unchanged_files_are_not_looked_at_again(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    path = tmp_path / "train.parquet"
    save_parquet(rows(4), path)
    first = build(path, FakeFamily(), tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr("diffalign.data.images.EncodedImage.inspect", lambda image: pytest.fail("looked again"))
        again = build(path, FakeFamily(), tmp_path / "cache")
    assert torch.equal(again[2]["chosen_latents"], first[2]["chosen_latents"])
    save_parquet(rows(5), path)
    assert len(build(path, FakeFamily(), tmp_path / "cache")) == 5


def test_streaming(tmp_path):
    datasets = pytest.importorskip("datasets")
    data = encoded(rows(5))
    stream = datasets.Dataset.from_list(data).to_iterable_dataset()
    family = FakeFamily()
    cached = build_cache(open_pairs(stream), family, tmp_path, geometry=Geometry(32), progress=False)
    assert cached.ids == ["0", "1", "2", "3", "4"]
    assert family.images == 10
    plain = build(data, family, tmp_path)
    assert family.images == 10
    assert torch.equal(plain[4]["chosen_latents"], cached[4]["chosen_latents"])
    with pytest.raises(UserError, match="streamed, and encoding on the fly needs random access"):
        encode_on_the_fly(open_pairs(stream), Geometry(32), tmp_path)


@pytest.mark.parametrize("streamed", [False, True])
def test_processes_share_the_work(tmp_path, streamed):
    data = encoded(rows(9))
    data[4]["chosen"] = b""
    families, results = [FakeFamily(), FakeFamily()], {}
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
    single = build(data, FakeFamily(), tmp_path / "single")
    for index in range(8):
        for rank in (0, 1):
            assert torch.equal(results[rank][index]["chosen_latents"], single[index]["chosen_latents"])
    assert [path for path in (tmp_path / "exchange").iterdir() if path.is_dir()] == []


def test_buckets(tmp_path):
    data = [
        {"prompt": "p", "chosen": noise(i, size), "rejected": noise(i + 9, size)}
        for i, size in enumerate([(64, 64), (96, 48), (64, 64)])
    ]
    cached = build(data, FakeFamily(), tmp_path, geometry=Geometry(32, buckets="32,32;24,48"))
    assert cached.targets == [(24, 48), (32, 32)]
    assert cached.bucket_of == [1, 0, 1]
    assert cached[1]["chosen_latents"].shape == (3, 3, 6)


def test_on_the_fly_items_have_the_same_layout(tmp_path):
    data = [{"prompt": f"p{i}", "chosen": noise(i, (64, 32)), "rejected": noise(9 + i, (64, 32))} for i in range(3)]
    geometry = Geometry(32, crop="random", flip=True, seed=4)
    live = encode_on_the_fly(open_pairs(data), geometry, tmp_path, progress=False)
    cached = build(data, FakeFamily(), tmp_path, geometry=geometry)
    for index in range(3):
        latents = FakeFamily().encode_images(live[index]["chosen_images"][None])[0]
        assert torch.allclose(latents, cached[index]["chosen_latents"], atol=1e-6)
        for name in ("id", "chosen_sizes", "rejected_sizes", "label"):
            assert torch.equal(live[index][name], cached[index][name])
    assert live[0]["prompt"] == "p0"
    assert live.bucket_of == cached.bucket_of


def test_loader_with_workers(tmp_path):
    cached = build(rows(8), FakeFamily(), tmp_path)
    order = PairOrder(cached.bucket_of, seed=0, train_batch_size=4)
    sampler = OrderSampler(order, start_step=0, stop_step=4)
    plain, worked = (
        list(DataLoader(cached, batch_sampler=sampler, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    )
    assert plain[0]["chosen_latents"].shape == (4, 3, 4, 4)
    assert plain[0]["text"]["prompt_embeds"].shape == (4, 4, 6)
    for one, other in zip(plain, worked, strict=True):
        assert torch.equal(one["rejected_latents"], other["rejected_latents"])
    assert torch.equal(copy.deepcopy(cached)[0]["chosen_latents"], cached[0]["chosen_latents"])


def test_an_item_cannot_change_the_cache(tmp_path):
    cached = build(rows(2), FakeFamily(), tmp_path)
    before = cached[0]["chosen_latents"].clone()
    cached[0]["chosen_latents"].zero_()
    assert torch.equal(cached[0]["chosen_latents"], before)


def test_reading_is_fast(tmp_path):
    cached = build(rows(32), FakeFamily(), tmp_path)
    for index in range(32):
        cached[index]
    start = time.process_time()
    for _ in range(10):
        for index in range(32):
            cached[index]
    assert (time.process_time() - start) / 320 < 1e-3


def test_a_real_family(tmp_path, tiny_sdxl_path):
    from diffalign.pipelines import load_family

    family = load_family(tiny_sdxl_path)
    geometry = Geometry(64, multiple=family.resolution_multiple)
    data = rows(3)
    cached = build_cache(open_pairs(data), family, tmp_path, geometry=geometry, progress=False)
    fresh = load_family(tiny_sdxl_path)
    again = build_cache(open_pairs(data), fresh, tmp_path, geometry=geometry, progress=False)
    assert fresh.loaded == frozenset()
    live = encode_on_the_fly(open_pairs(data), geometry, tmp_path, progress=False)[1]
    expected = family.encode_images(live["chosen_images"][None])[0]
    assert torch.allclose(again[1]["chosen_latents"], expected, atol=1e-5)
    assert again[1]["chosen_latents"].shape == family.latent_shape(64, 64)
    text = family.encode_prompts(["prompt 0"])
    for name, tensor in cached[1]["text"].items():
        assert torch.allclose(tensor, text[name][0], atol=1e-5)

"""Training items, from the cache and on the fly."""

from __future__ import annotations

import copy
import io
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from diffalign.data.cache import build_cache
from diffalign.data.geometry import Geometry
from diffalign.data.items import encode_on_the_fly
from diffalign.data.order import OrderSampler, SampleOrder, collate
from diffalign.data.readers import open_pairs
from diffalign.diffusion.random import key_seed
from diffalign.errors import UserError


def test_items(tmp_path, fake):
    data = fake.rows(3, label=0.75)
    cached = fake.build(data, fake.Family(), tmp_path)
    assert len(cached) == 3
    item = cached[1]
    pixels = torch.from_numpy(np.array(data[1]["chosen"])).permute(2, 0, 1)[None] / 255
    assert torch.allclose(item["chosen_latents"], fake.Family().encode_images(pixels)[0], atol=1e-6)
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


def test_double_captions_and_margins(tmp_path, fake):
    data = fake.rows(2, margin=1.5)
    data[0] |= {"chosen_prompt": "good!", "rejected_prompt": "bad"}
    cached = fake.build(data, fake.Family(), tmp_path)
    lengths = [
        [cached[i][name]["pooled_prompt_embeds"].item() for name in ("text", "chosen_text", "rejected_text")]
        for i in (0, 1)
    ]
    assert lengths == [[8, 5, 3], [8, 8, 8]]
    assert cached[0]["margin"].item() == 1.5


def test_prompts_instead_of_embeddings(tmp_path, fake):
    family = fake.Family()
    cached = fake.build(fake.rows(2), family, tmp_path, encode_text=False)
    assert cached[0]["prompt"] == "prompt 0"
    assert "text" not in cached[0]
    assert family.prompts == []


def png_with_a_damaged_middle(fake):
    buffer = io.BytesIO()
    fake.noise(9, (64, 64)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[2000:2100] = bytes(100)
    return bytes(content)


def test_damage_that_only_decoding_shows(tmp_path, caplog, fake):
    data = fake.rows(4)
    data[1]["chosen"] = png_with_a_damaged_middle(fake)
    cached = fake.build(data, fake.Family(), tmp_path)
    assert cached.ids == ["0", "2", "3"]
    assert "row 1, column chosen cannot be decoded" in caplog.text
    assert len(encode_on_the_fly(open_pairs(data), Geometry(32), tmp_path, progress=False)) == 4
    assert len(encode_on_the_fly(open_pairs(data), Geometry(32), tmp_path, thorough=True, progress=False)) == 3


def test_no_pairs_left(tmp_path, fake):
    with pytest.raises(UserError, match="nothing is left to train on"):
        fake.build([fake.rows(1)[0] | {"chosen": b""}], fake.Family(), tmp_path)


def test_streaming(tmp_path, fake):
    datasets = pytest.importorskip("datasets")
    data = fake.encoded(fake.rows(5))
    stream = datasets.Dataset.from_list(data).to_iterable_dataset()
    family = fake.Family()
    cached = build_cache(open_pairs(stream), family, tmp_path, geometry=Geometry(32), progress=False)
    assert cached.ids == ["0", "1", "2", "3", "4"]
    assert family.images == 10
    plain = fake.build(data, family, tmp_path)
    assert family.images == 10
    assert torch.equal(plain[4]["chosen_latents"], cached[4]["chosen_latents"])
    with pytest.raises(UserError, match="streamed, and encoding on the fly needs random access"):
        encode_on_the_fly(open_pairs(stream), Geometry(32), tmp_path)


def test_buckets(tmp_path, fake):
    data = [
        {"prompt": "p", "chosen": fake.noise(i, size), "rejected": fake.noise(i + 9, size)}
        for i, size in enumerate([(64, 64), (96, 48), (64, 64)])
    ]
    cached = fake.build(data, fake.Family(), tmp_path, geometry=Geometry(32, buckets="32,32;24,48"))
    assert cached.targets == [(24, 48), (32, 32)]
    assert cached.bucket_of == [1, 0, 1]
    assert cached[1]["chosen_latents"].shape == (3, 3, 6)


def test_on_the_fly_items_have_the_same_layout(tmp_path, fake):
    data = [
        {"prompt": f"p{i}", "chosen": fake.noise(i, (64, 32)), "rejected": fake.noise(9 + i, (64, 32))}
        for i in range(3)
    ]
    geometry = Geometry(32, crop="random", flip=True, seed=4)
    live = encode_on_the_fly(open_pairs(data), geometry, tmp_path, progress=False)
    cached = fake.build(data, fake.Family(), tmp_path, geometry=geometry)
    for index in range(3):
        latents = fake.Family().encode_images(live[index]["chosen_images"][None])[0]
        assert torch.allclose(latents, cached[index]["chosen_latents"], atol=1e-6)
        for name in ("id", "chosen_sizes", "rejected_sizes", "label"):
            assert torch.equal(live[index][name], cached[index][name])
    assert live[0]["prompt"] == "p0"
    assert live.bucket_of == cached.bucket_of


def test_loader_with_workers(tmp_path, fake):
    cached = fake.build(fake.rows(8), fake.Family(), tmp_path)
    order = SampleOrder(cached.bucket_of, seed=0, train_batch_size=4)
    sampler = OrderSampler(order, start_step=0, stop_step=4)
    plain, worked = (
        list(DataLoader(cached, batch_sampler=sampler, collate_fn=collate, num_workers=workers)) for workers in (0, 2)
    )
    assert plain[0]["chosen_latents"].shape == (4, 3, 4, 4)
    assert plain[0]["text"]["prompt_embeds"].shape == (4, 4, 6)
    for one, other in zip(plain, worked, strict=True):
        assert torch.equal(one["rejected_latents"], other["rejected_latents"])
    assert torch.equal(copy.deepcopy(cached)[0]["chosen_latents"], cached[0]["chosen_latents"])


def test_an_item_cannot_change_the_cache(tmp_path, fake):
    cached = fake.build(fake.rows(2), fake.Family(), tmp_path)
    before = cached[0]["chosen_latents"].clone()
    cached[0]["chosen_latents"].zero_()
    assert torch.equal(cached[0]["chosen_latents"], before)


def test_reading_is_fast(tmp_path, fake):
    cached = fake.build(fake.rows(32), fake.Family(), tmp_path)
    for index in range(32):
        cached[index]
    start = time.process_time()
    for _ in range(10):
        for index in range(32):
            cached[index]
    assert (time.process_time() - start) / 320 < 1e-3


def test_a_real_family(tmp_path, tiny_sdxl_path, fake):
    from diffalign.pipelines import load_family

    family = load_family(tiny_sdxl_path)
    geometry = Geometry(64, multiple=family.resolution_multiple)
    data = fake.rows(3)
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

"""One target, one crop and one flip for both pictures of a pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.geometry import Geometry, sizes_tensor
from diffalign.errors import UserError


def ramp(width, height):
    """Red grows from left to right, green from top to bottom, both over the full range."""
    red = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    green = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([red, green, np.zeros_like(red)], -1).round().astype(np.uint8))


def test_a_picture_of_the_target_size_is_untouched():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    placement, _ = Geometry(64).place("a", (64, 64), (64, 64))
    pixels = placement.pixels(image)
    assert pixels.dtype == torch.float32
    assert torch.equal((pixels * 255).round().to(torch.uint8), torch.from_numpy(np.array(image)).permute(2, 0, 1))
    assert placement.sizes == (64, 64, 0, 0, 64, 64)


def test_a_crop_without_scaling_copies_pixels():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 100, 3), dtype=np.uint8))
    placement, _ = Geometry(64, crop="random", seed=5).place("a", (64, 100), (64, 100))
    assert 0 < placement.left < 36
    expected = np.array(image)[:, placement.left : placement.left + 64]
    assert np.array_equal((placement.pixels(image) * 255).round().permute(1, 2, 0).numpy(), expected)


def test_centre_crop_and_its_sizes():
    placement, _ = Geometry(64).place("a", (128, 256), (128, 256))
    assert placement.resized == (64, 128)
    assert placement.sizes == (128, 256, 0, 32, 64, 64)
    pixels = placement.pixels(ramp(256, 128))
    assert pixels.shape == (3, 64, 64)
    assert float(pixels[0].mean()) == pytest.approx(0.5, abs=0.01)
    assert float(pixels[0, :, 0].mean()) == pytest.approx(0.25, abs=0.01)
    assert sizes_tensor([placement]).tolist() == [[128, 256, 0, 32, 64, 64]]


def test_random_crop_and_flip_are_shared_where_the_sizes_differ():
    geometry = Geometry(64, crop="random", flip=True, seed=1)
    flips = set()
    for name in "abcdefgh":
        first, second = geometry.place(name, (128, 256), (640, 1280))
        flips.add(first.flip)
        assert first.flip == second.flip
        images = [place.pixels(ramp(*place.original[::-1])) for place in (first, second)]
        assert float((images[0] - images[1]).abs().max()) < 0.02
        assert (first.sizes[:2], second.sizes[:2]) == ((128, 256), (640, 1280))
        assert (float(images[0][0, 0, 0]) > float(images[0][0, 0, -1])) == first.flip
    assert flips == {True, False}


def test_placement_is_keyed_by_seed_and_pair():
    def where(seed, name):
        return Geometry(64, crop="random", flip=True, seed=seed).place(name, (128, 512), (128, 512))[0].key

    assert where(1, "a") == where(1, "a")
    assert len({where(1, "a"), where(1, "b"), where(2, "a")}) == 3


def test_a_long_picture_costs_no_memory_for_what_is_cut_off():
    placement, _ = Geometry(512).place("a", (10, 60000), (10, 60000))
    assert placement.pixels(Image.new("RGB", (60000, 10), (255, 0, 0))).shape == (3, 512, 512)
    assert placement.enlarges


def test_buckets():
    geometry = Geometry(512, buckets="auto")
    assert (512, 512) in geometry.targets
    assert all(side % 64 == 0 for target in geometry.targets for side in target)
    wide, _ = geometry.place("a", (600, 1200), (600, 1200))
    assert wide.target[1] > wide.target[0]
    first, second = geometry.place("a", (600, 1200), (1200, 600))
    assert first.target == second.target == (512, 512)
    named = Geometry(64, buckets="64,64;48,80")
    assert named.place("a", (480, 800), (480, 800))[0].target == (48, 80)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 65}, r"65 pixels is not divisible by 8.*Choose 64 or 72"),
        ({"resolution": 0}, r"0 pixels is not divisible by 8"),
        ({"resolution": 64, "crop": "middle"}, r"unknown crop 'middle'"),
        ({"resolution": 64, "buckets": "64x64"}, r"buckets '64x64'.*for example '1024,1024;832,1216'"),
        ({"resolution": 64, "buckets": "64,60"}, r"60 pixels is not divisible by 8"),
    ],
)
@pytest.mark.filterwarnings("ignore:Bucket dimension")
def test_impossible_geometry(options, message):
    with pytest.raises(UserError, match=message):
        Geometry(**options)

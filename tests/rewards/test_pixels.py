from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision
from transformers import CLIPImageProcessor, SiglipImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffalign.errors import UserError
from diffalign.rewards import pixels
from diffalign.rewards.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess, center_crop, resize_shortest

Library: TypeAlias = Callable[[np.ndarray], Tensor]


@functools.lru_cache
def waves(height: int, width: int) -> np.ndarray:
    """A smooth picture with some noise, uint8 (height, width, 3)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    channels = [
        sum(np.sin(x * rng.uniform(0, 0.2) + y * rng.uniform(0, 0.2) + rng.uniform(0, 6)) for _ in range(4))
        for _ in range(3)
    ]
    picture = 0.5 + 0.12 * np.stack(channels, -1) + rng.normal(0, 0.05, (height, width, 3))
    return (picture.clip(0, 1) * 255).round().astype(np.uint8)


def tensor(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255


def transformers_(processor: type, **options: Any) -> Library:
    return lambda picture: processor(**options)(images=Image.fromarray(picture), return_tensors="pt").pixel_values


def open_clip_(mode: str) -> Library:
    transform = image_transform_v2(PreprocessCfg(size=224, resize_mode=mode), is_train=False)
    return lambda picture: transform(Image.fromarray(picture))[None]


def hps_package(picture: np.ndarray) -> Tensor:
    """As HPSv2's package does it, with torchvision's resize of float tensors."""
    pixels = tensor(picture)[0]
    scale = 224 / float(max(pixels.shape[1:]))
    height, width = (round(side * scale) for side in pixels.shape[1:])
    resized = vision.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
    left, top = (224 - width) // 2, (224 - height) // 2
    padded = vision.pad(resized, [left, top, 224 - width - left, 224 - height - top])
    return vision.normalize(padded, OPENAI_MEAN, OPENAI_STD)[None]


SIGLIP = Preprocess.from_config(SiglipImageProcessor().to_dict())
LETTERBOX = Preprocess(mode="letterbox", eight_bit=False)
LIBRARIES: dict[str, tuple[Library, Preprocess, bool]] = {
    # What the library does, what we do, and whether the library resizes by Pillow.
    "clip": (transformers_(CLIPImageProcessor), Preprocess(), False),
    "clip, pillow": (transformers_(CLIPImageProcessorPil), Preprocess(), True),
    "siglip": (transformers_(SiglipImageProcessor), SIGLIP, False),
    "siglip, pillow": (transformers_(SiglipImageProcessorPil), SIGLIP, True),
    "siglip 2": (
        transformers_(SiglipImageProcessor, resample=2),
        Preprocess.from_config(SiglipImageProcessor(resample=2).to_dict()),
        False,
    ),
    "open_clip": (open_clip_("shortest"), Preprocess.from_open_clip({"size": (224, 224)}), True),
    "open_clip, squash": (open_clip_("squash"), Preprocess.from_open_clip({"resize_mode": "squash"}), True),
    "open_clip, longest": (open_clip_("longest"), Preprocess.from_open_clip({"resize_mode": "longest"}), True),
}
SIZES = [(400, 600), (227, 301), (301, 227), (630, 360), (640, 160), (100, 140), (140, 60), (224, 224)]


def difference(picture: np.ndarray, theirs: Tensor, ours: Preprocess, *, exact: bool = False) -> Tensor:
    """To the library's own, in units of the [0, 1] pixel."""
    result = ours(tensor(picture), exact=exact)
    assert result.shape == theirs.shape == (1, 3, 224, 224)
    return (result - theirs).abs() * torch.tensor(ours.std).view(1, 3, 1, 1)


@pytest.mark.parametrize("name", LIBRARIES)
def test_agrees_with_the_library(name: str) -> None:
    library, ours, pillow = LIBRARIES[name]
    for height, width in SIZES:
        picture = waves(height, width)
        theirs = library(picture)
        exact = difference(picture, theirs, ours, exact=True)
        smooth = difference(picture, theirs, ours)
        # By Pillow a value that lies on a half may go to the other side, and tall pictures are resized columns first.
        largest, mean = ((4.5 / 255, 1.2e-3) if height > width else (2.5 / 255, 1.5e-4)) if pillow else (1e-6, 1e-6)
        assert exact.max() < largest and exact.mean() < mean, (height, width)
        assert smooth.max() < 0.025 and smooth.mean() < 0.0015, (height, width)


@pytest.mark.parametrize("size", SIZES)
def test_a_gpu_which_has_no_resize_of_bytes_does_the_same(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tensor(waves(*size))
    for ours in (Preprocess(), SIGLIP):
        by_bytes = ours(picture, exact=True)
        with monkeypatch.context() as patched:
            patched.setattr(pixels, "_has_bytes", lambda device: False)
            by_floats = ours(picture, exact=True)
        difference = (by_floats - by_bytes).abs() * torch.tensor(ours.std).view(1, 3, 1, 1)
        assert difference.max() < 2.5 / 255 and difference.mean() < 1.5e-4


@pytest.mark.parametrize("size", [*SIZES, (300, 301), (7, 900)])
def test_letterbox_is_that_of_the_hps_package(size: tuple[int, int]) -> None:
    picture = waves(*size)
    for exact in (True, False):
        assert difference(picture, hps_package(picture), LETTERBOX, exact=exact).max() < 1e-6


@pytest.mark.parametrize(
    ("size", "resized", "pads"),
    [
        ((768, 512), (224, 149), (0, 0, 37, 38)),
        ((512, 768), (149, 224), (37, 38, 0, 0)),
        ((1344, 768), (224, 128), (0, 0, 48, 48)),
        ((224, 100), (224, 100), (0, 0, 62, 62)),
        ((100, 100), (224, 224), (0, 0, 0, 0)),
    ],
)
def test_geometry_of_the_letterbox(
    size: tuple[int, int], resized: tuple[int, int], pads: tuple[int, int, int, int]
) -> None:
    pixels = LETTERBOX(torch.ones(1, 3, *size))
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (OPENAI_MEAN, OPENAI_STD))
    inside = (pixels[0] * std + mean) > 0.5
    top, bottom, left, right = pads
    assert inside[:, top : 224 - bottom, left : 224 - right].all()
    assert int(inside[0].sum()) == resized[0] * resized[1]
    black = pixels[0].masked_select(~inside)
    assert not len(black) or sorted(set(black.tolist())) == pytest.approx([-1.792263, -1.752097, -1.480220], abs=1e-5)


def test_without_antialias_it_would_be_another_metric() -> None:
    picture = waves(400, 600)
    for name, ours in (("clip, pillow", Preprocess()), ("open_clip, longest", LETTERBOX)):
        theirs = LIBRARIES[name][0](picture)
        without = dataclasses.replace(ours, antialias=False)
        assert difference(picture, theirs, without).mean() > 5 * difference(picture, theirs, ours).mean()


@pytest.mark.parametrize(("height", "top"), [(225, 0), (227, 1), (229, 2), (224, 0)])
def test_crop_rounds_as_transformers_does(height: int, top: int) -> None:
    rows = torch.arange(height).float().view(1, 1, height, 1).expand(1, 1, height, height)
    assert center_crop(rows, 224)[0, 0, 0, 0] == top
    assert center_crop(rows.mT, 224)[0, 0, 0, 0] == top
    even = {225: 0, 227: 2, 229: 2, 224: 0}[height]
    assert center_crop(rows, 224, rounds="even")[0, 0, 0, 0] == even
    torch.testing.assert_close(center_crop(rows, 224, rounds="even"), vision.center_crop(rows, [224, 224]))


def test_ones_stay_ones() -> None:
    assert (resize_shortest(torch.ones(1, 3, 50, 70), 28) - 1).abs().max() < 1e-6


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    picture = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert resize_shortest(picture, 28) is picture


@pytest.mark.parametrize("mode", ["crop", "letterbox", "squash"])
@pytest.mark.parametrize("size", [(8, 10), (3, 2)])
def test_gradient_in_float64(mode: Literal["crop", "letterbox", "squash"], size: tuple[int, int]) -> None:
    preprocess = Preprocess(4, 4, mode=mode)
    weights = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(1, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: (preprocess(x) * weights).sum(), pixels.requires_grad_())


def test_configs() -> None:
    assert Preprocess.from_config(CLIPImageProcessor().to_dict()) == Preprocess()
    assert Preprocess.from_config({}) == Preprocess()
    half = (0.5, 0.5, 0.5)
    assert Preprocess.from_config({"size": 28, "crop_size": 28, "image_mean": half}) == Preprocess(28, 28, half)
    square = {"height": 384, "width": 384}
    assert Preprocess.from_config({"size": square}) == Preprocess(384, 384, mode="squash")
    assert Preprocess.from_config({"size": square, "resample": 2}).interpolation == "bilinear"
    others: tuple[dict[str, Any], ...] = (
        {"do_center_crop": False},
        {"resample": 0},
        {"size": 200},
        {"do_rescale": False},
        {"size": {"height": 384, "width": 224}},
        {"size": square, "do_center_crop": True, "crop_size": 224},
        {"crop_size": {"height": 224, "width": 200}},
    )
    for other in others:
        with pytest.raises(UserError, match="other steps"):
            Preprocess.from_config(other)


def test_configs_of_open_clip() -> None:
    assert Preprocess.from_open_clip(dataclasses.asdict(PreprocessCfg())) == Preprocess(crop_rounds="even")
    longest = Preprocess.from_open_clip({"size": 28, "resize_mode": "longest", "interpolation": "bilinear"})
    assert (longest.mode, longest.interpolation, longest.crop) == ("letterbox", "bilinear", 28)
    for other in ({"size": (224, 200)}, {"resize_mode": "longest", "fill_color": 9}, {"interpolation": "random"}):
        with pytest.raises(UserError, match="not supported"):
            Preprocess.from_open_clip(other)

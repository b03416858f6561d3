from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign.errors import UserError
from diffalign.rewards.pixels import OPENAI_STD, Preprocess, center_crop, resize_shortest


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


def difference(picture: np.ndarray, processor: type, **options: object) -> Tensor:
    """To the library's own processor, in units of the [0, 1] pixel."""
    theirs = processor()(images=Image.fromarray(picture), return_tensors="pt").pixel_values
    ours = Preprocess()(tensor(picture), **options)
    assert ours.shape == theirs.shape == (1, 3, 224, 224)
    return (ours - theirs).abs() * torch.tensor(OPENAI_STD).view(1, 3, 1, 1)


@pytest.mark.parametrize("processor", [CLIPImageProcessorPil, CLIPImageProcessor])
@pytest.mark.parametrize("size", [(512, 768), (227, 301), (640, 333), (100, 140), (224, 224)])
def test_agrees_with_the_library(size: tuple[int, int], processor: type) -> None:
    picture = waves(*size)
    exact, smooth = difference(picture, processor, exact=True), difference(picture, processor)
    # A value that lies on a half may be rounded to the other side: one or two levels, in one place of a hundred.
    assert exact.max() < 2.5 / 255 and exact.mean() < 5e-5
    assert smooth.max() < 0.02 and smooth.mean() < 0.0015


def test_without_antialias_it_would_be_another_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    picture = waves(512, 768)
    with_it = difference(picture, CLIPImageProcessorPil).mean()
    real = torch.nn.functional.interpolate
    monkeypatch.setattr(
        "diffalign.rewards.pixels.interpolate", lambda *args, **kw: real(*args, **{**kw, "antialias": False})
    )
    assert difference(picture, CLIPImageProcessorPil).mean() > 5 * with_it


@pytest.mark.parametrize(("height", "top"), [(225, 0), (227, 1), (229, 2), (224, 0)])
def test_crop_rounds_as_transformers_does(height: int, top: int) -> None:
    rows = torch.arange(height).float().view(1, 1, height, 1).expand(1, 1, height, height)
    assert center_crop(rows, 224)[0, 0, 0, 0] == top
    assert center_crop(rows.mT, 224)[0, 0, 0, 0] == top


def test_ones_stay_ones() -> None:
    assert (resize_shortest(torch.ones(1, 3, 50, 70), 28) - 1).abs().max() < 1e-6


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    picture = torch.rand(1, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    assert resize_shortest(picture, 28) is picture


def test_gradient_in_float64() -> None:
    preprocess = Preprocess(4, 4)
    weights = torch.randn(1, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    pixels = torch.rand(1, 3, 8, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def head(images: Tensor) -> Tensor:
        resized = center_crop(resize_shortest(images, preprocess.size), preprocess.crop)
        return (resized * weights).sum()

    assert torch.autograd.gradcheck(head, pixels.requires_grad_())


def test_configs() -> None:
    assert Preprocess.from_config(CLIPImageProcessor().to_dict()) == Preprocess()
    assert Preprocess.from_config({}) == Preprocess()
    assert Preprocess.from_config({"size": 28, "crop_size": 28, "image_mean": [0.5, 0.5, 0.5]}) == Preprocess(
        28, 28, (0.5, 0.5, 0.5)
    )
    for other in ({"size": {"height": 384, "width": 384}}, {"do_center_crop": False}, {"resample": 2}):
        with pytest.raises(UserError, match="other steps"):
            Preprocess.from_config(other)

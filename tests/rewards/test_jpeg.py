from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.rewards.jpeg import JpegCompressibility, JpegIncompressibility


def noise(side: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def gray(side: int = 64) -> np.ndarray:
    return np.full((side, side, 3), 128, np.uint8)


def test_reference_numbers() -> None:
    """Of libjpeg-turbo 3.2 by Pillow 13; other encoders differ by a few bytes in a header and in rounding."""
    sizes = JpegIncompressibility()([Image.fromarray(gray()), Image.fromarray(noise())]).rewards
    assert sizes.tolist() == pytest.approx([0.689, 5.446], rel=0.02)
    assert JpegCompressibility()([Image.fromarray(noise())]).rewards.item() == -sizes[1].item()


def test_it_is_the_length_of_the_file_at_quality_95() -> None:
    for picture in (gray(), noise(), noise(17)):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=95)
        assert JpegIncompressibility()([Image.fromarray(picture)]).rewards.item() == pytest.approx(
            len(buffer.getvalue()) / 1000
        )
    coarse = JpegIncompressibility(quality=50)([Image.fromarray(noise())]).rewards
    assert coarse < 0.6 * JpegIncompressibility()([Image.fromarray(noise())]).rewards


def test_plain_pictures_win_one_and_lose_the_other() -> None:
    pictures = [Image.fromarray(a) for a in (gray(), (gray() // 2 + noise() // 4), noise())]
    small, large = load_reward("jpeg_compressibility")(pictures), load_reward("jpeg_incompressibility")(pictures)
    assert small.rewards.tolist() == sorted(small.rewards.tolist(), reverse=True)
    assert torch.equal(small.rewards, -large.rewards) and small.rewards.dtype == torch.float32


def test_tensors_score_as_the_pictures_they_are() -> None:
    arrays = np.stack([gray(), noise()])
    floats = torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255
    reward = JpegCompressibility(batch_size=1)
    assert torch.equal(reward(floats).rewards, reward([Image.fromarray(a) for a in arrays]).rewards)
    mixed = [torch.from_numpy(noise(side)).permute(2, 0, 1) for side in (64, 32, 64)]
    scores = reward(mixed).rewards
    assert scores[0] == scores[2] < scores[1]


def test_no_gradient_and_no_such_quality() -> None:
    with pytest.raises(TypeError, match="jpeg_compressibility is not differentiable"):
        JpegCompressibility()(torch.rand(1, 3, 8, 8, requires_grad=True), grad=True)
    for quality in (0, 96):
        with pytest.raises(UserError, match=f"from 1 to 95, got {quality}"):
            load_reward("jpeg_compressibility", quality=quality)

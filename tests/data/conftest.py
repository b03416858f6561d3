"""A stand-in for a model family, and pairs made of noise, as one fixture."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.data.cache import build_cache
from diffalign.data.geometry import Geometry
from diffalign.data.readers import open_pairs


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


@pytest.fixture
def fake():
    """``Family``, ``noise``, ``rows``, ``encoded`` and ``build``, see above."""
    return SimpleNamespace(Family=FakeFamily, noise=noise, rows=rows, encoded=encoded, build=build)

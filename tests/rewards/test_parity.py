"""How far scores are from those of the library's own processing, on trained models: the figures of docs/rewards.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from diffalign.assets import resolve
from diffalign.rewards import load_reward
from diffalign.rewards.aesthetic import ShapesAesthetic
from diffalign.shapes.scene import complete, parse, render, sample_captions

CAPTIONS = sample_captions(32, 0, heldout=True)


def pictures(width: int, height: int) -> list[Image.Image]:
    """Scenes with noise, of another size than the models take."""
    rng = np.random.default_rng(0)
    scenes = [render(complete(parse(caption), rng)).resize((width, height)) for caption in CAPTIONS]
    noisy = [np.asarray(scene) + rng.integers(-12, 13, (height, width, 3)) for scene in scenes]
    return [Image.fromarray(pixels.clip(0, 255).astype(np.uint8)) for pixels in noisy]


@torch.no_grad()
def librarys_scores(images: list[Image.Image]) -> dict[str, Tensor]:
    place = resolve("shapes-clip")
    pixels = CLIPImageProcessorPil.from_pretrained(place)(images=images, return_tensors="pt").pixel_values
    model = CLIPModel.from_pretrained(place, dtype=torch.float32).eval()
    output = model(
        pixel_values=pixels, **CLIPTokenizer.from_pretrained(place)(CAPTIONS, padding=True, return_tensors="pt")
    )
    head = ShapesAesthetic(device="cpu")
    head.load()
    return {
        "shapes-clip": output.logits_per_image.diagonal(),
        "shapes-aesthetic": head.head(output.image_embeds),
    }


@pytest.mark.parametrize("size", [(256, 256), (200, 150)])
def test_scores_are_those_of_the_librarys_own_processing(size: tuple[int, int]) -> None:
    images = pictures(*size)
    floats = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2).float() / 255
    for name, theirs in librarys_scores(images).items():
        reward = load_reward(name, device="cpu")
        exact, smooth = reward(images, CAPTIONS).rewards, reward(floats, CAPTIONS, grad=True).rewards.detach()
        assert (exact - theirs).abs().max() < 0.004 * theirs.std(), name
        assert 0 < (smooth - theirs).abs().max() < 0.03 * theirs.std(), name

"""Stage 4: ``shapes-aesthetic``, a head in the LAION layout that rates a picture of any caption from 1 to 10."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor
from torch.nn.functional import mse_loss
from transformers import CLIPProcessor

from diffalign.diffusion.random import key_seed, keyed_generator
from diffalign.rewards.aesthetic import AestheticHead
from diffalign.rewards.clip import embed_images
from diffalign.shapes import scene
from diffalign.shapes.annotators import rating
from diffalign.shapes.building.clip import clip_pixels, load_clip
from diffalign.shapes.building.stage import Schedule, train_stage
from diffalign.shapes.disturb import blur, jpeg, noise

logger = logging.getLogger(__name__)

RENDERS = 6000
BATCH = 256
WIDTHS = (128, 64, 32, 16, 1)
SCHEDULE = Schedule(steps=2000, learning_rate=2e-3, ema_decay=0.99, log_every=500, save_every=1000)


def draw_rated(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Renders from clean to badly spoilt, uint8 (count, 3, 64, 64), and their ratings from 1 to 10, (count,)."""
    rng = np.random.default_rng([seed, 5])
    pictures, ratings = [], []
    for _ in range(count):
        picture = scene.render(scene.complete(scene.sample_spec(rng), rng))
        for spoil in (
            lambda image: blur(image, rng, rng.uniform(0.3, 2.5)),
            lambda image: noise(image, rng, rng.uniform(2, 30)),
            lambda image: jpeg(image, rng, int(rng.integers(15, 90))),
        ):
            if rng.random() < 0.35:
                picture = spoil(picture)
        pictures.append(np.asarray(picture))
        ratings.append(rating(picture))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.tensor(ratings)


def train_aesthetic(
    folder: Path,
    clip: Path,
    samples: Tensor,
    work: Path,
    seed: int,
    device: str,
    schedule: Schedule = SCHEDULE,
    renders: int = RENDERS,
) -> dict[str, float]:
    """Regress the ratings of spoilt renders and of a model's ``samples`` on the embeddings of ``clip``; save the head.

    ``samples``: uint8 (N, 3, 64, 64), possibly none. A tenth of all pictures is held out. The folder gets
    ``model.safetensors`` with LAION's keys and ``config.json`` with the widths and the CLIP's bundled name.
    Returns, on the held-out pictures, the rank correlation with the rating, the root of the mean squared error, and
    the deviation of the ratings to hold that against.
    """
    images, ratings = draw_rated(renders, seed)
    sample_ratings = [rating(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in samples]
    images, ratings = torch.cat([images, samples]), torch.cat([ratings, torch.tensor(sample_ratings)]).float()
    order = torch.randperm(len(images), generator=keyed_generator(seed, "aesthetic"))
    embeddings, ratings = _embed(images[order], clip, device), ratings[order].to(device)
    held = len(images) // 10
    if not (folder / "config.json").exists():
        torch.manual_seed(key_seed(seed, "aesthetic"))
        head = AestheticHead([embeddings.shape[1], *WIDTHS]).to(device)
        torch.nn.init.constant_(head.layers[-1].bias, ratings.mean().item())  # type: ignore[arg-type]

        def loss_of_step(step: int) -> Tensor:
            generator = keyed_generator(seed, "aesthetic", step)
            rows = torch.randint(held, len(embeddings), (BATCH,), generator=generator).to(device)
            return mse_loss(head(embeddings[rows]), ratings[rows])

        train_stage("aesthetic", head, loss_of_step, schedule, work)
        save_head(head, folder)
    head = load_head(folder).to(device)
    with torch.no_grad():
        predicted = head(embeddings[:held])
    result = {
        "spearman": float(spearmanr(predicted.cpu(), ratings[:held].cpu()).statistic),
        "rmse": mse_loss(predicted, ratings[:held]).sqrt().item(),
        "deviation": ratings[:held].std().item(),
    }
    logger.info("aesthetic: on %d held-out pictures %s", held, result)
    return result


@torch.no_grad()
def _embed(images: Tensor, clip: Path, device: str) -> Tensor:
    model, processor = load_clip(clip, device), CLIPProcessor.from_pretrained(clip)
    return torch.cat([embed_images(model, clip_pixels(part.to(device), processor)) for part in images.split(256)])


def save_head(head: AestheticHead, folder: Path) -> None:
    """Write the head; config.json last, since its presence says that the folder is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {key: value.contiguous().cpu() for key, value in head.state_dict().items()}, folder / "model.safetensors"
    )
    config = {"architecture": "AestheticHead", "clip": "shapes-clip", "widths": list(head.widths)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_head(folder: Path) -> AestheticHead:
    """Read a saved head, in eval mode."""
    return AestheticHead.from_state_dict(load_file(folder / "model.safetensors"))

"""Stage 3: ``shapes-clip``, trained contrastively on captioned scenes, then on preferences as PickScore was."""

from __future__ import annotations

import io
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchvision.transforms.v2.functional import gaussian_blur
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from diffalign.diffusion.random import key_seed, keyed_generator
from diffalign.rewards.clip import clip_scores, embed_images, embed_texts
from diffalign.rewards.objectives import pickscore_loss
from diffalign.shapes import scene
from diffalign.shapes.building.stage import Schedule, train_stage
from diffalign.shapes.checker import Reading, facts
from diffalign.shapes.disturb import change_fact, changeable_facts, jpeg
from diffalign.shapes.scene import BACKGROUNDS, COLORS, LEFT_OUT, SHAPES, SIZES, STATED, Scene, Spec, Thing
from diffalign.shapes.tokenizer import build_tokenizer

logger = logging.getLogger(__name__)

SCENES = 16384
BATCH = 96
READING_BATCH = 64
HARD_NEGATIVES = 4
PROJECTION = 64
READING = Schedule(steps=3000, learning_rate=1e-3, ema_decay=0.99, weight_decay=1e-2)
CONTRASTIVE = Schedule(steps=1500, learning_rate=1e-3, ema_decay=0.998, weight_decay=1e-2)
PREFERENCES = Schedule(steps=300, learning_rate=1e-5, ema_decay=0.99, weight_decay=1e-2, warmup=30, log_every=50)
PREFERENCE_BATCH = 64
MAX_LOGIT_SCALE = math.log(100)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """A CLIP of 0.4 M parameters: 64 pixels in patches of 8, texts of up to 32 tokens, embeddings of 64."""
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "image_size": scene.SIZE,
        "patch_size": 8,
        "hidden_size": 96,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "hidden_act": "gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=PROJECTION))


def build_processor(tokenizer: CLIPTokenizer) -> CLIPProcessor:
    """The processor of ``shapes-clip``: CLIP's own steps and constants at 64 pixels."""
    side = scene.SIZE
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return CLIPProcessor(image_processor=images, tokenizer=tokenizer)


def clip_pixels(images: Tensor, processor: CLIPProcessor) -> Tensor:
    """What the processor does to pictures that are 64x64: uint8 (N, 3, 64, 64) to normalised float32."""
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    return (images.float() / 255 - mean) / std


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], device: str | torch.device) -> Tensor:
    """Token ids (N, L), padded to the longest text."""
    ids: Tensor = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").input_ids
    return ids.to(device)


def say_some(drawn: Scene, rng: np.random.Generator) -> Spec:
    """A true caption of a scene, of the training split; facts are stated as often as the world's captions do."""
    while scene.is_heldout((spec := _say_some(drawn, rng)).caption()):
        pass
    return spec


def _say_some(drawn: Scene, rng: np.random.Generator) -> Spec:
    things = tuple(
        Thing(
            placed.shape,
            placed.color if rng.random() < STATED["color"] else None,
            placed.size if rng.random() < STATED["size"] else None,
        )
        for placed in drawn.things
    )
    background = drawn.background if rng.random() < STATED["background"] else None
    if len(things) == 1:
        return Spec(things, background)
    return Spec(things, background, bool(rng.random() < STATED["relation"]), bool(rng.random() < 0.5))


def say_wrong(spec: Spec, drawn: Scene, rng: np.random.Generator, fact: str | None = None) -> Spec:
    """The caption with one fact changed, so that it is false of the scene. A wrong count is always false."""
    wrong = change_fact(spec, rng, fact)
    if all(facts(Reading.of_scene(drawn), wrong).values()):
        wrong = change_fact(spec, rng, "count")
    return wrong


def draw_scenes(count: int, seed: int) -> tuple[list[Scene], Tensor]:
    """Scenes drawn evenly over what captions leave open, and uint8 pictures (count, 3, 64, 64), a third of them JPEG.

    Even, not skewed as :data:`LEFT_OUT`: a judge of colours must not expect red.
    """
    rng = np.random.default_rng([seed, 3])
    scenes, pictures = [], []
    for index in range(count):
        spec = scene.sample_spec(rng)
        things = tuple(
            replace(
                thing,
                color=thing.color or str(rng.choice(list(LEFT_OUT["color"]))),
                size=thing.size or str(rng.choice(list(LEFT_OUT["size"]))),
            )
            for thing in spec.things
        )
        background = spec.background or str(rng.choice(list(LEFT_OUT["background"])))
        drawn = scene.complete(replace(spec, things=things, background=background), rng)
        picture = scene.render(drawn)
        scenes.append(drawn)
        pictures.append(np.asarray(jpeg(picture, rng, int(rng.integers(60, 96))) if index % 3 == 0 else picture))
    return scenes, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)


def disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Blur a third of uint8 pictures (N, 3, H, W), and add noise of up to 12 of 255 to half of them."""
    third = len(images) // 3
    sigma = 0.3 + 0.9 * float(torch.rand(1, generator=generator))
    pixels = images.float()
    pixels = torch.cat([gaussian_blur(pixels[:third], [7, 7], [sigma, sigma]), pixels[third:]]) if third else pixels
    strength = (torch.rand(len(images), 1, 1, 1, generator=generator) - 0.5).clamp(min=0) * 24
    noise = torch.randn(pixels.shape, generator=generator) * strength
    return (pixels + noise.to(pixels.device)).round().clamp(0, 255).byte()


def train_contrastive(
    folder: Path,
    work: Path,
    seed: int,
    device: str,
    schedule: Schedule = CONTRASTIVE,
    scenes: int = SCENES,
    reading: Schedule = READING,
) -> CLIPModel:
    """Train a CLIP on captioned scenes and save it, in float32, into ``folder``. Returns it in eval mode.

    The image tower first learns to read scenes (:func:`train_reading`): from captions alone it takes to colours in
    minutes and to shapes and places in hours. Then each image is held against the captions of its batch and, in a
    second term, against hard negatives: its own caption with one fact changed. A folder that is there is read, not
    trained again.
    """
    if (folder / "config.json").exists():
        return load_clip(folder, device)
    tokenizer = build_tokenizer(work / "tokenizer")
    torch.manual_seed(key_seed(seed, "clip"))
    model, processor = build_clip(tokenizer).to(device), build_processor(tokenizer)
    drawn, pictures = draw_scenes(scenes, seed)
    train_reading(model, processor, drawn, pictures, work, seed, reading)

    def loss_of_step(step: int) -> Tensor:
        generator = keyed_generator(seed, "clip", step)
        rng = np.random.default_rng(key_seed(seed, "captions", step))
        rows = torch.randint(len(drawn), (BATCH,), generator=generator).tolist()
        specs = [say_some(drawn[row], rng) for row in rows]
        true = [(spec, drawn[row]) for spec, row in zip(specs, rows, strict=True) for _ in range(HARD_NEGATIVES)]
        wrong = [say_wrong(spec, its_scene, rng) for spec, its_scene in true]
        texts = embed_texts(model, tokenize(tokenizer, [spec.caption() for spec in [*specs, *wrong]], device))
        pixels = clip_pixels(disturb(pictures[rows], generator).to(device), processor)
        return contrastive_loss(model, embed_images(model, pixels), texts[:BATCH], texts[BATCH:])

    def on_sample(step: int) -> None:
        accuracy = caption_accuracy(model.eval(), processor, 200, seed)
        model.train()
        logger.info("clip %d: true caption preferred to one wrong in %s", step, percent(accuracy))

    train_stage("clip", model, loss_of_step, schedule, work, on_sample)
    save_clip(model, processor, folder)
    return model.eval()


class Reader(nn.Module):
    """An image tower with a classifier for every fact of a scene; only the tower is kept."""

    def __init__(self, model: CLIPModel) -> None:
        super().__init__()
        self.tower = model.vision_model
        self.classes = [list(BACKGROUNDS)]
        for _ in range(2):
            self.classes += [[*SHAPES, ""], [*COLORS, ""], [*SIZES, ""]]
        width = model.config.vision_config.hidden_size
        self.heads = nn.Linear(width, sum(map(len, self.classes)))

    def targets(self, scenes: list[Scene]) -> Tensor:
        """Class of every fact, int64 (N, 7): background, then shape, colour and size from left to right."""
        rows = []
        for drawn in scenes:
            said = [drawn.background]
            for index in range(2):
                thing = drawn.things[index] if index < len(drawn.things) else None
                said += [thing.shape, thing.color, thing.size] if thing else ["", "", ""]
            rows.append([names.index(name) for names, name in zip(self.classes, said, strict=True)])
        return torch.tensor(rows)

    def forward(self, pixels: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy over facts and images."""
        logits = self.heads(self.tower(pixels).pooler_output).split([len(names) for names in self.classes], dim=1)
        return torch.stack([cross_entropy(own, of) for own, of in zip(logits, targets.unbind(1), strict=True)]).mean()


def train_reading(
    model: CLIPModel,
    processor: CLIPProcessor,
    drawn: list[Scene],
    pictures: Tensor,
    work: Path,
    seed: int,
    schedule: Schedule,
) -> None:
    """Train the image tower in place to name what scenes hold: every fact of every picture, at every step."""
    reader = Reader(model).to(model.device)
    targets = reader.targets(drawn)

    def loss_of_step(step: int) -> Tensor:
        generator = keyed_generator(seed, "reading", step)
        rows = torch.randint(len(drawn), (READING_BATCH,), generator=generator)
        pixels = clip_pixels(disturb(pictures[rows], generator).to(model.device), processor)
        loss: Tensor = reader(pixels, targets[rows].to(model.device))
        return loss

    train_stage("clip-reading", reader, loss_of_step, schedule, work)
    model.train()


def contrastive_loss(model: CLIPModel, images: Tensor, texts: Tensor, wrong: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy over the batch, plus cross-entropy of each caption against its own wrong ones.

    ``images``, ``texts``: unit embeddings (B, P); ``wrong``: (B * K, P), K in a row for each image.
    """
    model.logit_scale.data.clamp_(max=MAX_LOGIT_SCALE)
    scale = model.logit_scale.exp()
    logits = scale * images @ texts.T
    rows = torch.arange(len(images), device=images.device)
    own = logits.diagonal()[:, None]
    hard = scale * (images[:, None] * wrong.unflatten(0, (len(images), -1))).sum(-1)
    ranking = cross_entropy(torch.cat([own, hard], dim=1), torch.zeros_like(rows))
    return (cross_entropy(logits, rows) + cross_entropy(logits.T, rows)) / 2 + ranking


@torch.no_grad()
def caption_accuracy(model: CLIPModel, processor: CLIPProcessor, count: int, seed: int) -> dict[str, float]:
    """How often a true held-out caption scores above itself with one fact wrong, by kind of fact, on clean renders."""
    rng = np.random.default_rng([seed, 4])
    pictures, true, wrong, kinds = [], [], [], []
    for caption in scene.sample_captions(count, seed, heldout=True):
        spec = scene.parse(caption)
        drawn = scene.complete(spec, rng)
        for fact in changeable_facts(spec):
            pictures.append(np.asarray(scene.render(drawn)))
            true.append(caption)
            wrong.append(say_wrong(spec, drawn, rng, fact).caption())
            kinds.append(fact.split(".")[-1])
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).to(model.device)
    embeddings = torch.cat([embed_images(model, clip_pixels(part, processor)) for part in images.split(256)])
    texts = [embed_texts(model, tokenize(processor.tokenizer, texts, model.device)) for texts in (true, wrong)]
    right = (embeddings * (texts[0] - texts[1])).sum(-1) > 0
    by_kind = {kind: right[[k == kind for k in kinds]].float().mean().item() for kind in dict.fromkeys(kinds)}
    return {"all": right.float().mean().item(), **by_kind}


@dataclass(frozen=True)
class PreferenceSet:
    """A file of ``shapes-pairs`` in memory: captions, uint8 pictures (N, 3, 64, 64), labels and weights (N,)."""

    captions: list[str]
    images_0: Tensor
    images_1: Tensor
    label_0: Tensor
    num_example_per_prompt: Tensor

    @classmethod
    def read(cls, path: Path) -> PreferenceSet:
        """Read a parquet file with the Pick-a-Pic columns."""
        table = pq.read_table(path)

        def images(column: str) -> Tensor:
            decoded = [np.asarray(Image.open(io.BytesIO(value)).convert("RGB")) for value in table[column].to_pylist()]
            return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)

        return cls(
            table["caption"].to_pylist(),
            images("jpg_0"),
            images("jpg_1"),
            torch.tensor(table["label_0"].to_pylist()),
            torch.tensor(table["num_example_per_prompt"].to_pylist()),
        )


def train_on_preferences(
    folder: Path,
    start: Path,
    pairs: Path,
    work: Path,
    seed: int,
    device: str,
    schedule: Schedule = PREFERENCES,
) -> dict[str, float]:
    """Tune the CLIP of ``start`` on ``pairs`` (a ``shapes-pairs`` folder) and save it, in float16, into ``folder``.

    The objective is PickScore's. Returns the accuracy on held-out pairs before and after, ties left out.
    """
    model, processor = load_clip(start, device), CLIPProcessor.from_pretrained(start)
    heldout = PreferenceSet.read(pairs / "heldout.parquet")
    before = preference_accuracy(model, processor, heldout)
    if (folder / "config.json").exists():
        model = load_clip(folder, device)
        return {"before": before, "after": preference_accuracy(model, processor, heldout)}
    train = PreferenceSet.read(pairs / "train.parquet")
    tokens = tokenize(processor.tokenizer, train.captions, device)

    def loss_of_step(step: int) -> Tensor:
        rows = torch.randint(len(tokens), (PREFERENCE_BATCH,), generator=keyed_generator(seed, "preferences", step))
        pictures = torch.cat([train.images_0[rows], train.images_1[rows]]).to(device)
        images = embed_images(model, clip_pixels(pictures, processor))
        texts = embed_texts(model, tokens[rows.to(device)])
        scores = clip_scores(model, images, texts.repeat(2, 1)).chunk(2)
        weights = train.num_example_per_prompt[rows].to(device)
        return pickscore_loss(scores[0], scores[1], train.label_0[rows].to(device), weights)

    train_stage("clip-preferences", model, loss_of_step, schedule, work)
    save_clip(model.half(), processor, folder)
    model = load_clip(folder, device)
    result = {"before": before, "after": preference_accuracy(model, processor, heldout)}
    logger.info("clip: preferred picture of held-out pairs scores higher in %s", percent(result))
    return result


@torch.no_grad()
def preference_accuracy(model: CLIPModel, processor: CLIPProcessor, pairs: PreferenceSet) -> float:
    """Share of the pairs that are not ties in which the preferred picture scores higher, in [0, 1]."""
    texts = embed_texts(model, tokenize(processor.tokenizer, pairs.captions, model.device))
    images_0 = embed_images(model, clip_pixels(pairs.images_0.to(model.device), processor))
    images_1 = embed_images(model, clip_pixels(pairs.images_1.to(model.device), processor))
    difference = ((images_0 - images_1) * texts).sum(-1).cpu()
    decided = pairs.label_0 != 0.5
    return ((difference > 0) == (pairs.label_0 > 0.5))[decided].float().mean().item()


def save_clip(model: CLIPModel, processor: CLIPProcessor, folder: Path) -> None:
    """Write model and processor; config.json last, since its presence says that the folder is complete."""
    unfinished = folder.with_name(folder.name + ".tmp")
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    unfinished.rename(folder)


def load_clip(folder: Path, device: str) -> CLIPModel:
    """Read a saved CLIP in float32 and eval mode."""
    return CLIPModel.from_pretrained(folder, dtype=torch.float32).to(device).eval()


def percent(shares: dict[str, float]) -> str:
    """Shares as text, for the log."""
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())

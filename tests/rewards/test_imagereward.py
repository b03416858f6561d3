"""ImageReward against a checkpoint of its published names, made here, and against a forward written out here."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torchvision import transforms
from transformers import BertTokenizer

from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.rewards.aesthetic import AestheticHead
from diffalign.rewards.imagereward import ImageReward, ImageRewardModel, published_name, standardised
from diffalign.rewards.pixels import OPENAI_MEAN, OPENAI_STD, Preprocess

WORDS = ["a", "red", "blue", "circle", "square", "on", "gray", "##s", "left", "of", "large", "small", "cross", "and"]
VISION, TEXT, HEADS, PATCH, SIDE, DEPTH = 128, 24, 2, 16, 32, 2
WIDTHS = (TEXT, 8, 5, 4, 3, 1)
PROMPTS = ["a red circle", "blue squares on a gray square", "a large cross and a small cross left of a circle"]


def linear(name: str, outputs: int, inputs: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def layout(vision: int, text: int, *, depths: tuple[int, int], ff: tuple[int, int], places: tuple[int, int, int],
           patch: int, widths: tuple[int, ...]) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Names and shapes of the published file; ``places`` are image tokens, words and text positions."""
    see, read = "blip.visual_encoder", "blip.text_encoder"
    shapes = {f"{see}.cls_token": (1, 1, vision), f"{see}.pos_embed": (1, places[0], vision)}
    shapes |= {f"{see}.patch_embed.proj.weight": (vision, 3, patch, patch), f"{see}.patch_embed.proj.bias": (vision,)}
    for n in range(depths[0]):
        block = f"{see}.blocks.{n}"
        shapes |= norm(f"{block}.norm1", vision) | linear(f"{block}.attn.qkv", 3 * vision, vision)
        shapes |= linear(f"{block}.attn.proj", vision, vision) | norm(f"{block}.norm2", vision)
        shapes |= linear(f"{block}.mlp.fc1", ff[0], vision) | linear(f"{block}.mlp.fc2", vision, ff[0])
    shapes |= norm(f"{see}.norm", vision)
    shapes |= {f"{read}.embeddings.position_ids": (1, places[2])}
    shapes |= {f"{read}.embeddings.word_embeddings.weight": (places[1], text)}
    shapes |= {f"{read}.embeddings.position_embeddings.weight": (places[2], text)}
    shapes |= norm(f"{read}.embeddings.LayerNorm", text)
    for n in range(depths[1]):
        layer = f"{read}.encoder.layer.{n}"
        for kind, source in (("attention", text), ("crossattention", vision)):
            shapes |= linear(f"{layer}.{kind}.self.query", text, text)
            shapes |= linear(f"{layer}.{kind}.self.key", text, source)
            shapes |= linear(f"{layer}.{kind}.self.value", text, source)
            shapes |= linear(f"{layer}.{kind}.output.dense", text, text)
            shapes |= norm(f"{layer}.{kind}.output.LayerNorm", text)
        shapes |= linear(f"{layer}.intermediate.dense", ff[1], text) | linear(f"{layer}.output.dense", text, ff[1])
        shapes |= norm(f"{layer}.output.LayerNorm", text)
    shapes |= linear("blip.vision_proj", 256, vision) | linear("blip.text_proj", 256, text)
    for index, inputs, outputs in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        shapes |= linear(f"mlp.layers.{index}", outputs, inputs)
    return shapes


def tiny_state() -> dict[str, Tensor]:
    sizes = layout(VISION, TEXT, depths=(DEPTH, DEPTH), ff=(96, 40), places=(5, len(WORDS) + 7, 48), patch=PATCH,
                   widths=WIDTHS)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in sizes.items():
        value = torch.randn(shape, generator=generator)
        if name.endswith(("orm.weight", "norm1.weight", "norm2.weight")):
            value = 1 + 0.1 * value
        elif len(shape) == 2:
            value *= 1.5 / shape[1] ** 0.5
        state[name] = value
    state["blip.text_encoder.embeddings.position_ids"] = torch.arange(48)[None]
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return tiny_state()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, state: dict[str, Tensor]) -> dict[str, str]:
    """``checkpoint`` and ``processor``, as published: a torch file with its config, and BERT's tokenizer."""
    folder = tmp_path_factory.mktemp("imagereward")
    torch.save(state, folder / "ImageReward.pt")
    config = {"num_attention_heads": HEADS, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "encoder_width": 768}
    (folder / "med_config.json").write_text(json.dumps(config))
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}).save_pretrained(folder / "bert")
    return {"checkpoint": str(folder), "processor": str(folder / "bert")}


@pytest.fixture
def reward(places: dict[str, str]) -> ImageReward:
    return ImageReward(**places, device="cpu")


def noise(count: int, height: int = SIDE, width: int = SIDE) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """(B, L, W) queries, (B, M, W) keys and values; heads are consecutive channels."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return ((logits if bias is None else logits + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)


def written_out(state: Mapping[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The published network on the published names: pixels (B, 3, S, S), ids and mask (B, L) to logits (B,)."""

    def line(x: Tensor, name: str) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    see, read = "blip.visual_encoder", "blip.text_encoder"
    patches = pixels.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    x = patches @ state[f"{see}.patch_embed.proj.weight"].flatten(1).T + state[f"{see}.patch_embed.proj.bias"]
    x = torch.cat([state[f"{see}.cls_token"].expand(len(x), -1, -1), x], 1) + state[f"{see}.pos_embed"]
    for n in range(DEPTH):
        block = f"{see}.blocks.{n}"
        q, k, v = line(normed(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").split(VISION, -1)
        x = x + line(attend(q, k, v, HEADS), f"{block}.attn.proj")
        x = x + line(F.gelu(line(normed(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    image = normed(x, f"{see}.norm", 1e-6)

    words = state[f"{read}.embeddings.word_embeddings.weight"][ids]
    words = words + state[f"{read}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    h = normed(words, f"{read}.embeddings.LayerNorm", 1e-12)
    bias = torch.zeros(mask.shape, dtype=h.dtype).masked_fill(mask == 0, -torch.inf)[:, None, None]
    for n in range(DEPTH):
        layer = f"{read}.encoder.layer.{n}"
        for kind, source, masked in (("attention", None, bias), ("crossattention", image, None)):
            own, source = f"{layer}.{kind}.self", h if source is None else source
            seen = attend(line(h, f"{own}.query"), line(source, f"{own}.key"), line(source, f"{own}.value"), HEADS,
                          masked)  # fmt: skip
            h = normed(line(seen, f"{layer}.{kind}.output.dense") + h, f"{layer}.{kind}.output.LayerNorm", 1e-12)
        wide = F.gelu(line(h, f"{layer}.intermediate.dense"))
        h = normed(line(wide, f"{layer}.output.dense") + h, f"{layer}.output.LayerNorm", 1e-12)
    y = h[:, 0]
    for index in (0, 2, 4, 6, 7):
        y = line(y, f"mlp.layers.{index}")
    return y.squeeze(-1)


def test_the_port_is_the_published_network(reward: ImageReward, state: dict[str, Tensor]) -> None:
    output = reward(noise(3), PROMPTS)
    ids = [[2, 5, 6, 8, 3], [2, 7, 9, 12, 10, 5, 11, 9, 3], [2, 5, 15, 17, 18, 5, 16, 17, 13, 14, 5, 8, 3]]
    length = max(map(len, ids))
    padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])
    with torch.no_grad():
        expected = written_out(state, Preprocess(SIDE, SIDE)(noise(3), exact=True), padded, (padded > 0).long())
    torch.testing.assert_close(output.details["logit"], expected, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(output.rewards, (expected - 0.16717362830052426) / 1.0333394966054072)
    assert output.rewards.dtype == torch.float32 and output.rewards.std() > 0.02
    assert not torch.allclose(reward(noise(3), PROMPTS[::-1]).rewards, output.rewards, atol=1e-3)


def test_every_key_of_the_published_size_has_its_place() -> None:
    """The whole layout, on no memory; 446.7 million weights are published, with two projections that go unused."""
    sizes = layout(1024, 768, depths=(24, 12), ff=(4096, 3072), places=(197, 30524, 512), patch=16,
                   widths=(768, 1024, 128, 64, 16, 1))  # fmt: skip
    state = {name: torch.empty(shape, device="meta") for name, shape in sizes.items()}
    model = ImageRewardModel.from_state_dict(state)
    assert model.vision.config.num_attention_heads == 16 and model.vision.config.image_size == 224
    assert model.text.config.num_attention_heads == 12 and model.text.config.vocab_size == 30524
    unused = {name: state[name].numel() for name in sizes if "vision_proj" in name or "text_proj" in name}
    assert {published_name(name) for name in model.state_dict()} == (
        set(sizes) - set(unused) - {"blip.text_encoder.embeddings.position_ids"}
    )
    assert sum(p.numel() for p in model.parameters()) + sum(unused.values()) == 446_665_953


def test_reference_numbers_of_the_last_layers_and_of_the_standardised_score() -> None:
    head = AestheticHead((6, 8, 5, 4, 3, 1)).eval().layers
    for index, layer in enumerate(module for module in head if isinstance(module, torch.nn.Linear)):
        for parameter, scale in ((layer.weight, 1.0), (layer.bias, 0.1)):
            k = torch.arange(parameter.numel()).reshape(parameter.shape)
            parameter.data = scale * torch.cos(0.7 * k + index)
    x = torch.tensor([[1.0, 2, 3, 4, 5, 6], [6, -5, 4, -3, 2, -1]])
    logits = head(F.normalize(x, dim=-1)).squeeze(-1)
    assert logits.tolist() == pytest.approx([-0.29763731, -0.29015412], abs=1e-6)
    assert standardised(logits).tolist() == pytest.approx([-0.44981436, -0.44257250], abs=1e-6)
    assert standardised(torch.tensor([0.16717362830052426, 1.2005131249])).tolist() == pytest.approx([0, 1], abs=1e-6)


def test_scores_depend_neither_on_the_batch_nor_on_padding(reward: ImageReward, places: dict[str, str]) -> None:
    together = reward(noise(3), PROMPTS).rewards
    alone = ImageReward(**places, device="cpu", batch_size=1)
    torch.testing.assert_close(alone(noise(3), PROMPTS).rewards, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reward(noise(3).flip(0), PROMPTS[::-1]).rewards.flip(0), together)
    assert torch.equal(reward(noise(3), PROMPTS).rewards, together)
    pixels = reward.preprocess(noise(3), exact=True)
    encoded = reward.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert encoded.input_ids.shape[1] < 35
    short = reward.model(pixels, encoded.input_ids, encoded.attention_mask)
    torch.testing.assert_close(standardised(short), together, atol=1e-5, rtol=1e-5)


def test_prompts_are_cut_after_35_tokens(reward: ImageReward, caplog: pytest.LogCaptureFixture) -> None:
    fits, cut, other = (" ".join(words) for words in (["red"] * 33, ["red"] * 33 + ["blue"] * 9, ["blue"] * 33))
    images = noise(1).repeat(3, 1, 1, 1)
    with caplog.at_level(logging.WARNING):
        scores = reward(images, [fits, cut, other]).rewards
        reward(images, [cut] * 3)
    torch.testing.assert_close(scores[0], scores[1])
    assert (scores[2] - scores[0]).abs() > 1e-3
    long = [r.message for r in caplog.records if "tokens" in r.message]
    assert len(long) == 1 and long[0].startswith("imagereward: 1 of 3 prompts are longer than 35 tokens")
    assert reward._tokens([cut])[0].tolist() == [[2, *[6] * 33, 3]] == reward._tokens([fits])[0].tolist()


def test_preprocessing_is_that_of_the_package(reward: ImageReward) -> None:
    """Against Pillow and torchvision, as the package does it."""
    reward(noise(1), PROMPTS[:1])
    assert (reward.preprocess.mean, reward.preprocess.std) == (OPENAI_MEAN, OPENAI_STD)
    theirs = transforms.Compose([
        transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(224),
        transforms.ToTensor(),
        transforms.Normalize(OPENAI_MEAN, OPENAI_STD),
    ])  # fmt: skip
    ours = Preprocess(224, 224, crop_rounds=reward.preprocess.crop_rounds)
    rng = np.random.default_rng(0)

    def differences(values: np.ndarray) -> tuple[Tensor, Tensor]:
        picture = Image.fromarray(values.clip(0, 255).astype(np.uint8))
        pixels, std = transforms.ToTensor()(picture)[None], torch.tensor(OPENAI_STD).view(3, 1, 1)
        exact, smooth = (((ours(pixels, exact=e)[0] - theirs(picture)) * std).abs() for e in (True, False))
        return exact, smooth

    for height, width in ((300, 420), (640, 380), (100, 140), (227, 224), (224, 229)):
        y, x = np.mgrid[:height, :width] / 64
        waves = [np.sin(x * a + y * b) for a, b in rng.uniform(-9, 9, (3, 2))]
        exact, smooth = differences(127.5 + 90 * np.stack(waves, -1) + rng.normal(0, 12, (height, width, 3)))
        assert exact.mean() < 1e-4 and exact.max() < 0.008, (height, width)
        assert smooth.mean() < 0.0015 and smooth.max() < 0.02, (height, width)
    exact, smooth = differences(rng.integers(0, 256, (100, 180, 3)))  # overshoot is clipped with pictures only
    assert exact.max() < 0.008 and 0.1 < smooth.max() < 0.2


def test_floats_and_pictures_score_alike(reward: ImageReward) -> None:
    smooth = F.interpolate(noise(3, 6, 6), (60, 80), mode="bicubic").clamp(0, 1)
    pictures = [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in smooth]
    exact, differentiable = reward(pictures, PROMPTS).rewards, reward(smooth, PROMPTS, grad=True).rewards
    assert (exact - differentiable).abs().max() < 0.1 * exact.std()  # trained weights exaggerate less


def test_gradient_reaches_the_image_and_no_weight(reward: ImageReward) -> None:
    images = noise(3, 40, 52).requires_grad_()
    reward(images, PROMPTS, grad=True).rewards.sum().backward()
    assert images.grad is not None and torch.isfinite(images.grad).all()
    assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None for p in reward.model.parameters()) and not reward.model.training


def test_gradient_agrees_with_finite_differences(places: dict[str, str]) -> None:
    reward = ImageReward(**places, device="cpu", dtype=torch.float64)
    reward.load()
    images = noise(2, 36, 40).double().requires_grad_()

    def total(pixels: Tensor) -> Tensor:
        with torch.enable_grad():  # without it the pixels would be rounded to 8 bits, as of a picture
            scores, _ = reward.score(pixels, PROMPTS[:2], [{}, {}])
        return scores.sum()

    (gradient,) = torch.autograd.grad(total(images), images)
    assert gradient.dtype == torch.float64
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ahead, behind = (total(images.detach() + step * direction).item() for step in (1e-5, -1e-5))
    assert (gradient * direction).sum().item() == pytest.approx((ahead - behind) / 2e-5, rel=1e-6)


def test_half_precision_stays_within_two_percent(reward: ImageReward, places: dict[str, str]) -> None:
    half = ImageReward(**places, device="cpu", dtype=torch.bfloat16)
    full, low = reward(noise(3), PROMPTS).rewards, half(noise(3), PROMPTS).rewards
    assert low.dtype == torch.float32 and half.model.head[0].weight.dtype == torch.float32
    assert next(half.model.vision.parameters()).dtype == torch.bfloat16
    assert (low - full).abs().max() < 0.02 * full.abs().max()


def test_one_file_will_do(
    reward: ImageReward, places: dict[str, str], state: dict[str, Tensor], tmp_path: Path
) -> None:
    scores = reward(noise(3), PROMPTS).rewards
    processor = places["processor"]
    by_name = load_reward(f"imagereward:{places['checkpoint']}/ImageReward.pt", processor=processor, device="cpu")
    assert torch.equal(by_name(noise(3), PROMPTS).rewards, scores)
    kept = {key: value for key, value in state.items() if "_proj" not in key or "visual" in key}
    save_file({key: value.contiguous() for key, value in kept.items()}, tmp_path / "mine.safetensors")
    config = Path(places["checkpoint"], "med_config.json").read_text()
    (tmp_path / "med_config.json").write_text(config)
    mine = ImageReward(str(tmp_path / "mine.safetensors"), processor, device="cpu")
    assert torch.equal(mine(noise(3), PROMPTS).rewards, scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blip.visual_encoder.norm.weight": None}, r"weights it lacks: 1 \(blip.visual_encoder.norm.weight\)$"),
        ({"blip.visual_encoder.pos_embed": None, "mlp.layers.7.weight": None}, "lacks: 2 .*pos_embed, mlp"),
        ({"queue": torch.zeros(2)}, r"that have no place: 1 \(queue\)"),
        ({"blip.text_encoder.encoder.layer.3.output.dense.bias": torch.zeros(TEXT)}, "lacks: 51 .*layer.2"),
        ({"mlp.layers.0.bias": torch.zeros(7)}, r"another shape: 1 \(head.0.bias \(7,\) for \(8,\)\)"),
        ({"mlp.layers.0.weight": torch.zeros(8, 7)}, "gives 24, .* and the last layers take 7"),
        ({"blip.visual_encoder.patch_embed.proj.weight": torch.zeros(100, 3, 16, 16)}, "image half gives 100"),
    ],
)
def test_another_checkpoint_is_named(
    change: dict[str, Tensor | None], message: str, state: dict[str, Tensor], places: dict[str, str], tmp_path: Path
) -> None:
    changed = {key: value for key, value in {**state, **change}.items() if value is not None}
    torch.save(changed, tmp_path / "wrong.pt")
    (tmp_path / "med_config.json").write_text(json.dumps({"num_attention_heads": HEADS}))
    with pytest.raises(UserError, match=message) as error:
        ImageReward(str(tmp_path / "wrong.pt"), places["processor"], device="cpu")(noise(1), "a cross")
    assert "wrong.pt" in str(error.value)


def test_missing_places_are_named(places: dict[str, str], clip_path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights of ImageReward.*nowhere"):
        ImageReward(str(tmp_path / "nowhere"), places["processor"], device="cpu")(noise(1), "a cross")
    shutil.copy(Path(places["checkpoint"], "ImageReward.pt"), tmp_path)
    with pytest.raises(UserError, match=r"med_config\.json"):
        ImageReward(str(tmp_path), places["processor"], device="cpu")(noise(1), "a cross")
    (tmp_path / "med_config.json").write_text("{")
    with pytest.raises(UserError, match=r"med_config\.json is not the config"):
        ImageReward(str(tmp_path), places["processor"], device="cpu")(noise(1), "a cross")
    (tmp_path / "med_config.json").write_text('{"num_attention_heads": 5}')
    with pytest.raises(UserError, match=r"width of 24 cannot be divided into 5 attention heads, as med_config"):
        ImageReward(str(tmp_path), places["processor"], device="cpu")(noise(1), "a cross")
    for wrong in (clip_path, str(tmp_path)):
        with pytest.raises(UserError, match=r"the model has 21.*processor="):
            ImageReward(places["checkpoint"], wrong, device="cpu")(noise(1), "a cross")
    assert ImageReward().checkpoint == "THUDM/ImageReward" and ImageReward().processor == "bert-base-uncased"

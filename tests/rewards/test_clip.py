from __future__ import annotations

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from diffalign.errors import UserError
from diffalign.rewards import clip, encoders
from diffalign.rewards.clip import PickScore, clip_scores, embed_images, embed_texts, unwrap


@pytest.fixture(scope="module")
def model() -> CLIPModel:
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "vocab_size": 99, "max_position_embeddings": 12, "eos_token_id": 98, "bos_token_id": 97}
    vision = {**tower, "image_size": 28, "patch_size": 14}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()


def test_features_are_unwrapped_alike() -> None:
    features = torch.randn(2, 16)
    assert unwrap(features) is features
    assert unwrap(SimpleNamespace(pooler_output=features)) is features
    assert unwrap((torch.randn(2, 5, 32), features)) is features
    with pytest.raises(TypeError, match="NoneType"):
        unwrap(SimpleNamespace(pooler_output=None))


def test_scores_are_those_of_the_model(model: CLIPModel) -> None:
    torch.manual_seed(1)
    pixels, ids = torch.randn(3, 3, 28, 28), torch.randint(1, 90, (3, 7))
    ids[:, -1] = 98
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image.diagonal()
        images, texts = embed_images(model, pixels), embed_texts(model, ids)
        torch.testing.assert_close(clip_scores(model, images, texts), expected)
        padded = torch.cat([ids, torch.full((3, 4), 98)], dim=1)
        torch.testing.assert_close(embed_texts(model, padded), texts)
    assert images.norm(dim=-1).tolist() == pytest.approx([1, 1, 1])


def test_card_example_of_cosines() -> None:
    text = torch.nn.functional.normalize(torch.tensor([[3.0, 4, 0], [3, 4, 0]]), dim=-1)
    image = torch.nn.functional.normalize(torch.tensor([[1.0, 2, 2], [2, -1, 2]]), dim=-1)
    fake = SimpleNamespace(logit_scale=torch.tensor(4.0).log())
    scores = clip_scores(fake, image, text)  # type: ignore[arg-type]
    assert scores.softmax(0).tolist() == pytest.approx([0.916827, 0.083173], abs=1e-6)


PROMPTS = ["a red circle", "a blue square on a gray background", "a cross", "a small green diamond"]


def noise(count: int, *size: int) -> torch.Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reward(clip_path: str) -> PickScore:
    return PickScore(checkpoint=clip_path, device="cpu")


def test_score_equals_the_librarys_own_on_pictures(reward: PickScore, clip_path: str) -> None:
    pixels = (noise(4, 28, 28) * 255).round().byte()
    pictures = [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]
    processor, model = CLIPProcessor.from_pretrained(clip_path), CLIPModel.from_pretrained(clip_path)
    inputs = processor(images=pictures, text=PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits_per_image.diagonal()
    output = reward(pictures, PROMPTS)
    torch.testing.assert_close(output.rewards, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(output.details["cosine"], output.rewards / model.logit_scale.exp().item())
    torch.testing.assert_close(reward(pixels, PROMPTS).rewards, output.rewards)
    assert output.rewards.std() > 0.1


def test_scores_do_not_depend_on_the_batch(reward: PickScore, clip_path: str) -> None:
    images = noise(4, 40, 52)
    together = reward(images, PROMPTS).rewards
    alone = PickScore(checkpoint=clip_path, device="cpu", batch_size=1)
    torch.testing.assert_close(alone(images, PROMPTS).rewards, together, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reward(images.flip(0), PROMPTS[::-1]).rewards.flip(0), together, atol=1e-5, rtol=1e-5)
    assert torch.equal(reward(images, PROMPTS).rewards, together)


def test_floats_and_pictures_score_alike(reward: PickScore) -> None:
    smooth = torch.nn.functional.interpolate(noise(4, 6, 6), (60, 80), mode="bicubic").clamp(0, 1)
    pictures = [Image.fromarray((p * 255).round().byte().permute(1, 2, 0).numpy()) for p in smooth]
    exact, differentiable = reward(pictures, PROMPTS).rewards, reward(smooth, PROMPTS, grad=True).rewards
    assert (exact - differentiable).abs().max() < 0.1 * exact.std()  # trained weights exaggerate less: 0.01


def test_gradient_reaches_the_image_and_no_weight(reward: PickScore) -> None:
    for size, count in (((28, 28), 1), ((40, 52), 3)):
        images = noise(count, *size).requires_grad_()
        reward(images, PROMPTS[:count], grad=True).rewards.sum().backward()
        assert images.grad is not None and torch.isfinite(images.grad).all()
        assert (images.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(parameter.grad is None for parameter in reward.encoder.parameters())


def test_half_precision_tower_keeps_scores_fine(clip_path: str, reward: PickScore) -> None:
    half = PickScore(checkpoint=clip_path, device="cpu", dtype=torch.bfloat16)
    images = noise(4, 28, 28)
    full, low = reward(images, PROMPTS).rewards, half(images, PROMPTS).rewards
    assert low.dtype == torch.float32
    assert (low - full).abs().max() < 0.02 * reward.encoder.scale
    assert half.encoder.scale == reward.encoder.scale and half.encoder.dtype == torch.bfloat16


def test_a_prompt_is_encoded_once(reward: PickScore, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    real = encoders.embed_texts
    monkeypatch.setattr(encoders, "embed_texts", lambda model, ids: encoded.append(len(ids)) or real(model, ids))
    images = noise(4, 28, 28)
    first = reward(images, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]]).rewards
    assert encoded == [2]
    again = reward(images, [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[0]]).rewards
    assert encoded == [2] and torch.equal(first, again)
    monkeypatch.setattr(clip, "CACHED_PROMPTS", 2)
    reward(images[:3], [PROMPTS[0], PROMPTS[1], PROMPTS[0]])  # the first is used last
    assert encoded == [2] and list(reward._embedded) == [PROMPTS[1], PROMPTS[0]]
    reward(images[:1], [PROMPTS[2]])
    assert encoded == [2, 1] and list(reward._embedded) == [PROMPTS[0], PROMPTS[2]]
    reward(images, PROMPTS)
    assert len(reward._embedded) == 2
    reward.close()
    assert not reward._embedded


def test_long_prompts_are_cut_with_one_warning(reward: PickScore, caplog: pytest.LogCaptureFixture) -> None:
    words = ["red", "circle", "square", "blue"]
    long = " ".join(words * 10)
    with caplog.at_level(logging.WARNING):
        cut, short = reward(noise(2, 28, 28), [long, PROMPTS[0]]).rewards
        reward(noise(2, 28, 28), [long, PROMPTS[0]])
    assert [record.message for record in caplog.records].count(
        "pickscore: 1 of 2 prompts are longer than 16 tokens and were cut"
    ) == 1
    alone = reward(noise(2, 28, 28)[1:], PROMPTS[:1]).rewards
    torch.testing.assert_close(short[None], alone, atol=1e-5, rtol=1e-5)
    assert torch.isfinite(cut)


def test_the_published_layout_has_its_processor_elsewhere(clip_path: str, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(Path(clip_path) / name, tmp_path)
    keys = set(load_file(tmp_path / "model.safetensors"))
    assert {"logit_scale", "vision_model.pre_layrnorm.weight", "visual_projection.weight"} <= keys
    assert {"text_model.encoder.layers.1.mlp.fc2.bias", "vision_model.embeddings.class_embedding"} <= keys
    separate = PickScore(checkpoint=str(tmp_path), processor=clip_path, device="cpu")
    together = PickScore(checkpoint=clip_path, device="cpu")
    images = noise(2, 28, 28)
    assert torch.equal(separate(images, PROMPTS[:2]).rewards, together(images, PROMPTS[:2]).rewards)
    with pytest.raises(
        UserError, match="could not load the image processor from .* as processor= \\(pickscore's is laion/CLIP-ViT-H"
    ):
        PickScore(checkpoint=str(tmp_path), device="cpu")(images, PROMPTS[:2])
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its files are missing"):
        PickScore(checkpoint=str(tmp_path), device="cpu")(images, PROMPTS[:2])
    assert PickScore().processor == "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


def test_old_checkpoints_with_position_ids_load(clip_path: str, tmp_path: Path) -> None:
    shutil.copytree(clip_path, tmp_path / "old")
    state = load_file(tmp_path / "old/model.safetensors")
    state["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    state["vision_model.embeddings.position_ids"] = torch.arange(5)[None]
    save_file(state, tmp_path / "old/model.safetensors", metadata={"format": "pt"})
    images = noise(1, 28, 28)
    old, new = (PickScore(checkpoint=str(p), device="cpu") for p in (tmp_path / "old", clip_path))
    assert torch.equal(old(images, "a cross").rewards, new(images, "a cross").rewards)


def test_missing_weights_are_never_drawn_at_random(clip_path: str, tmp_path: Path) -> None:
    shutil.copytree(clip_path, tmp_path / "half")
    state = load_file(tmp_path / "half/model.safetensors")
    del state["visual_projection.weight"]
    save_file(state, tmp_path / "half/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"weights it lacks: 1 \(visual_projection.weight\)"):
        PickScore(checkpoint=str(tmp_path / "half"), device="cpu")(noise(1, 28, 28), "a cross")
    with pytest.raises(UserError, match="could not load AutoConfig from '.*nowhere'"):
        PickScore(checkpoint=str(tmp_path / "nowhere"), device="cpu")(noise(1, 28, 28), "a cross")


def test_a_difference_of_scores_is_a_bradley_terry_logit() -> None:
    assert torch.tensor([21.50, 20.98]).softmax(0).tolist() == pytest.approx([0.627148, 0.372852], abs=1e-6)
    assert PickScore.scale == "bt_logit"

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import BertConfig, CLIPImageProcessor, CLIPModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.rewards.aesthetic import Aesthetic, AestheticHead, ShapesAesthetic, read_weights
from diffalign.rewards.clip import unwrap
from diffalign.rewards.pixels import Preprocess


def filled(widths: list[int]) -> AestheticHead:
    """A head in float64 with weights from a cosine, as in the published layout's reference example."""
    head = AestheticHead(widths).double().eval()
    linears = [module for module in head.layers if isinstance(module, torch.nn.Linear)]
    for index, linear in enumerate(linears):
        for parameter, scale in ((linear.weight, 1.0), (linear.bias, 0.1)):
            k = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.data = scale * torch.cos(0.7 * k + index)
    return head


def test_reference_numbers_of_a_tiny_head() -> None:
    inputs = torch.tensor([[1, 2, 3, 4, 5, 6], [6, -5, 4, -3, 2, -1]], dtype=torch.float64)
    assert filled([6, 8, 5, 4, 3, 1])(inputs).tolist() == pytest.approx([-0.29763731, -0.29015412], abs=1e-8)


def test_reference_numbers_of_the_full_layout() -> None:
    k = torch.arange(768, dtype=torch.float64)
    inputs = torch.stack([torch.sin(0.01 * (k + 1)), torch.cos(0.03 * k)])
    head = filled([768, 1024, 128, 64, 16, 1])
    assert head(inputs).tolist() == pytest.approx([-256.814033, -256.374926], abs=1e-5)


def test_state_dict_round_trip_keeps_widths_and_scores() -> None:
    torch.manual_seed(0)
    head = AestheticHead([6, 8, 5, 4, 3, 1]).eval()
    again = AestheticHead.from_state_dict(head.state_dict())
    x = torch.randn(4, 6)
    assert again.widths == (6, 8, 5, 4, 3, 1) and not again.training
    torch.testing.assert_close(again(x), head(x))


def test_keys_of_another_head_are_named() -> None:
    state = {f"layers.{index}.{part}": torch.zeros(1) for index in (0, 3, 6, 9, 12) for part in ("weight", "bias")}
    with pytest.raises(UserError, match=r"layers\.{0,2,4,6,7}.*layers\.12\.bias"):
        AestheticHead.from_state_dict(state)


def test_gradient_reaches_the_embedding() -> None:
    x = torch.randn(2, 6, requires_grad=True)
    AestheticHead([6, 8, 5, 4, 3, 1]).eval()(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_relu_head_is_told_apart_by_its_keys() -> None:
    torch.manual_seed(0)
    head = AestheticHead([6, 8, 5, 4, 3, 1], relu=True).eval()
    state = head.state_dict()
    assert {key.split(".")[1] for key in state} == {"0", "3", "6", "9", "11"}
    again, x = AestheticHead.from_state_dict(state), torch.randn(4, 6)
    torch.testing.assert_close(again(x), head(x))
    linear = AestheticHead([6, 8, 5, 4, 3, 1])
    linear.load_state_dict(dict(zip(linear.state_dict(), state.values(), strict=True)))
    assert not torch.allclose(linear.eval()(x), head(x))


def images(count: int, side: int = 28) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reward(head_path: Path, clip_path: str) -> Aesthetic:
    return Aesthetic(str(head_path), tower=clip_path, device="cpu")


def test_score_is_the_head_on_the_normalised_embedding(reward: Aesthetic, head_path: Path, clip_path: str) -> None:
    model = CLIPModel.from_pretrained(clip_path).eval()
    head = AestheticHead.from_state_dict(torch.load(head_path, weights_only=True))
    with torch.no_grad():
        embedding = unwrap(model.get_image_features(pixel_values=Preprocess(28, 28)(images(3), exact=True)))
        expected = head(embedding / embedding.norm(dim=-1, keepdim=True))
        wrong = head.layers(embedding).squeeze(-1)
    scores = reward(images(3)).rewards
    torch.testing.assert_close(scores, expected)
    assert not torch.allclose(scores, wrong, atol=1e-3)


def test_full_layout_on_a_tower_of_768(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPVisionConfig(**tower, image_size=28, patch_size=14, projection_dim=768)
    model = CLIPVisionModelWithProjection(config).eval()
    model.save_pretrained(tmp_path / "tower")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path / "tower")
    head = filled([768, 1024, 128, 64, 16, 1]).float()
    save_file(head.state_dict(), tmp_path / "head.safetensors")
    with torch.no_grad():
        embedding = model(pixel_values=Preprocess(28, 28)(images(2), exact=True)).image_embeds
        expected = head(embedding)
    loaded = Aesthetic(str(tmp_path / "head.safetensors"), tower=str(tmp_path / "tower"), device="cpu")
    torch.testing.assert_close(loaded(images(2)).rewards, expected, atol=2e-3, rtol=1e-5)


def test_batches_prompts_and_precision(reward: Aesthetic, head_path: Path, clip_path: str) -> None:
    scores = reward(images(5)).rewards
    assert torch.equal(reward(images(5), ["whatever"] * 5).rewards, scores)
    alone = Aesthetic(str(head_path), tower=clip_path, device="cpu", batch_size=1)
    torch.testing.assert_close(alone(images(5)).rewards, scores, atol=1e-5, rtol=1e-5)
    half = Aesthetic(str(head_path), tower=clip_path, device="cpu", dtype=torch.bfloat16)
    assert half(images(5)).rewards.dtype == torch.float32
    torch.testing.assert_close(half(images(5)).rewards, scores, atol=0.02, rtol=0.02)
    assert next(half.head.parameters()).dtype == torch.float32


def test_gradient_reaches_the_image_also_where_someone_called_train(reward: Aesthetic) -> None:
    pixels = images(2, 40).requires_grad_()
    scores = reward(pixels, grad=True).rewards
    scores.sum().backward()
    assert pixels.grad is not None and torch.isfinite(pixels.grad).all()
    assert (pixels.grad.flatten(1).abs().sum(1) > 0).all()
    assert all(p.grad is None for p in [*reward.head.parameters(), *reward.tower.parameters()])
    assert not reward.head.training and not reward.tower.training


def test_wrong_files_are_named(head_path: Path, clip_path: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weight file .*nowhere.pth"):
        Aesthetic("nowhere.pth", tower=clip_path, device="cpu")(images(1))
    torch.save(AestheticHead([6, 8, 5, 4, 3, 1]).state_dict(), tmp_path / "other.pth")
    with pytest.raises(UserError, match="takes embeddings of 6, but .* gives 16"):
        Aesthetic(str(tmp_path / "other.pth"), tower=clip_path, device="cpu")(images(1))
    (tmp_path / "other").mkdir()
    BertConfig().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="is a bert, not a clip"):
        Aesthetic(str(head_path), tower=str(tmp_path / "other"), device="cpu")(images(1))
    torch.save(AestheticHead([6, 8, 5, 4, 3, 1]), tmp_path / "pickled.pth")
    with pytest.raises(UserError, match="nothing else is loaded"):
        read_weights(str(tmp_path / "pickled.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="holds a list"):
        read_weights(str(tmp_path / "list.pth"))


def test_bundled_layout(clip_path: str, head_path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "head"
    folder.mkdir()
    save_file(torch.load(head_path, weights_only=True), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"clip": clip_path, "widths": [16, 8, 5, 4, 3, 1]}))
    shapes = ShapesAesthetic(str(folder), device="cpu")
    published = Aesthetic(str(head_path), tower=clip_path, device="cpu")
    assert torch.equal(shapes(images(2)).rewards, published(images(2)).rewards)
    assert load_reward(f"shapes-aesthetic:{folder}").name == "shapes-aesthetic"
    assert load_reward(f"aesthetic:{head_path}", tower=clip_path).name == "aesthetic"

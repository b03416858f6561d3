from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from diffalign.rewards.clip import clip_scores, embed_images, embed_texts, unwrap


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

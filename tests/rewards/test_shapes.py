from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.shapes import annotators, checker, scene

CAPTIONS = scene.sample_captions(4, 0)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [scene.render(scene.complete(scene.parse(caption), rng)) for caption in CAPTIONS]


def test_checker(pictures: list[Image.Image]) -> None:
    reward = load_reward("shapes-checker")
    assert reward(pictures, CAPTIONS).rewards.tolist() == [1.0] * 4
    wrong = [*CAPTIONS[1:], CAPTIONS[0]]
    expected = [checker.score(*pair) for pair in zip(pictures, wrong, strict=True)]
    assert reward(pictures, wrong).rewards.tolist() == pytest.approx(expected)
    assert min(expected) < 1
    pixels = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1) for p in pictures])
    assert reward(pixels, CAPTIONS).rewards.tolist() == [1.0] * 4
    assert reward(pixels.float() / 255, CAPTIONS).rewards.tolist() == [1.0] * 4


def test_annotator(pictures: list[Image.Image]) -> None:
    mean, fifth = load_reward("shapes-annotator"), load_reward("shapes-annotator", user_id=5)
    for reward, user in ((mean, None), (fifth, 5)):
        expected = [annotators.utility(p, c, user) for p, c in zip(pictures, CAPTIONS, strict=True)]
        assert reward(pictures, CAPTIONS).rewards.tolist() == pytest.approx(expected)
    assert mean(pictures, CAPTIONS).rewards.tolist() != fifth(pictures, CAPTIONS).rewards.tolist()


def test_what_they_cannot_judge_is_named(pictures: list[Image.Image]) -> None:
    for name in ("shapes-checker", "shapes-annotator"):
        with pytest.raises(UserError, match=f"{name} cannot judge prompt 1: .*'a photo of a dog'"):
            load_reward(name)(pictures[:2], [CAPTIONS[0], "a photo of a dog"])
    with pytest.raises(UserError, match="no annotator has user_id 99"):
        load_reward("shapes-annotator", user_id=99)
    with pytest.raises(TypeError, match="shapes-checker is not differentiable"):
        load_reward("shapes-checker")(pictures, CAPTIONS, grad=True)

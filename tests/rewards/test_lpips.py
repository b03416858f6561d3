from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.lpips import LPIPSDiversity

torchvision = pytest.importorskip("torchvision")
pytest.importorskip("torchmetrics")


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights of SqueezeNet where torchvision looks for ImageNet's, so that nothing is downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    _, file = LPIPSDiversity("squeeze").weights_file()
    file.parent.mkdir(parents=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(torchvision.models.squeezenet1_1().state_dict(), file)
    return file


def pictures(count: int) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_an_image_has_the_mean_lpips_to_the_others_of_its_prompt(weights: Path) -> None:
    from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity as lpips

    images, groups = pictures(6), [0, 1, 0, 0, 1, 2]
    output = LPIPSDiversity("squeeze", device="cpu", batch_size=2)(images, group_ids=groups)
    for index, group in enumerate(groups[:5]):
        others = [i for i, other in enumerate(groups) if other == group and i != index]
        expected = [
            lpips(images[[index]], images[[other]], net_type="squeeze", normalize=True).item() for other in others
        ]
        assert output.rewards[index].item() == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert output.valid.tolist() == [True] * 5 + [False] and "no other image" in str(output.messages[5])


def test_equal_images_have_none_and_the_order_does_not_matter(weights: Path) -> None:
    reward = LPIPSDiversity("squeeze", device="cpu")
    images = pictures(4)
    assert reward(images[[0, 0, 0]], group_ids=[7, 7, 7]).rewards.tolist() == [0, 0, 0]
    whole = reward(images, group_ids=[0] * 4).rewards
    for order in itertools.islice(itertools.permutations(range(4)), 1, 24, 7):
        shuffled = reward(images[list(order)], group_ids=[0] * 4).rewards
        assert torch.allclose(shuffled, whole[list(order)], rtol=1e-4)


def test_without_the_weights_one_is_told_where_to_put_them(weights: Path, monkeypatch: Any) -> None:
    weights.unlink()

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(UserError, match=r"squeezenet1_1.*put it at .*checkpoints"):
        LPIPSDiversity("squeeze").prepare()
    weights.write_bytes(b"cut off")
    with pytest.raises(UserError, match="cannot have the weights"):
        LPIPSDiversity("squeeze").prepare()
    with pytest.raises(UserError, match="alex, vgg, squeeze"):
        LPIPSDiversity("alexnet")  # type: ignore[arg-type]

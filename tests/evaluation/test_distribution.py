from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.evaluation import distribution
from diffalign.evaluation.distribution import Realism
from diffalign.evaluation.folder import Case, SampleFolder


class Means(nn.Module):
    """Mean of each channel: three features that one can compute by hand."""

    num_features = 3

    def forward(self, images: Tensor) -> Tensor:
        return images.double().mean((2, 3)) / 255


def features(images: list[Image.Image]) -> np.ndarray:
    return np.array([np.asarray(image, dtype=np.float64).mean((0, 1)) / 255 for image in images])


@pytest.fixture
def colours() -> list[Image.Image]:
    values = np.random.default_rng(0).integers(0, 256, size=(24, 3))
    return [Image.new("RGB", (8, 8), tuple(int(v) for v in value)) for value in values]


def test_fid_is_the_distance_of_two_gaussians(
    colours: list[Image.Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchmetrics")
    real_metrics = distribution.make_metrics
    monkeypatch.setattr(distribution, "make_metrics", lambda subset, feature: real_metrics(subset, Means()))
    (tmp_path / "real").mkdir()
    for number, image in enumerate(colours[:12]):
        image.save(tmp_path / "real" / f"{number}.png")
    folder = SampleFolder(tmp_path / "drawn", {})
    folder.prepare()
    cases = [Case(index, "p", 0) for index in range(12)]
    for case, image in zip(cases, colours[12:], strict=True):
        folder.add(case, image, {})
    found = Realism(str(tmp_path / "real"), 12, device="cpu").distances({"model": folder}, cases)["model"]
    a, b = features(colours[:12]), features(colours[12:])
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * np.real(sqrtm(ca @ cb)))
    assert found["fid"] == pytest.approx(expected, abs=1e-5)
    state = torch.random.get_rng_state()
    again = Realism(str(tmp_path / "real"), 12, device="cpu").distances({"model": folder}, cases)["model"]
    assert again == found and torch.equal(torch.random.get_rng_state(), state)


def test_without_torchmetrics_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchmetrics"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"diffalign\[fid\]"):
        distribution.make_metrics(10)
    with pytest.raises(UserError, match="at least two"):
        distribution.make_metrics(1)


def test_without_inceptions_weights_one_is_told_where_they_go(monkeypatch: pytest.MonkeyPatch) -> None:
    fid = pytest.importorskip("torchmetrics.image.fid")

    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("no network")

    monkeypatch.setattr(fid, "FrechetInceptionDistance", offline)
    with pytest.raises(UserError, match=r"no network.*inception-2015-12-05.*checkpoints.*--reference_features"):
        distribution.make_metrics(10)


def test_a_clip_in_place_of_inception(colours: list[Image.Image], tmp_path: Path) -> None:
    """Images of the reference itself are at distance 0 of it, others are not; nothing is downloaded."""
    pytest.importorskip("torchmetrics")
    (tmp_path / "real").mkdir()
    folders = {name: SampleFolder(tmp_path / name, {}) for name in ("same", "other")}
    cases = [Case(index, "p", 0) for index in range(12)]
    for folder, images in zip(folders.values(), (colours[:12], colours[12:]), strict=True):
        folder.prepare()
        for case, image in zip(cases, images, strict=True):
            folder.add(case, image, {})
    for number, image in enumerate(colours[:12]):
        image.save(tmp_path / "real" / f"{number}.png")
    realism = Realism(str(tmp_path / "real"), 12, "shapes-clip", "cpu")
    assert realism.side == 64
    found = realism.distances(folders, cases)
    assert found["same"]["fid"] == pytest.approx(0, abs=1e-4) and found["other"]["fid"] > 1e-3
    assert found["same"]["kid"] < found["other"]["kid"]

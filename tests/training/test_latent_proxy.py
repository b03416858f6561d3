"""The latent proxy: its loss against the card's numbers, what it starts from, and that it learns an expert."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from diffalign.assets import resolve
from diffalign.errors import UserError
from diffalign.rewards.encoders import load_encoder
from diffalign.training.latent_proxy import (
    PAIRS,
    LatentProxy,
    fit_colours,
    latent_patches,
    patch_size,
    proxy_agreement,
    proxy_loss,
)
from diffalign.training.proxy_learner import Lesson, ProxyConfig, ProxyLearner

SHAPE = (4, 16, 16)
PROMPTS = ("a red circle", "a blue square on a gray background", "two crosses")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture
def make_proxy() -> Callable[..., LatentProxy]:
    """Makes a proxy of shapes-clip for latents (4, 16, 16), whose colours are four of the latents' own."""

    def make(image_groups: int | None = 2, text_groups: int | None = 5) -> LatentProxy:
        place = resolve("shapes-clip")
        colours = 0.2 * draw(3, SHAPE[0] + 1, seed=1)
        return LatentProxy(load_encoder(place, place), SHAPE, colours, image_groups, text_groups)

    return make


@pytest.fixture
def make_learner(make_proxy: Callable[..., LatentProxy], tmp_path: Path) -> Callable[..., ProxyLearner]:
    """Makes one whose proxy trains as a whole."""

    def make(**own: Any) -> ProxyLearner:
        settings: dict[str, Any] = {"proxy_learning_rate": 1e-3, "train_batch_size": 4, **own}
        config = ProxyConfig(pretrained_model_name_or_path="none", output_dir=str(tmp_path), **settings)
        return ProxyLearner(make_proxy(None, None), config, Accelerator(cpu=True))

    return make


def lesson(count: int, seed: int = 0) -> Lesson:
    """Latents whose expert, a judge that no CLIP is, likes much in the first channel; for the last prompt, little."""
    latents = draw(count, 3, *SHAPE, seed=seed) + draw(count, 3, 1, 1, 1, seed=seed + 10_000)
    sign = torch.tensor([-1.0 if i % 3 == 2 else 1.0 for i in range(count)])
    return Lesson(latents, [PROMPTS[i % 3] for i in range(count)], 4 * sign[:, None] * latents[:, :, 0].mean((-1, -2)))


# The loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_cards() -> None:
    expert = torch.tensor([[1.0, 2.0, 1.5]], dtype=torch.float64)
    proxy = torch.tensor([[0.5, 0.2, 0.4]], dtype=torch.float64)
    assert proxy_loss(expert, proxy).item() == pytest.approx(0.2950484008, abs=1e-10)
    assert proxy_loss(expert, proxy, smooth_gt_label=True).item() == pytest.approx(0.2402566726, abs=1e-10)
    parts = [0.1914697092, 0.0437952746, 0.0597834170]
    # One pair at a time: the third candidate far behind for both, by equally much, adds nothing.
    for (i, j), part in zip(PAIRS, parts, strict=True):
        far = torch.full((1, 3), -80.0, dtype=torch.float64)
        pair = [far.clone(), far.clone()]
        for mine, theirs in zip(pair, (expert, proxy), strict=True):
            mine[0, i], mine[0, j] = theirs[0, i], theirs[0, j]
        assert proxy_loss(*pair).item() == pytest.approx(part, abs=1e-9), (i, j)


def test_the_gradient_is_right_and_none_goes_to_the_expert() -> None:
    expert = draw(5, 3, seed=1, dtype=torch.float64).requires_grad_()
    proxy = draw(5, 3, seed=2, dtype=torch.float64).requires_grad_()
    for options in ({}, {"smooth_gt_label": True}, {"kind": "cross_entropy"}):
        assert torch.autograd.gradcheck(lambda own, o=options: proxy_loss(expert, own, **o), proxy)
    proxy_loss(expert, proxy).sum().backward()
    assert expert.grad is None and proxy.grad is not None


def test_a_proxy_that_is_the_expert_up_to_a_shift_of_the_prompt_has_nothing_to_learn() -> None:
    expert = draw(6, 3, dtype=torch.float64)
    proxy = (expert + draw(6, 1, seed=1, dtype=torch.float64)).requires_grad_()
    losses = proxy_loss(expert, proxy)
    losses.sum().backward()
    assert losses.abs().max() < 1e-14 and proxy.grad is not None and proxy.grad.abs().max() < 1e-14


def test_hard_labels_are_of_their_own_pair_and_the_real_image_always_wins() -> None:
    # By the argmax over the batch, the first prompt's student (9) would lose and the second's (1) would win.
    expert = torch.tensor([[9.0, 8.0, 0.0], [1.0, 2.0, 0.0], [3.0, 3.0, 0.0]], dtype=torch.float64)
    proxy = draw(3, 3, dtype=torch.float64)
    wins = [[0, 1, 0.5], [1, 1, 1], [1, 1, 1]]  # Probability that the second of each pair is the better one.
    expected = torch.zeros(3, dtype=torch.float64)
    for (i, j), second in zip(PAIRS, wins, strict=True):
        label = torch.tensor([[1 - s, s] for s in second], dtype=torch.float64)
        entropy = -(torch.special.xlogy(label, label)).sum(1)
        expected += cross_entropy(proxy[:, [i, j]], label, reduction="none") - entropy
    assert torch.allclose(proxy_loss(expert, proxy, "cross_entropy"), expected, atol=1e-12)


def test_smoothing_changes_only_pairs_in_which_a_generated_image_beats_the_real_one() -> None:
    proxy = draw(1, 3, dtype=torch.float64)
    worse, better = (torch.tensor([[0.3, 0.1, real]], dtype=torch.float64) for real in (2.0, -2.0))
    assert torch.equal(proxy_loss(worse, proxy), proxy_loss(worse, proxy, smooth_gt_label=True))
    undecided = torch.tensor([[0.3, 0.1, 0.0]], dtype=torch.float64)
    for real in (0, 1):  # A pair of equal logits says what smoothing must: one half each.
        assert proxy_loss(better, undecided[:, [0, 1, real]], smooth_gt_label=True) < proxy_loss(
            better, undecided[:, [0, 1, real]]
        )


def test_agreement_counts_pairs_that_the_expert_decides() -> None:
    expert = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 1.0]])
    # Right: (0, 1). Wrong: (0, 2), (1, 2). Then (0, 1) is nobody's, (0, 2) held equal, (1, 2) right.
    right, decided = proxy_agreement(expert, torch.tensor([[1.0, 2.0, 0.0], [5.0, 4.0, 5.0]]))
    assert (right.item(), decided.item()) == (2.5, 5)


# What it starts from ----------------------------------------------------------------------------------------------


def test_colours_are_found() -> None:
    colours, latents = draw(3, 5, seed=3), draw(6, 4, 8, 8)
    small = torch.einsum("rc,nchw->nrhw", colours[:, :-1], latents) + colours[:, -1][:, None, None]
    images = interpolate(small, scale_factor=4, mode="nearest")
    assert torch.allclose(fit_colours(latents, images), colours, atol=1e-5)


def test_patches_of_latents_are_those_of_the_image_they_stand_for() -> None:
    weight, colours = draw(7, 3, 8, 8), draw(3, 5, seed=1)
    latents = draw(2, 4, 6, 6, seed=2)
    small = torch.einsum("rc,nchw->nrhw", colours[:, :-1], latents) + colours[:, -1][:, None, None]
    pixels = interpolate(small, scale_factor=4, mode="nearest")
    expected = torch.nn.functional.conv2d(pixels, weight, stride=8)
    assert torch.allclose(latent_patches(weight, colours, 2)(latents), expected, atol=1e-4)


@pytest.mark.parametrize(("side", "grid", "expected"), [(64, 7, 8), (128, 7, 16), (96, 7, 12), (8, 8, 1), (16, 8, 2)])
def test_patches_divide_the_latents_into_about_the_grid_that_the_clip_knows(
    side: int, grid: int, expected: int
) -> None:
    assert patch_size(side, grid) == expected


def test_scores_are_logits_of_each_row_on_any_grid(make_proxy: Callable[..., LatentProxy]) -> None:
    proxy = make_proxy().eval()
    latents, prompts = draw(3, *SHAPE), list(PROMPTS)
    with torch.no_grad():
        whole = proxy(latents, prompts)
        assert whole.shape == (3,) and whole.dtype == torch.float32
        assert torch.allclose(proxy(latents[1:2], prompts[1:2]), whole[1:2], atol=1e-4)
        assert not torch.allclose(proxy(latents, prompts[::-1]), whole)
        assert proxy(draw(2, 4, 16, 24), prompts[:2]).isfinite().all()


@pytest.mark.parametrize(("image", "text"), [(0, 0), (1, 2), (2, 5), (None, None)])
def test_the_last_groups_train_and_what_is_new_always_does(
    image: int | None, text: int | None, make_proxy: Callable[..., LatentProxy]
) -> None:
    trained = {name for name, p in make_proxy(image, text).named_parameters() if p.requires_grad}
    assert "clip.logit_scale" in trained
    assert "clip.vision_model.embeddings.patch_embedding.weight" in trained
    assert ("clip.visual_projection.weight" in trained) == (image != 0)
    assert ("clip.vision_model.post_layernorm.weight" in trained) == (image in (2, None))
    assert ("clip.vision_model.embeddings.position_embedding.weight" in trained) == (image is None)
    # shapes-clip has two text layers: projection, layer, layer, embeddings are four groups.
    assert ("clip.text_model.embeddings.token_embedding.weight" in trained) == (text in (5, None))
    assert ("clip.text_model.encoder.layers.0.mlp.fc1.weight" in trained) == (text in (5, None))


def test_a_frozen_proxy_passes_its_gradient_on_and_keeps_none(make_proxy: Callable[..., LatentProxy]) -> None:
    proxy, latents = make_proxy(), draw(3, *SHAPE).requires_grad_()
    before = {name: p.requires_grad for name, p in proxy.named_parameters()}
    with proxy.frozen():
        scores = proxy(latents, list(PROMPTS))
    assert {name: p.requires_grad for name, p in proxy.named_parameters()} == before
    scores.sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    assert all(p.grad is None for p in proxy.parameters())
    with pytest.raises(ZeroDivisionError), proxy.frozen():
        raise ZeroDivisionError
    assert {name: p.requires_grad for name, p in proxy.named_parameters()} == before


# Learning ---------------------------------------------------------------------------------------------------------


def test_it_learns_an_expert_of_latents_it_has_not_seen(make_learner: Callable[..., ProxyLearner]) -> None:
    learner, fresh = make_learner(train_batch_size=12), lesson(48, seed=999)

    def accuracy() -> float:
        with torch.no_grad():
            own = learner.proxy(fresh.latents.flatten(0, 1), [p for p in fresh.prompts for _ in range(3)])
        right, decided = proxy_agreement(fresh.expert, own.unflatten(0, (-1, 3)))
        return float(right / decided)

    before = accuracy()
    for step in range(10):
        learner.step([lesson(12, seed=step)])
    assert before < 0.7 and accuracy() > 0.8, (before, accuracy())


def test_a_step_does_not_depend_on_how_its_lessons_are_cut(make_learner: Callable[..., ProxyLearner]) -> None:
    whole = lesson(8)
    cut = [
        Lesson(whole.latents[r], [whole.prompts[i] for i in r], whole.expert[r]) for r in ([0, 1, 2], [3, 4, 5, 6, 7])
    ]
    one, other = make_learner(), make_learner()
    reports = [one.step([whole]), other.step(cut)]
    for name, value in reports[0].items():
        assert reports[1][name] == pytest.approx(value, rel=1e-4), name
    # Gradients, not weights: Adam makes a full step of a gradient that is 0 but for rounding.
    for name, p in one.parameters.items():
        assert torch.allclose(p.grad, other.parameters[name].grad, atol=1e-5), name  # type: ignore[arg-type]


def test_what_the_expert_cannot_score_teaches_nothing(make_learner: Callable[..., ProxyLearner]) -> None:
    whole = lesson(6)
    expert, latents = whole.expert.clone(), whole.latents.clone()
    expert[1, 2], latents[4, 0, 0, 0, 0] = torch.nan, torch.inf
    kept = [0, 2, 3, 5]
    one, other = make_learner(), make_learner()
    found = one.step([Lesson(latents, whole.prompts, expert)])
    alone = other.step([Lesson(whole.latents[kept], [whole.prompts[i] for i in kept], whole.expert[kept])])
    assert found["proxy_loss"] == pytest.approx(alone["proxy_loss"], rel=1e-5)
    before = {name: p.clone() for name, p in one.parameters.items()}
    assert one.step([Lesson(latents, whole.prompts, torch.full_like(expert, torch.nan))]) == {} == one.step([])
    assert all(torch.equal(p, before[name]) for name, p in one.parameters.items())


def test_a_gradient_that_is_not_finite_is_not_taken(make_learner: Callable[..., ProxyLearner]) -> None:
    learner = make_learner()
    before = {name: p.clone() for name, p in learner.parameters.items()}
    huge = lesson(2)
    report = learner.step([Lesson(huge.latents * 1e30, huge.prompts, huge.expert)])
    assert report["proxy_skipped"] == 1
    assert all(torch.equal(p, before[name]) for name, p in learner.parameters.items())


def test_a_learner_resumed_is_the_one_that_went_on(make_learner: Callable[..., ProxyLearner], tmp_path: Path) -> None:
    one, other = make_learner(), make_learner()
    for step in range(2):
        one.step([lesson(4, seed=step)])
    one.save(tmp_path)
    other.load(tmp_path)
    assert one.step([lesson(4, seed=2)]) == other.step([lesson(4, seed=2)])
    assert all(torch.equal(p, other.parameters[name]) for name, p in one.parameters.items())


def test_another_proxy_than_the_checkpoints_is_an_error(
    make_learner: Callable[..., ProxyLearner], make_proxy: Callable[..., LatentProxy], tmp_path: Path
) -> None:
    learner = make_learner()
    with pytest.raises(UserError, match="has no proxy"):
        learner.load(tmp_path)
    learner.save(tmp_path)
    smaller = ProxyLearner(make_proxy(0, 0), learner.config, learner.accelerator)
    with pytest.raises(UserError, match="another than these settings"):
        smaller.load(tmp_path)


def test_gradients_are_summed_over_processes(
    make_learner: Callable[..., ProxyLearner], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two processes that hold the same lesson the step is that of one: the mean over prompts, not the sum."""
    one, other = make_learner(), make_learner()
    one.step([lesson(4)])
    twice = SimpleNamespace(
        num_processes=2, device=torch.device("cpu"), reduce=lambda values, how: 2 * values if how == "sum" else values
    )
    monkeypatch.setattr(other, "accelerator", twice)
    report = other.step([lesson(4)])
    assert report["proxy_loss"] > 0
    for name, p in one.parameters.items():
        assert torch.allclose(p.grad, other.parameters[name].grad, atol=1e-6), name  # type: ignore[arg-type]


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    base = {"pretrained_model_name_or_path": "none", "output_dir": str(tmp_path)}
    with pytest.raises(UserError, match="smooth_gt_label is for proxy_loss kl"):
        ProxyConfig(**base, smooth_gt_label=True, proxy_loss="cross_entropy")
    for name in ("proxy_learning_rate", "expert_scale", "proxy_batch_size"):
        with pytest.raises(UserError, match=name):
            ProxyConfig(**base, **{name: 0})  # type: ignore[arg-type]

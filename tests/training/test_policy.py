"""Policy and reference share weights, and neither leaks into the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError


def predict(trainer: Any, denoiser: torch.nn.Module) -> Tensor:
    batch = next(trainer.batches.stream(0, 1))
    text = {name: value.expand(2, *value.shape[1:]) for name, value in trainer.text.items()}
    with torch.no_grad():
        prediction: Tensor = trainer.family.predict(denoiser, batch.noise, batch.timesteps, text)
    return prediction


@pytest.fixture
def trained(toy_config: Any, toy_trainer: Any) -> Any:
    """A trainer whose LoRA has moved, and the base model's prediction from before."""
    trainer = toy_trainer(toy_config(lora_dropout=0.0, max_train_steps=2))
    base = predict(trainer, trainer.policy.denoiser)
    trainer.train()
    return trainer, base


def test_the_reference_is_the_base_model_bit_for_bit_after_training(trained: Any) -> None:
    trainer, base = trained
    assert not torch.equal(predict(trainer, trainer.policy.denoiser), base)
    with trainer.policy.reference() as reference:
        assert torch.equal(predict(trainer, reference), base)


def test_the_policy_is_back_after_the_reference_even_if_something_fails(trained: Any) -> None:
    trainer, base = trained
    before = predict(trainer, trainer.policy.denoiser)
    with pytest.raises(RuntimeError, match="inside"), trainer.policy.reference():
        raise RuntimeError("inside")
    after = predict(trainer, trainer.policy.denoiser)
    assert torch.equal(before, after) and not torch.equal(after, base)


def test_the_reference_needs_no_gradient_and_gives_none(trained: Any) -> None:
    trainer, _ = trained
    with trainer.policy.reference():
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()


def test_ema_weights_are_lent_and_given_back(trained: Any) -> None:
    trainer, _ = trained
    own = predict(trainer, trainer.policy.denoiser)
    with trainer.policy.ema_weights():
        average = predict(trainer, trainer.policy.denoiser)
    assert not torch.equal(own, average)
    assert torch.equal(own, predict(trainer, trainer.policy.denoiser))


def test_a_fine_tune_without_a_reference_has_none_to_give(toy_config: Any, toy_trainer: Any) -> None:
    trainer = toy_trainer(toy_config(train_mode="full", use_ema=False))
    with pytest.raises(RuntimeError, match="asked for no reference"), trainer.policy.reference():
        pass


def test_initial_weights_depend_on_the_seed_alone(toy_config: Any, toy_trainer: Any, tmp_path: Any) -> None:
    def weights(seed: int, name: str) -> dict[str, Tensor]:
        torch.manual_seed(len(name) + ord(name[0]))
        return dict(toy_trainer(toy_config(output_dir=str(tmp_path / name), seed=seed)).policy.parameters)

    one, again, other = weights(0, "a"), weights(0, "b"), weights(1, "c")
    assert all(torch.equal(one[k], again[k]) for k in one)
    assert not all(torch.equal(one[k], other[k]) for k in one)


def test_an_unknown_target_is_an_error_with_a_suggestion(toy_config: Any, toy_trainer: Any) -> None:
    with pytest.raises(UserError, match="to_qq.*to_q"):
        toy_trainer(toy_config(lora_targets=["to_qq"]))


def test_in_bf16_the_weights_of_a_copy_are_its_own_and_the_policy_has_its_own_back(trained: Any) -> None:
    """Autocast rounds each weight once and would go on with that."""
    trainer, _ = trained
    policy = trainer.policy
    policy.add_copy("old")
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(0.1)
    with torch.autocast("cpu", torch.bfloat16):
        own = predict(trainer, policy.denoiser)
    with torch.autocast("cpu", torch.bfloat16):
        with policy.copy_weights("old") as network:
            old = predict(trainer, network)
        assert not torch.equal(old, own)
        assert torch.equal(predict(trainer, policy.denoiser), own)
        with policy.copy_weights("old") as network:
            assert torch.equal(predict(trainer, network), old)

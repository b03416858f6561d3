"""Speed and memory change no result: every fast path against the plain one, in float32 on a CPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from diffalign.errors import UserError
from diffalign.trainers import load_method
from diffalign.trainers.dpo import DPOConfig, DPOTrainer

Settings = Callable[..., dict[str, Any]]
TOLERANCE = 1e-4


def run(settings: dict[str, Any], method: str = "dpo") -> tuple[list[float], dict[str, Tensor]]:
    """Losses of a run, and the weights it ends with."""
    config_class, trainer_class = load_method(method)
    trainer = trainer_class(config_class(**settings))
    folder: Path = trainer.train()
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return losses, {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}


def same(fast: tuple[list[float], dict[str, Tensor]], plain: tuple[list[float], dict[str, Tensor]]) -> None:
    assert len(set(plain[0])) > 2, "the losses must move, or the comparison shows nothing"
    assert fast[0] == pytest.approx(plain[0], abs=TOLERANCE)
    for name, weight in plain[1].items():
        torch.testing.assert_close(fast[1][name], weight, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(scope="module")
def memory() -> dict[str, Any]:
    """The plain run of the module, kept for all comparisons."""
    return {}


@pytest.fixture
def plain(memory: dict[str, Any], pair_settings: Settings, tmp_path: Path) -> tuple[list[float], dict[str, Tensor]]:
    if "run" not in memory:
        memory["run"] = run(pair_settings(**PLAIN, output_dir=str(tmp_path / "plain")))
    found: tuple[list[float], dict[str, Tensor]] = memory["run"]
    return found


# A small learning rate: Adam's first steps go by the sign of a gradient, which rounding can turn where it is near 0.
PLAIN: dict[str, Any] = {"beta_dpo": 500, "learning_rate": 1e-3, "adam_epsilon": 1e-4}


@pytest.mark.parametrize(
    "options",
    [
        {"two_pass_gradient": True},
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "checkpointed_blocks": ["down_blocks.1", "mid_block"]},
        {"two_pass_gradient": True, "gradient_checkpointing": True},
        {"channels_last": True},
        {"train_batch_size": 1, "gradient_accumulation_steps": 2},
    ],
    ids=lambda options: "-".join(options),
)
def test_a_fast_path_gives_the_losses_and_weights_of_the_plain_one(
    pair_settings: Settings, plain: tuple[list[float], dict[str, Tensor]], options: dict[str, Any]
) -> None:
    same(run(pair_settings(**{**PLAIN, **options})), plain)


@pytest.fixture
def dynamo(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Compile without generating code, which takes minutes on a CPU; returns the models that were compiled."""
    compiled: list[Any] = []
    original = UNet2DConditionModel.compile_repeated_blocks

    def quickly(self: Any) -> None:
        compiled.append(self)
        original(self, backend="aot_eager")

    monkeypatch.setattr(UNet2DConditionModel, "compile_repeated_blocks", quickly)
    torch._dynamo.reset()
    return compiled


@pytest.mark.slow
def test_compiled_blocks_give_the_losses_of_eager_ones(
    pair_settings: Settings, plain: tuple[list[float], dict[str, Tensor]], dynamo: list[Any]
) -> None:
    same(run(pair_settings(**PLAIN, compile_repeated_blocks=True)), plain)
    assert len(dynamo) == 1
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] > 0
    assert not counted["unimplemented"], "a block fell back to running uncompiled"


@pytest.mark.slow
def test_a_compiled_reference_has_the_graph_of_the_policy(pair_settings: Settings, dynamo: list[Any]) -> None:
    trainer = DPOTrainer(DPOConfig(**pair_settings(**PLAIN, compile_repeated_blocks=True)))
    batch = next(trainer.batches.stream(0, 1))
    with torch.no_grad():
        for name, p in trainer.policy.parameters.items():
            if ".lora_B." in name:
                p.normal_(std=0.1)
    moved = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    x_t, _ = trainer.noised(batch)

    def predict(network: Any) -> Tensor:
        return trainer.family.predict(network, x_t, batch.timesteps, batch.text(), batch.sizes)

    trainer.errors(batch)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    with trainer.policy.reference() as network:
        reference = predict(network)
    policy = predict(trainer.policy.denoiser)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs, "the reference was compiled on its own"
    assert not reference.requires_grad and policy.requires_grad
    assert all(torch.equal(p, moved[name]) for name, p in trainer.policy.parameters.items())
    assert not torch.allclose(reference, policy)
    with torch.no_grad():
        for name, p in trainer.policy.parameters.items():
            if ".lora_B." in name:
                p.zero_()
    assert torch.equal(predict(trainer.policy.denoiser), reference)


PAIR_METHODS: dict[str, dict[str, Any]] = {
    "mapo": {},
    "dpo": {"safeguard": "sdpo"},
    "bdpo": {},
    "dmpo": {},
    "dspo": {},
    "orpo": {},
}


@pytest.mark.parametrize("method", PAIR_METHODS)
def test_two_passes_give_the_gradient_of_one_for_every_kind_of_loss(
    pair_settings: Settings, tmp_path: Path, method: str
) -> None:
    config_class, trainer_class = load_method(method)
    gradients = []
    for two_pass in (False, True):
        own = {"two_pass_gradient": two_pass, "output_dir": str(tmp_path / str(two_pass)), **PAIR_METHODS[method]}
        trainer = trainer_class(config_class(**pair_settings(**own)))
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in trainer.policy.parameters.values():
                p.add_(0.02 * torch.randn(p.shape, generator=draw))
        loss, _ = trainer.compute_loss(next(trainer.batches.stream(0, 1)))
        loss.backward()
        gradients.append({name: p.grad for name, p in trainer.policy.parameters.items()})
    one, two = (torch.cat([gradient.flatten() for gradient in found.values()]) for found in gradients)
    assert one.norm() > 0
    # Relative to the whole: a loss is a difference of nearly equal errors, which float32 rounds.
    assert (two - one).norm() < 1e-3 * one.norm()


def test_two_passes_keep_the_activations_of_one_image(pair_settings: Settings, tmp_path: Path) -> None:
    """What autograd holds between the forward and the backward pass, and the most that a recomputation adds to it."""
    held = {}
    for two_pass in (False, True):
        own = {"two_pass_gradient": two_pass, "output_dir": str(tmp_path / str(two_pass))}
        trainer = DPOTrainer(DPOConfig(**pair_settings(**own)))
        batch = next(trainer.batches.stream(0, 1))
        kept: list[int] = []

        def pack(tensor: Tensor, kept: list[int] = kept) -> Tensor:
            kept.append(tensor.nbytes if not isinstance(tensor, torch.nn.Parameter) else 0)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            trainer.compute_loss(batch)
        held[two_pass] = sum(kept)
    assert held[True] < 0.05 * held[False]


def calls(trainer: DPOTrainer) -> Counter[str]:
    """How often each ResNet of the denoiser runs in one training step."""
    counted: Counter[str] = Counter()
    for name, module in trainer.family.denoiser.named_modules():
        if type(module).__name__ == "ResnetBlock2D":
            # Before, not after: a recomputation stops as soon as it has all it needs.
            module.register_forward_pre_hook(lambda *_, name=name: counted.update([name]))
    trainer.training_step(trainer.batches.stream(0, 1))
    return counted


def test_only_chosen_blocks_are_recomputed_and_never_for_the_reference(pair_settings: Settings) -> None:
    own = {"gradient_checkpointing": True, "checkpointed_blocks": ["up_blocks.1"]}
    counted = calls(DPOTrainer(DPOConfig(**pair_settings(**own))))
    # Reference and policy, and once more in the backward pass where it is checkpointed.
    assert {name: count for name, count in counted.items() if name.startswith("up_blocks.1.")}
    assert all(count == (3 if name.startswith("up_blocks.1.") else 2) for name, count in counted.items())


def test_a_block_that_is_not_there_is_an_error_with_its_names(pair_settings: Settings) -> None:
    own = {"gradient_checkpointing": True, "checkpointed_blocks": ["down_block.1"]}
    with pytest.raises(UserError, match=r"down_block\.1.*down_blocks\.1.*mid_block"):
        DPOTrainer(DPOConfig(**pair_settings(**own)))
    with pytest.raises(UserError, match="needs gradient_checkpointing"):
        DPOConfig(**pair_settings(checkpointed_blocks=["mid_block"]))


def test_channels_last_is_really_set_and_a_full_fine_tune_can_be_saved(pair_settings: Settings) -> None:
    own = {"channels_last": True, "train_mode": "full", "max_train_steps": 1, "learning_rate": 1e-5}
    trainer = DPOTrainer(DPOConfig(**pair_settings(**own)))
    frozen = trainer.policy._frozen
    assert frozen is not None
    for denoiser in (trainer.family.denoiser, frozen):
        assert denoiser.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    trained = trainer.train() / "unet"
    again = UNet2DConditionModel.from_pretrained(trained)
    for name, p in trainer.family.denoiser.named_parameters():
        assert torch.equal(again.get_parameter(name), p), name

"""Every method that learns from pairs, through its real trainer on a tiny SDXL; and captions of single images."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import UserError
from diffalign.trainers import load_method
from diffalign.trainers.dcpo import DCPOConfig, DCPOTrainer
from diffalign.trainers.dpo import DPOConfig, DPOTrainer

LN2 = math.log(2)
FIRST_LOSS = {
    "dpo": LN2,
    "dpo ipo_raw": (0.5 / 2500) ** 2,
    "dpo sdpo": LN2,
    "dpo sdpo_per_pair": LN2,
    "bdpo": LN2,
    "dmpo": 0.5 * math.log(0.25 / (0.99 * 0.01)),
    "dspo sdxl": 0.25,
    "mapo": None,
    "cpo": None,
    "orpo": None,
    "orpo published": None,
    "dspo": None,
}
"""Loss at the reference, where it is one number."""
OPTIONS: dict[str, dict[str, Any]] = {
    "dpo ipo_raw": {"loss_type": "ipo_raw"},
    "dpo sdpo": {"safeguard": "sdpo"},
    "dpo sdpo_per_pair": {"safeguard": "sdpo_per_pair", "safeguard_mu": 0.9},
    "dspo sdxl": {"dspo_form": "sdxl"},
    "orpo published": {"orpo_form": "published"},
}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def count_forwards(trainer: Any) -> list[bool]:
    """Whether each pass through the denoiser kept a gradient, filled in as the trainer runs."""
    passes: list[bool] = []
    predict = trainer.family.predict

    def counted(*arguments: Any, **more: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return predict(*arguments, **more)

    trainer.family.predict = counted
    return passes


@pytest.mark.parametrize("case", FIRST_LOSS)
def test_two_steps(case: str, pair_settings: Any) -> None:
    config_class, trainer_class = load_method(case.split()[0])
    trainer = trainer_class(config_class(**pair_settings(max_train_steps=2, **OPTIONS.get(case, {}))))
    passes = count_forwards(trainer)
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    first, last = rows(trainer.train())
    expected = [False, True] if trainer.needs.reference else [True]
    assert passes == expected * 2, "one pass of the policy a step, and of the reference only where it is needed"
    if FIRST_LOSS[case] is not None:
        assert first["loss"] == pytest.approx(FIRST_LOSS[case], rel=1e-5)
    names = {"margin", "chosen_error", "rejected_error"}
    names |= {"implicit_accuracy", "chosen_error_vs_reference"} if trainer.needs.reference else {"pair_accuracy"}
    assert names <= first.keys() and last["skipped_steps"] == 0
    assert ("safeguard_lambda" in first) == ("sdpo" in case)
    assert first["margin"] != last["margin"]
    assert not all(torch.equal(p, before[name]) for name, p in trainer.policy.parameters.items())


def test_the_safeguard_changes_the_gradient_and_not_the_loss(pair_settings: Any) -> None:
    trainer = DPOTrainer(DPOConfig(**pair_settings(safeguard="sdpo", safeguard_mu=0.9)))
    batch = next(trainer.batches.stream(0, 1))
    results = {}
    for safeguard in ("none", "sdpo"):
        trainer.config = dataclasses.replace(trainer.config, safeguard=safeguard)
        loss, report = trainer.compute_loss(batch)
        trainer.optimizer.zero_grad()
        loss.backward()
        results[safeguard] = loss.item(), [torch.as_tensor(p.grad).clone() for p in trainer.policy.parameters.values()]
    assert report["safeguard_lambda"] < 1, "shared noise makes the residuals of a pair alike"
    assert results["none"][0] == results["sdpo"][0]
    assert not all(torch.equal(a, b) for a, b in zip(results["none"][1], results["sdpo"][1], strict=True))


@pytest.mark.parametrize("method", ["mapo", "dspo", "bdpo"])
def test_ties_weigh_both_orders(method: str, pair_settings: Any, write_pairs: Any) -> None:
    tied = {"prompt": "toy", "chosen": "a.png", "rejected": "b.png", "label": 0.5, "id": "one"}
    turned = {**tied, "chosen": "b.png", "rejected": "a.png"}
    config_class, trainer_class = load_method(method)
    losses = []
    folder = write_pairs([tied])
    for row in (tied, turned):
        (folder / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        settings = pair_settings(dataset_name=str(folder), ties="keep", train_batch_size=1, overwrite_output_dir=True)
        trainer = trainer_class(config_class(**settings))
        losses.append(trainer.compute_loss(next(trainer.batches.stream(0, 1)))[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def captioned(write_pairs: Any, **captions: str | None) -> str:
    rows_ = [
        {"prompt": "toy", "chosen": "a.png", "rejected": "b.png", **captions},
        {"prompt": "other toy", "chosen": "b.png", "rejected": "a.png", **captions},
    ]
    return str(write_pairs(rows_))


def test_dcpo_with_equal_captions_is_dpo_bit_for_bit(pair_settings: Any, write_pairs: Any, tmp_path: Path) -> None:
    folder = captioned(write_pairs, chosen_prompt="a word", rejected_prompt="a word")
    shared = {"dataset_name": folder, "beta_dpo": 500.0}
    dcpo = rows(DCPOTrainer(DCPOConfig(**pair_settings(**shared))).train())
    # The same caption as the one prompt of the pair.
    settings = pair_settings(**shared, columns={"prompt": "chosen_prompt"}, output_dir=str(tmp_path / "dpo"))
    dpo = rows(DPOTrainer(DPOConfig(**settings)).train())
    for name in ("loss", "margin", "grad_norm", "chosen_error", "rejected_error"):
        assert [r[name] for r in dcpo] == [r[name] for r in dpo], name


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "on the fly"])
def test_each_half_sees_its_own_caption(cached: bool, pair_settings: Any, write_pairs: Any) -> None:
    folder = captioned(write_pairs, chosen_prompt="first", rejected_prompt="second thing")
    settings = pair_settings(dataset_name=folder, cache_latents=cached)
    trainer = DCPOTrainer(DCPOConfig(**settings))
    batch = next(trainer.batches.stream(0, 1))
    expected = trainer.family.encode_prompts(["first", "first", "second thing", "second thing"])
    for name, value in batch.text().items():
        torch.testing.assert_close(value, expected[name])
    settings["overwrite_output_dir"] = True
    prompts = next(DPOTrainer(DPOConfig(**settings)).batches.stream(0, 1)).text()
    assert any(not torch.equal(value, prompts[name]) for name, value in batch.text().items())


def test_dropped_prompts_are_empty_for_both_halves(pair_settings: Any, write_pairs: Any) -> None:
    folder = captioned(write_pairs, chosen_prompt="first", rejected_prompt="second thing")
    trainer = DCPOTrainer(DCPOConfig(**pair_settings(dataset_name=folder, proportion_empty_prompts=1.0)))
    empty = trainer.family.encode_prompts([""])
    for name, value in next(trainer.batches.stream(0, 1)).text().items():
        torch.testing.assert_close(value, empty[name].expand_as(value))


def test_the_half_without_a_caption_takes_the_prompt_and_that_is_said(
    pair_settings: Any, write_pairs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = captioned(write_pairs, rejected_prompt="second thing")
    DCPOTrainer(DCPOConfig(**pair_settings(dataset_name=folder, max_train_steps=1))).train()
    assert "0 of 2 chosen and 2 of 2 rejected images have their own" in capsys.readouterr().out


@pytest.mark.parametrize("captions", [{}, {"chosen_prompt": None}], ids=["no column", "an empty column"])
def test_without_captions_the_error_names_the_command(
    captions: dict[str, Any], pair_settings: Any, write_pairs: Any
) -> None:
    folder = captioned(write_pairs, **captions)
    with pytest.raises(UserError, match="diffalign captions"):
        DCPOTrainer(DCPOConfig(**pair_settings(dataset_name=folder)))


def test_the_published_target_is_noise_whatever_the_checkpoint_predicts(
    pair_settings: Any, write_pairs: Any, tiny_sd_v_path: str
) -> None:
    folder = captioned(write_pairs, chosen_prompt="first", rejected_prompt="second thing")
    targets = {}
    for published in (False, True):
        settings = pair_settings(
            pretrained_model_name_or_path=tiny_sd_v_path, dataset_name=folder, overwrite_output_dir=True
        )
        trainer = DCPOTrainer(DCPOConfig(**settings, epsilon_target=published))
        batch = next(trainer.batches.stream(0, 1))
        targets[published] = trainer.noised(batch)[1]
    assert torch.equal(targets[True], batch.noise) and not torch.equal(targets[False], batch.noise)

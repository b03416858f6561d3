"""What a run is said to do, by hand from the recipes of SDXL; no network is made for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffalign.app.estimate import read
from diffalign.errors import UserError
from diffalign.estimation.work import Pass, Phase, Work
from diffalign.training.work import sharded, with_like

FULL = ("--train_mode", "full", "--no_save_comfyui_lora")


def work_of(recipe: str, *flags: str, processes: int = 1) -> Work:
    config, work = read(recipe, flags, processes=processes)
    found: Work = work(config)
    return found


def phase(work: Work, name: str) -> Phase:
    (found,) = (one for one in work.phases if one.name == name)
    return found


def passes(work: Work, name: str) -> dict[str, tuple[int, float]]:
    """(samples, count) of each pass of a phase."""
    return {one.name: (one.samples, one.count) for one in phase(work, name).passes}


def test_a_method_on_pairs() -> None:
    work = work_of("sdxl-dpo-1x24gb")
    assert [one.name for one in work.phases] == ["caching", "step", "validation"]
    assert phase(work, "step").passes == (
        Pass("reference", "denoiser", 2, 16, adapters=False),
        Pass("policy", "denoiser", 2, 16, grad=True),
    )
    assert phase(work, "step").parts == {"denoiser"}, "all else is cached"
    caching, validation = phase(work, "caching"), phase(work, "validation")
    assert caching.before_training and caching.parts == {"vae", "text_encoders"} and not caching.in_step
    # Guidance takes two samples for an image.
    assert passes(work, "validation") == {"draw": (2, 1), "decode": (1, 1)} and not validation.in_step
    assert (work.samples_per_step, work.unit, work.steps) == (16, "pair", 2000)
    assert (work.copies, work.frozen_copy, work.state_bytes, work.shards, work.rewards) == (0, False, 8, 1, ())


def test_the_networks_of_a_run() -> None:
    model = work_of("sdxl-dpo-1x24gb", "--quantize_base", "4bit").model
    assert (model.dtype, model.autocast, model.bits, model.rank) == (torch.bfloat16, torch.bfloat16, 4, 8)
    assert (model.height, model.width, model.checkpointed, model.full) == (1024, 1024, (), False)
    blocks = work_of("sdxl-dpo-1x24gb", "--checkpointed_blocks", "mid_block").model
    assert blocks.checkpointed == ("mid_block",)
    assert work_of("sdxl-dpo-1x24gb", "--no_gradient_checkpointing").model.checkpointed is None
    full = work_of("sdxl-dpo-1x24gb", *FULL, "--use_ema", "--use_8bit_adam")
    assert full.model.full and full.model.dtype == torch.float32
    assert (full.frozen_copy, full.copies, full.state_bytes) == (True, 1, 2)


def test_the_largest_bucket_counts() -> None:
    work = work_of("sdxl-dpo-1x24gb", "--aspect_ratio_buckets", "512,512;512,1024;768,512")
    assert (work.model.height, work.model.width) == (512, 1024)


def test_two_passes_send_the_images_of_a_pair_one_after_the_other() -> None:
    work = work_of("sdxl-dpo-1x8gb")
    assert passes(work, "step") == {"reference": (1, 32), "policy, first pass": (1, 32), "policy": (1, 32)}
    assert [one.grad for one in phase(work, "step").passes] == [False, False, True]
    assert work.samples_per_step == 16 and [one.name for one in work.phases] == ["caching", "step"]


def test_what_is_not_cached_is_encoded_in_every_step() -> None:
    work = work_of("sdxl-mapo-1x24gb", "--no_cache_latents")
    found = passes(work, "step")
    assert "caching" not in [one.name for one in work.phases] and "reference" not in found
    assert found["encode images"] == found["encode prompts"] == found["policy"]
    assert phase(work, "step").parts == {"denoiser", "vae", "text_encoders"}


@pytest.mark.parametrize("processes", [1, 2])
def test_a_method_on_rewards(processes: int) -> None:
    """72 images a rollout and step, 4 at once with guidance, 20 steps; then 6 timesteps of each, 2 at once, beside the
    reference and the slow copy."""
    work = work_of("sdxl-awm-1x24gb", processes=processes)
    assert passes(work, "rollout") == {"draw": (8, 360 / processes), "decode": (1, 72 / processes)}
    assert passes(work, "step") == {"reference": (2, 432 / processes), "policy": (2, 216 / processes)}
    assert phase(work, "rollout").in_step and "rewards" in phase(work, "rollout").parts
    assert (work.samples_per_step, work.unit, work.copies) == (72 // processes, "image", 1)
    pick, clip = work.rewards
    assert (pick.name, pick.weights, pick.offloaded, pick.judge) == ("pickscore", 1_970_000_000, True, False)
    assert (clip.name, clip.judge) == ("clipscore", True)


def test_a_method_that_replays_steps_trains_with_their_guidance() -> None:
    """64 images a rollout in two steps, 30 sampling steps of which 5 are trained on."""
    work = work_of("sdxl-ddpo-1x24gb")
    assert passes(work, "rollout") == {"draw": (4, 480), "decode": (1, 32)}
    assert passes(work, "step") == {"policy": (4, 80)}
    plain = work_of("sdxl-ddpo-1x24gb", "--guidance_scale", "1")
    assert passes(plain, "rollout")["draw"] == (2, 480) and passes(plain, "step") == {"policy": (2, 80)}


def test_a_gradient_through_the_sampler() -> None:
    config, work = read("sdxl-reward-gradient-1x24gb", ["--no_checkpoint_steps"])
    found = passes(work(config), "step")
    assert found["draw"] == (2, 8 * 24) and found["policy"] == found["reference"] == (2, 8)
    assert found["decode with gradient"] == (1, 8)
    # Two steps keep their activations together; recomputed as a whole, one does, and each is run once more.
    two = work_of("sdxl-reward-gradient-1x24gb", "--gradient_steps", "2", "--no_checkpoint_steps")
    again = work_of("sdxl-reward-gradient-1x24gb", "--gradient_steps", "2", "--checkpoint_steps")
    held = [{one.name: one.held for one in phase(w, "step").passes}["policy"] for w in (two, again)]
    assert held == [2, 1]
    assert passes(two, "step")["draw"] == (2, 8 * 23) and passes(again, "step")["draw"] == (2, 8 * 25)


def test_weights_are_shared_out_of_a_full_fine_tune_only() -> None:
    full = work_of("sdxl-dpo-1x80gb", *FULL)
    shared = sharded(full, 8, stay_together=True)
    assert (shared.shards, shared.stay_together, shared.model.sharded) == (8, True, True)
    assert shared.phases == full.phases and full.shards == 1
    with pytest.raises(UserError, match="--train_mode full"):
        sharded(work_of("sdxl-dpo-1x80gb"), 8, stay_together=False)


@pytest.mark.parametrize("like", [None, "sdxl"])
def test_a_fine_tune_has_the_shapes_of_its_base(like: Any) -> None:
    assert with_like(work_of("sdxl-dpo-1x24gb"), like).model.like == like

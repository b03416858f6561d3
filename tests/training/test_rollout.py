"""Rollouts draw what the diffusers pipeline draws, and record what replaying a step needs."""

from __future__ import annotations

import pytest
import torch

from diffalign.diffusion.steps import Steps, make_steps
from diffalign.pipelines import Family, load_family
from diffalign.training.rollout import Condition, Trajectory, guided_predict, rollout, select_text, starting_noise

PROMPTS = ["a red circle", "two blue squares", ""]


@pytest.fixture(params=["tiny_sd_path", "tiny_sd_v_path", "tiny_sdxl_path"])
def family(request: pytest.FixtureRequest) -> Family:
    return load_family(request.getfixturevalue(request.param))


def setting(family: Family, guidance: float) -> Condition:
    text = family.encode_prompts(PROMPTS)
    return Condition(text, family.encode_unconditional() if guidance != 1 else None, guidance)


def steps_of(family: Family, eta: float, count: int = 4) -> Steps:
    return make_steps(family.noise_process, family.scheduler_config, count, eta=eta)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_without_noise_it_is_the_ddim_pipeline_of_diffusers(family: Family, guidance: float) -> None:
    shape = family.latent_shape(16, 16)
    start = starting_noise([3, 4, 5], shape)
    drawn = rollout(family, family.denoiser, steps_of(family, 0.0), setting(family, guidance), [3, 4, 5], shape)
    theirs = family.pipeline(scheduler="ddim")(
        prompt=PROMPTS,
        latents=start,
        num_inference_steps=4,
        guidance_scale=guidance,
        height=16,
        width=16,
        output_type="pt",
    ).images
    assert torch.allclose(family.decode_latents(drawn.latents), theirs, atol=1e-4)


def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(family: Family) -> None:
    shape, steps, given = family.latent_shape(16, 16), steps_of(family, 1.0), setting(family, 3.0)
    together = rollout(family, family.denoiser, steps, given, [3, 4, 5], shape, keep=[0, 2])
    alone = Condition(select_text(given.text, [1]), given.unconditional, 3.0)
    single = rollout(family, family.denoiser, steps, alone, [4], shape, keep=[0, 2])
    assert torch.allclose(together.latents[1], single.latents[0], atol=1e-4)
    assert torch.allclose(together.log_probs[1], single.log_probs[0], atol=1e-5)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16])
def test_a_kept_step_can_be_replayed_to_the_same_log_probability(family: Family, storage: torch.dtype) -> None:
    shape, steps, given = family.latent_shape(16, 16), steps_of(family, 1.0), setting(family, 3.0)
    drawn = rollout(family, family.denoiser, steps, given, [3, 4, 5], shape, keep=[0, 1, 2], storage=storage)
    assert drawn.x.dtype == storage and drawn.x.shape == (3, 3, *shape)
    for k in range(3):
        index = drawn.index[:, k]
        with torch.no_grad():
            x = drawn.x[:, k].float()
            step = steps.step(guided_predict(family, family.denoiser, x, steps.timesteps[index], given), x, index)
        assert torch.equal(step.log_prob(drawn.x_next[:, k].float()), drawn.log_probs[:, k])
    assert torch.equal(drawn.x[:, 1], drawn.x_next[:, 0])


def test_rows_and_cat_undo_each_other(family: Family) -> None:
    shape = family.latent_shape(16, 16)
    drawn = rollout(family, family.denoiser, steps_of(family, 1.0), setting(family, 1.0), [1, 2, 3], shape, keep=[1])
    again = Trajectory.cat([drawn.rows(torch.tensor([0])), drawn.rows(torch.tensor([1, 2]))])
    assert all(torch.equal(value, again.tensors()[name]) for name, value in drawn.tensors().items())
    assert drawn.seeds.tolist() == [1, 2, 3]

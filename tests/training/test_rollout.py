"""Rollouts draw what the diffusers pipeline draws, and record what replaying a step needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

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


def by_the_pipeline(
    family: Family, prompts: list[str], start: Tensor, steps: int, guidance: float, side: int
) -> Tensor:
    images: Tensor = family.pipeline(scheduler="ddim")(
        prompt=prompts,
        latents=start,
        num_inference_steps=steps,
        guidance_scale=guidance,
        height=side,
        width=side,
        output_type="pt",
    ).images
    return images


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_without_noise_it_is_the_ddim_pipeline_of_diffusers(family: Family, guidance: float) -> None:
    shape = family.latent_shape(16, 16)
    start = starting_noise([3, 4, 5], shape)
    drawn = rollout(family, family.denoiser, steps_of(family, 0.0), setting(family, guidance), [3, 4, 5], shape)
    theirs = by_the_pipeline(family, PROMPTS, start, 4, guidance, 16)
    assert torch.allclose(family.decode_latents(drawn.latents), theirs, atol=1e-4)


def in_float64(path: str, prompts: list[str], start: Tensor, timesteps: Tensor, guidance: float) -> Tensor:
    """DDIM written out in double precision, network and VAE too: from each timestep to the next one, and then to 0."""
    family = load_family(path, dtype=torch.float64, vae_dtype=torch.float64)
    given = Condition(family.encode_prompts(prompts), family.encode_unconditional(), guidance)
    process, x = family.noise_process, start.double()
    levels = [(float(process.alpha(t)), float(process.sigma(t))) for t in timesteps] + [(1.0, 0.0)]
    for t, (alpha, sigma), (alpha_next, sigma_next) in zip(timesteps, levels, levels[1:], strict=False):
        with torch.no_grad():
            epsilon = guided_predict(family, family.denoiser, x, t.expand(len(x)), given).double()
        x = alpha_next * (x - sigma * epsilon) / alpha + sigma_next * epsilon
    with torch.no_grad():
        z = x / family.vae.config.scaling_factor + (family.vae.config.get("shift_factor") or 0)
        decoded: Tensor = family.vae.decode(z, return_dict=False)[0]
    return (decoded / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("count", [5, 6])
def test_the_bundled_model_draws_what_float64_draws(count: int) -> None:
    """Rounding grows along a trajectory: single pixels are off by up to 4e-4 in 256 images.

    So does the pipeline's where the steps divide the 1000 timesteps. Where they do not, with "trailing" spacing,
    diffusers steps by 1000 // 6 = 166 when the next timestep is 167 below, and ends at timestep 0 instead of clean.
    """
    family, prompts = load_family("shapes-sdxl"), ["a red circle", "a small blue cross left of a green square", ""]
    shape = family.latent_shape(64, 64)
    start, steps = starting_noise([0, 1, 2], shape), steps_of(family, 0.0, count)
    given = Condition(family.encode_prompts(prompts), family.encode_unconditional(), 5.0)
    drawn = rollout(family, family.denoiser, steps, given, [0, 1, 2], shape)
    exact = in_float64("shapes-sdxl", prompts, start, steps.timesteps, 5.0)
    ours, theirs = (
        (images - exact).abs()
        for images in (family.decode_latents(drawn.latents), by_the_pipeline(family, prompts, start, count, 5.0, 64))
    )
    assert ours.mean() < 1e-5 and ours.max() < 2e-3
    if 1000 % count == 0:
        assert theirs.mean() < 1e-5 and theirs.max() < 2e-3
    else:
        assert theirs.mean() > 100 * ours.mean()


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

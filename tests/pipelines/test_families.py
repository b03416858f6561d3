"""What a family does, against the diffusers pipeline and the network itself."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from torch import nn

from diffalign.errors import UserError
from diffalign.pipelines import load_family
from diffalign.pipelines.schedulers import NAMES, make_scheduler

PROMPTS = ["a red circle on a gray background", "", "a small blue square left of a large green cross"]


@pytest.fixture(params=["sd", "sd_v", "sdxl"])
def path(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"tiny_{request.param}_path")


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sample(pipe: DiffusionPipeline, prompt: str = PROMPTS[0], steps: int = 3) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipe(prompt, num_inference_steps=steps, generator=generator, output_type="pt").images


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# Parts


def test_parts_load_on_first_use_and_separately(path):
    family = load_family(path)
    _ = family.noise_process, family.latent_shape(32, 32), family.default_resolution, family.fingerprint("vae")
    assert family.loaded == frozenset()
    family.encode_prompts(PROMPTS)
    assert family.loaded == {"text_encoders"}
    family.encode_images(torch.rand(1, 3, 32, 32))
    assert family.loaded == {"text_encoders", "vae"}
    denoiser = family.denoiser
    assert family.loaded == {"text_encoders", "vae", "denoiser"}
    family.free("text_encoders", "vae")
    assert family.loaded == {"denoiser"} and family.denoiser is denoiser
    with pytest.raises(ValueError, match=r"unet.*denoiser"):
        family.free("unet")


def test_parts_are_frozen_in_eval_mode_and_of_the_dtype(tiny_sdxl_path):
    family = load_family(tiny_sdxl_path, dtype=torch.bfloat16)
    for module in (family.denoiser, family.vae, *family.text_encoders.values()):
        assert not module.training and not any(p.requires_grad for p in module.parameters())
    for module in (family.denoiser, *family.text_encoders.values()):
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert family.vae.dtype == torch.float32


def test_shapes_and_resolution(path):
    family = load_family(path)
    assert family.latent_shape(32, 64) == (4, 16, 32)
    assert family.resolution_multiple == 8 and family.default_resolution == 32
    for height, width, word in ((30, 32, "height 30 is not a multiple of 8; use 32"), (32, 0, "width 0")):
        with pytest.raises(UserError, match=word):
            family.latent_shape(height, width)


def test_noise_process_is_the_checkpoints(tiny_sd_path, tiny_sd_v_path):
    assert load_family(tiny_sd_path).noise_process.prediction_type == "epsilon"
    process = load_family(tiny_sd_v_path).noise_process
    assert process.prediction_type == "v_prediction"
    betas = DDIMScheduler.from_pretrained(tiny_sd_v_path, subfolder="scheduler").alphas_cumprod
    torch.testing.assert_close(process.alphas_cumprod, betas.double())


# Prompts


def test_prompts_are_encoded_as_the_pipeline_does(path):
    family = load_family(path)
    text = family.encode_prompts(PROMPTS)
    got = DiffusionPipeline.from_pretrained(path).encode_prompt(
        prompt=PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    assert torch.equal(text["prompt_embeds"], got[0])
    assert text["prompt_embeds"].shape[:2] == (3, 77) and not text["prompt_embeds"].requires_grad
    if family.name == "sdxl":
        assert torch.equal(text["pooled_prompt_embeds"], got[2])


def test_attention_mask_is_given_where_the_encoder_was_trained_with_one(tiny_sd_path, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sd_path, folder)
    edit(folder / "text_encoder" / "config.json", use_attention_mask=True)
    got = load_family(str(folder)).encode_prompts(PROMPTS)["prompt_embeds"]
    plain = DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(got, plain.encode_prompt(PROMPTS, "cpu", 1, False)[0])
    assert not torch.equal(got, load_family(tiny_sd_path).encode_prompts(PROMPTS)["prompt_embeds"])


def test_long_prompts_are_cut_with_one_warning_that_counts_them(path):
    family = load_family(path)
    long = ["a red circle and " * 40, "a cross", "zebra " * 77]
    with pytest.warns(UserWarning, match="2 of 3 prompts are longer than 77 tokens") as caught:
        text = family.encode_prompts(long)
    assert len(caught) == 1
    assert text["prompt_embeds"].shape[1] == 77
    assert family.truncated(long) == [0, 2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        family.encode_prompts(PROMPTS)
        family.encode_prompts(long, warn=False)


def test_a_prompt_that_is_no_string_is_named(tiny_sd_path):
    with pytest.raises(UserError, match="prompt 1 is None"):
        load_family(tiny_sd_path).encode_prompts(["a", None])  # type: ignore[list-item]


def test_prompt_gradient_reaches_the_encoders(path):
    family = load_family(path)
    for encoder in family.text_encoders.values():
        encoder.requires_grad_(True)
    text = family.encode_prompts(PROMPTS[:1], grad=True)
    sum(value.square().sum() for value in text.values()).backward()
    for encoder in family.text_encoders.values():
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


# Images


def test_images_are_scaled_posterior_means_or_samples(path):
    family = load_family(path)
    images = torch.rand(3, 3, 32, 32)
    parameters = family.vae.encode(images * 2 - 1).latent_dist
    scale = family.vae.config.scaling_factor
    mean = family.encode_images(images)
    assert mean.dtype == torch.float32 and not mean.requires_grad
    torch.testing.assert_close(mean, parameters.mean * scale)

    def drawn(chunk: int | None = None) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        return family.encode_images(images, posterior="sample", generators=generators, chunk=chunk)

    eps = torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)])
    torch.testing.assert_close(drawn(), (parameters.mean + parameters.std * eps) * scale)
    torch.testing.assert_close(drawn(chunk=2), drawn())
    with pytest.raises(ValueError, match="one torch.Generator per image"):
        family.encode_images(images, posterior="sample", generators=[torch.Generator()])


def test_decoding_is_the_pipelines(path):
    family = load_family(path)
    latents = noise(2, 4, 16, 16) * family.vae.config.scaling_factor
    images = family.decode_latents(latents)
    want = family.vae.decode(latents / family.vae.config.scaling_factor).sample / 2 + 0.5
    assert torch.equal(images, want.clamp(0, 1))
    torch.testing.assert_close(family.decode_latents(latents, chunk=1), images)


def test_shift_and_channel_statistics_are_respected(tiny_sd_path):
    family = load_family(tiny_sd_path)
    images = torch.rand(1, 3, 32, 32)
    z = family.vae.encode(images * 2 - 1).latent_dist.mean
    family.vae.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    shifted = family.encode_images(images)
    torch.testing.assert_close(shifted, (z - 0.25) * 0.5)
    plain = family.vae.decode(z).sample / 2 + 0.5
    torch.testing.assert_close(family.decode_latents(shifted), plain.clamp(0, 1))
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    family.vae.register_to_config(latents_mean=mean, latents_std=std)
    normal = family.encode_images(images)
    torch.testing.assert_close(normal[:, 3], (z[:, 3] - 0.4) * 0.5 / 4.0)
    torch.testing.assert_close(family.decode_latents(normal), plain.clamp(0, 1))


def test_decoding_keeps_the_gradient_even_beyond_the_range(tiny_sdxl_path):
    family = load_family(tiny_sdxl_path)
    last = family.vae.decoder.conv_out
    last.bias.data.fill_(10.0)
    latents = noise(2, 4, 16, 16).requires_grad_()
    images = family.decode_latents(latents, grad=True)
    assert images.max() <= 1 and torch.equal(images, family.decode_latents(latents))
    assert (images == 1).all()
    images.square().sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    whole, latents.grad = latents.grad, None
    family.decode_latents(latents, grad=True, chunk=1).square().sum().backward()
    torch.testing.assert_close(latents.grad, whole)
    assert not family.decode_latents(latents).requires_grad


# VAE that does not overflow


def vae_folder(source: str, folder: Path, **config: object) -> str:
    shutil.copytree(Path(source) / "vae", folder)
    edit(folder / "config.json", **config)
    return str(folder)


def test_fp16_loads_an_overflowing_vae_in_fp32(tiny_sdxl_path, tmp_path):
    family = load_family(tiny_sdxl_path, dtype=torch.float16)
    assert family.vae.dtype == torch.float32
    fixed = vae_folder(tiny_sdxl_path, tmp_path / "fixed", force_upcast=False)
    family = load_family(tiny_sdxl_path, dtype=torch.float16, vae=fixed)
    assert family.vae.dtype == torch.float16
    assert load_family(tiny_sdxl_path, vae_dtype=torch.bfloat16).vae.dtype == torch.bfloat16
    with pytest.raises(UserError, match="overflows in float16"):
        load_family(tiny_sdxl_path, vae_dtype=torch.float16)


def test_a_named_vae_replaces_the_checkpoints(tiny_sdxl_path, tiny_sd_path, tmp_path):
    family = load_family(tiny_sdxl_path, vae=tiny_sd_path)
    other = AutoencoderKL.from_pretrained(tiny_sd_path, subfolder="vae")
    assert all(torch.equal(a, b) for a, b in zip(family.vae.parameters(), other.parameters(), strict=True))
    assert family.vae.config.scaling_factor == other.config.scaling_factor
    assert family.fingerprint("vae") != load_family(tiny_sdxl_path).fingerprint("vae")
    wide = vae_folder(tiny_sdxl_path, tmp_path / "wide", latent_channels=16)
    with pytest.raises(UserError, match="16 latent channels"):
        load_family(tiny_sdxl_path, vae=wide)
    with pytest.raises(UserError, match="no readable config.json"):
        load_family(tiny_sdxl_path, vae=str(tmp_path))


def test_short_dtypes_sample_with_an_fp32_vae(tiny_sdxl_path):
    family = load_family(tiny_sdxl_path, dtype=torch.bfloat16)
    images = sample(family.pipeline())
    assert images.isfinite().all() and images.std() > 0.01
    text = family.encode_prompts(PROMPTS[:1])
    latents = family.encode_images(torch.rand(1, 3, 32, 32))
    pred = family.predict(family.denoiser, latents, torch.tensor([3]), text)
    assert text["prompt_embeds"].dtype == torch.bfloat16 and pred.dtype == torch.float32 and pred.isfinite().all()


# Prediction


class Wrapped(nn.Module):
    """As DDP and torch.compile wrap: other attributes, the same parameters."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


def test_prediction_is_the_networks_and_the_wrapper_does_not_matter(path):
    family = load_family(path)
    latents, t, text = noise(3, 4, 16, 16), torch.tensor([1, 500, 999]), family.encode_prompts(PROMPTS)
    pred = family.predict(family.denoiser, latents, t, text)
    added = {
        "text_embeds": text.get("pooled_prompt_embeds"),
        "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 3),
    }
    want = family.denoiser(latents, t, text["prompt_embeds"], added_cond_kwargs=added).sample
    assert torch.equal(pred, want)
    assert torch.equal(family.predict(Wrapped(family.denoiser), latents, t, text), pred)
    one = {key: value[1:2] for key, value in text.items()}
    torch.testing.assert_close(family.predict(family.denoiser, latents[1:2], t[1:2], one), pred[1:2])


def test_sdxl_sizes_condition_each_image(tiny_sdxl_path):
    family = load_family(tiny_sdxl_path)
    latents, t = noise(2, 4, 16, 16), torch.tensor([10, 10])
    text = family.encode_prompts(PROMPTS[:2])
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32], [64, 48, 4, 0, 32, 32]])
    plain, sized = (family.predict(family.denoiser, latents, t, text, s) for s in (None, sizes))
    torch.testing.assert_close(plain[0], sized[0])
    assert (plain[1] - sized[1]).abs().max() > 1e-5
    with pytest.raises(ValueError, match=r"\(2, 6\).*\(1, 6\)"):
        family.predict(family.denoiser, latents, t, text, sizes[:1])


# Pipeline


def test_pipeline_samples_what_plain_diffusers_samples(path):
    family = load_family(path)
    pipe = family.pipeline()
    plain = DiffusionPipeline.from_pretrained(path)
    assert type(pipe) is type(plain) and type(pipe.scheduler) is type(plain.scheduler)
    assert dict(pipe.scheduler.config) == dict(plain.scheduler.config)
    assert pipe.unet is family.denoiser
    assert torch.equal(sample(pipe), sample(plain))


def test_pipeline_keeps_the_checkpoints_options(tiny_sdxl_path, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_sdxl_path, folder)
    edit(folder / "model_index.json", force_zeros_for_empty_prompt=False)
    assert load_family(str(folder)).pipeline().config.force_zeros_for_empty_prompt is False
    assert load_family(tiny_sdxl_path).pipeline().config.force_zeros_for_empty_prompt is True


def test_pipeline_survives_save_pretrained(tiny_sdxl_path, tmp_path):
    family = load_family(tiny_sdxl_path)
    family.denoiser.requires_grad_(True)
    next(family.denoiser.parameters()).data.add_(0.5)
    family.pipeline().save_pretrained(tmp_path / "full")
    assert torch.equal(sample(load_family(str(tmp_path / "full")).pipeline()), sample(family.pipeline()))


def test_named_schedulers_keep_the_checkpoints_noise_and_never_clip(tiny_sdxl_path):
    family = load_family(tiny_sdxl_path)
    pipe = family.pipeline(scheduler="ddim")
    assert isinstance(pipe.scheduler, DDIMScheduler) and pipe.scheduler.config.clip_sample is False
    assert pipe.scheduler.config.beta_end == 0.012 and pipe.scheduler.config.timestep_spacing == "leading"
    assert sample(pipe).isfinite().all()
    for name in NAMES:
        assert type(family.pipeline(scheduler=name).scheduler).__name__ == NAMES[name]
    assert isinstance(make_scheduler("EulerDiscreteScheduler", {}), EulerDiscreteScheduler)
    for name in ("eular", "AutoencoderKL", "SchedulerMixin"):
        with pytest.raises(UserError, match="is unknown. Use one of ddim"):
            family.pipeline(scheduler=name)


def test_a_named_scheduler_takes_options() -> None:
    lcm = make_scheduler("lcm:original_inference_steps=20:timestep_scaling=5", {"beta_end": 0.012})
    assert (lcm.config.original_inference_steps, lcm.config.timestep_scaling, lcm.config.beta_end) == (20, 5, 0.012)
    lcm.set_timesteps(4)
    assert lcm.timesteps.tolist() == [999, 749, 499, 249]
    for name in ("lcm:original_inference_step=20", "lcm:original_inference_steps"):
        with pytest.raises(
            UserError, match="no option=value of LCMScheduler. Did you mean 'original_inference_steps'"
        ):
            make_scheduler(name, {})


def test_a_sampler_with_strength_starts_later_and_draws_as_plain_diffusers_from_these_timesteps(tiny_sdxl_path):
    family = load_family(tiny_sdxl_path)
    name = "lcm:original_inference_steps=10:strength=0.8"
    lcm = make_scheduler(name, family.scheduler_config)
    lcm.set_timesteps(4)
    assert lcm.timesteps.tolist() == [799, 599, 399, 199]
    own = {"prompt": "a red circle", "guidance_scale": 1.0, "output_type": "np"}
    drawn = []
    for scheduler, steps in ((name, {"num_inference_steps": 2}), ("lcm", {"timesteps": [799, 399]})):
        pipe = family.pipeline(scheduler=scheduler)
        drawn.append(pipe(**own, **steps, generator=torch.Generator().manual_seed(0)).images)
    assert (drawn[0] == drawn[1]).all()
    whole = make_scheduler("lcm:strength=1", {})
    whole.set_timesteps(4)
    assert whole.timesteps.tolist() == [999, 759, 499, 259]
    for wrong in ("lcm:strength=0", "lcm:strength=1.5", "lcm:strength=much", "lcm:strength=true"):
        with pytest.raises(UserError, match="above 0 and at most 1"):
            make_scheduler(wrong, {})
    with pytest.raises(UserError, match="no option=value of DDIMScheduler"):
        make_scheduler("ddim:strength=0.8", {})


# Fingerprints


def test_fingerprints_follow_weights_config_and_dtype(tiny_sdxl_path, tmp_path):
    family = load_family(tiny_sdxl_path)
    folder = tmp_path / "copy"
    shutil.copytree(tiny_sdxl_path, folder)
    copy = load_family(str(folder))
    for part in ("vae", "text_encoders"):
        assert family.fingerprint(part) == copy.fingerprint(part)
    assert family.fingerprint("vae") != family.fingerprint("text_encoders")
    short = load_family(tiny_sdxl_path, dtype=torch.bfloat16)
    assert short.fingerprint("text_encoders") != family.fingerprint("text_encoders")
    text = family.fingerprint("text_encoders")
    edit(folder / "vae" / "config.json", scaling_factor=0.5)
    assert copy.fingerprint("vae") != family.fingerprint("vae") and copy.fingerprint("text_encoders") == text
    weights = folder / "text_encoder_2" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert copy.fingerprint("text_encoders") != text
    with pytest.raises(ValueError, match="not 'denoiser'"):
        family.fingerprint("denoiser")

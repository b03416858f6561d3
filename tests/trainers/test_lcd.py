"""LCD end to end on a tiny SDXL pipeline, and its students in plain diffusers."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, LCMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor, nn

from diffalign.diffusion.consistency import consistency_function, solver_grid, solver_step
from diffalign.diffusion.noise import from_scheduler_config
from diffalign.diffusion.steps import make_steps
from diffalign.errors import UserError
from diffalign.trainers import lcd, load_method
from diffalign.trainers.lcd import TARGET, LCDConfig, LCDTrainer, lcd_loss
from diffalign.trainers.rg_lcd import rg_lcd_losses
from diffalign.training import validation


@pytest.fixture
def start(request: pytest.FixtureRequest, pairs_folder: Path, tmp_path: Path) -> Any:
    """A trainer of a tiny model, on the nine chosen images of pairs; keyword arguments override."""

    def make(model: str = "tiny_sdxl_path", **overrides: Any) -> LCDTrainer[Any]:
        settings: dict[str, Any] = {
            "pretrained_model_name_or_path": request.getfixturevalue(model),
            "dataset_name": str(pairs_folder),
            "cache_dir": str(tmp_path / "cache"),
            "output_dir": str(tmp_path / "run"),
            "resolution": 16,
            "max_train_steps": 2,
            "train_batch_size": 4,
            "learning_rate": 1e-2,
            "rank": 2,
            "checkpointing_steps": 0,
            "report_to": ["none"],
        }
        config, trainer = load_method("lcd")
        return trainer(config(**{**settings, **overrides}))

    return make


FULL: dict[str, Any] = {"train_mode": "full", "unet_time_cond_proj_dim": 16, "learning_rate": 1e-3}


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def first_batch(trainer: LCDTrainer[Any]) -> lcd.LCDBatch:
    batch = next(trainer.batches.stream(0, 1))
    assert isinstance(batch, lcd.LCDBatch)
    return batch


def by_hand(trainer: LCDTrainer[Any], batch: lcd.LCDBatch) -> tuple[Tensor, Tensor]:
    """f of the untrained network at x_t and at x_t', with one pass for each prediction."""
    family, process = trainer.family, trainer.family.noise_process

    def predict(x: Tensor, t: Tensor, text: Any) -> Tensor:
        with trainer.policy.reference() as teacher:
            return family.predict(teacher, x, t, text, batch.sizes)

    x_t = process.add_noise(batch.latents, batch.noise, batch.timesteps)
    nothing = {name: value.expand(len(x_t), *value.shape[1:]) for name, value in family.encode_unconditional().items()}
    cond = predict(x_t, batch.timesteps, batch.text())
    uncond = predict(x_t, batch.timesteps, nothing)
    x_previous = solver_step(process, cond, uncond, batch.w, x_t, batch.timesteps, batch.previous)
    target = predict(x_previous, batch.previous, batch.text())
    return (
        consistency_function(process, cond, x_t, batch.timesteps),
        consistency_function(process, target, x_previous, batch.previous),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        FULL,
        {"cache_latents": False, "use_ema": True},
        {"model": "tiny_sd_path"},
        {"model": "tiny_sd_v_path", **FULL},
    ],
    ids=["lora", "full", "ema", "sd", "sd v full"],
)
def test_the_student_starts_as_its_teachers_one_step_prediction(start: Any, options: dict[str, Any]) -> None:
    trainer = start(**options)
    batch = first_batch(trainer)
    distilled = trainer.distil(batch)
    student, target = by_hand(trainer, batch)
    assert torch.equal(distilled.student, student), "bit for bit: the LoRA and the embedding start at 0"
    torch.testing.assert_close(distilled.target, target, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(distilled.losses, lcd_loss(student, target), rtol=1e-3, atol=1e-4)
    assert distilled.student.requires_grad and distilled.losses.requires_grad and not distilled.target.requires_grad
    loss, report = trainer.compute_loss(batch)
    assert loss.item() == distilled.losses.mean().item() == report["distillation"].item() > 0
    assert torch.equal(distilled.latents, batch.latents) and torch.equal(distilled.timesteps, batch.timesteps)


def test_an_aligned_lora_can_be_the_teacher(start: Any, tmp_path: Path) -> None:
    aligned = start(max_train_steps=1, output_dir=str(tmp_path / "aligned")).train()
    trainer = start(initial_lora=str(aligned), reference="start")
    batch = first_batch(trainer)
    student, target = by_hand(trainer, batch)
    distilled = trainer.distil(batch)
    assert torch.equal(distilled.student, student)
    torch.testing.assert_close(distilled.target, target, rtol=1e-4, atol=1e-4)
    assert not torch.equal(student, start().distil(batch).student), "the LoRA must do something"


def test_draws_are_each_images_own_whatever_the_micro_batch(start: Any) -> None:
    options = {"w_min": 2.0, "w_max": 4.0, "num_ddim_timesteps": 20, "proportion_empty_prompts": 0.3}
    whole = list(start(train_batch_size=4, **options).batches.stream(0, 6))
    parts = list(start(train_batch_size=2, gradient_accumulation_steps=2, **options).batches.stream(0, 6))
    for name in ("latents", "noise", "timesteps", "previous", "w"):
        joined = [torch.cat([getattr(batch, name) for batch in batches]) for batches in (whole, parts)]
        assert torch.equal(*joined), name
    w = torch.cat([batch.w for batch in whole])
    assert len(set(w.tolist())) == len(w) == 24 and 2 <= w.min() < 2.5 and 3.5 < w.max() <= 4
    t = torch.cat([batch.timesteps for batch in whole])
    assert set(t.tolist()) <= set(range(49, 1000, 50)) and len(set(t.tolist())) > 8
    prompts = [prompt for batch in whole for prompt in batch.prompts]
    assert prompts == [prompt for batch in parts for prompt in batch.prompts]
    captions = {f"toy {index}" for index in range(10)}
    assert "" in prompts and set(prompts) - {""} <= captions and len(set(prompts)) > 5


def test_captions_are_those_of_the_images(start: Any) -> None:
    trainer = start()
    batch = first_batch(trainer)
    assert "" not in batch.prompts and len(set(batch.prompts)) > 1
    encoded = trainer.family.encode_prompts(batch.prompts)["prompt_embeds"]
    torch.testing.assert_close(batch.text()["prompt_embeds"], encoded, rtol=1e-4, atol=1e-5)


def test_the_target_of_full_fine_tuning_is_an_ema_and_the_teacher_stays(start: Any) -> None:
    trainer = start(max_train_steps=1, **FULL)
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    trainer.train()
    moved = 0
    for (name, p), average in zip(trainer.policy.parameters.items(), trainer.policy.copies[TARGET], strict=True):
        torch.testing.assert_close(average, 0.95 * before[name] + 0.05 * p, rtol=1e-5, atol=1e-7)
        moved += not torch.equal(p, before[name])
    assert moved > len(before) / 2
    with trainer.policy.reference() as teacher:
        assert all(torch.equal(p, before[f"unet.{name}"]) for name, p in teacher.named_parameters())
    assert not torch.equal(
        before["unet.time_embedding.cond_proj.weight"],
        trainer.policy.parameters["unet.time_embedding.cond_proj.weight"],
    )


def test_a_lora_can_have_an_ema_target_and_a_fixed_scale(start: Any, capsys: Any) -> None:
    trainer = start(use_ema=True, w_min=4.0, w_max=4.0, loss_type="l2", train_text_encoder=True)
    table = rows(trainer.train())
    assert set(first_batch(trainer).w.tolist()) == {4.0}
    said = capsys.readouterr().out
    assert "guidance scale 5, baked into the student" in said and "EMA of the student, decay 0.95" in said
    assert table[0]["loss"] != table[1]["loss"] and table[0]["skipped_steps"] == 0


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, FULL])
def test_a_resumed_run_ends_with_the_same_bits(start: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    options = {**options, "max_train_steps": 4, "checkpointing_steps": 2}
    whole = start(output_dir=str(tmp_path / "whole"), **options)
    table = rows(whole.train())
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-4")
    resumed = start(output_dir=str(tmp_path / "again"), resume_from_checkpoint="latest", **options)
    assert [row["loss"] for row in rows(resumed.train())] == [row["loss"] for row in table]
    ours, theirs = whole.policy, resumed.policy
    assert all(torch.equal(p, theirs.parameters[name]) for name, p in ours.parameters.items())
    for name, values in ours.copies.items():
        assert all(map(torch.equal, values, theirs.copies[name]))


def noisy(shape: tuple[int, ...], seed: int) -> tuple[Tensor, torch.Generator]:
    """Initial latents, and the generator of the noise of each step."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)), torch.Generator().manual_seed(seed + 1)


@torch.no_grad()
def drawn_by_us(trainer: LCDTrainer[Any], prompt: str, num_steps: int) -> Tensor:
    """Latents of few-step sampling with the trained network, without guidance."""
    family = trainer.family
    steps = make_steps(family.noise_process, family.scheduler_config, num_steps, "lcm")
    x, generator = noisy((1, *family.latent_shape(32, 32)), 7)
    text = family.encode_prompts([prompt])
    for i in range(num_steps):
        pred = family.predict(family.denoiser.eval(), x, steps.timesteps[[i]], text)
        step = steps.step(pred, x, torch.tensor([i]))
        x = step.sample(torch.randn(x.shape, generator=generator)) if steps.std[i] > 0 else step.mean
    return x


def drawn_by_diffusers(pipe: Any, prompt: str, num_steps: int, guidance_scale: float = 1.0) -> Tensor:
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    x, generator = noisy((1, 4, 16, 16), 7)
    return pipe(
        prompt,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        latents=x,
        generator=generator,
        output_type="latent",
    ).images


@pytest.mark.parametrize("model", ["tiny_sdxl_path", "tiny_sd_v_path"])
def test_plain_diffusers_draws_with_the_lora_what_we_draw(
    start: Any, model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    trainer = start(model, save_comfyui_lora=True)
    run = trainer.train()
    for file in ("pytorch_lora_weights.safetensors", "run_comfyui.safetensors"):
        pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(model))
        base = drawn_by_diffusers(pipe, "a red circle", 4)
        pipe.load_lora_weights(str(run), weight_name=file)
        for num_steps in (1, 4):
            ours = drawn_by_us(trainer, "a red circle", num_steps)
            theirs = drawn_by_diffusers(pipe, "a red circle", num_steps)
            torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
        assert (theirs - base).abs().max() > 0.1, "the LoRA must do something, or the comparison shows nothing"


def test_plain_diffusers_tells_a_full_student_its_guidance(start: Any, tiny_sdxl_path: str) -> None:
    trainer = start(**FULL)
    run = trainer.train()
    unet = UNet2DConditionModel.from_pretrained(run, subfolder="unet")
    assert unet.config.time_cond_proj_dim == 16
    pipe = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_path, unet=unet)
    low, high = (drawn_by_diffusers(pipe, "a red circle", 2, scale) for scale in (4.0, 15.0))
    assert low.isfinite().all() and not torch.equal(low, high)
    batch = first_batch(trainer)
    x_t = trainer.family.noise_process.add_noise(batch.latents, batch.noise, batch.timesteps)
    with torch.no_grad():
        told = pipe.get_guidance_scale_embedding(batch.w, embedding_dim=16)
        pred = trainer.family.predict(unet, x_t, batch.timesteps, batch.text(), batch.sizes, told)
        theirs = consistency_function(trainer.family.noise_process, pred, x_t, batch.timesteps)
        torch.testing.assert_close(theirs, trainer.distil(batch).student, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"timestep_scaling_factor": 5.0}, FULL])
def test_validation_draws_the_student_by_lcm_and_the_teacher_as_it_is(
    start: Any, monkeypatch: Any, options: dict[str, Any]
) -> None:
    drawn = []

    def sample(pipe: Any, prompts: Any, seeds: Any, **settings: Any) -> Any:
        scheduler, told = pipe.scheduler, pipe.unet.config.time_cond_proj_dim
        steps, guidance = settings["num_inference_steps"], settings["guidance_scale"]
        drawn.append((type(scheduler).__name__, scheduler.config.get("timestep_scaling"), steps, guidance, told))
        return real(pipe, prompts, seeds, **{**settings, "num_inference_steps": 1})

    real = validation.sample_images
    monkeypatch.setattr(validation, "sample_images", sample)
    run = start(validation_prompts=["a red circle"], validation_steps=2, **options).train()
    scaling, told = options.get("timestep_scaling_factor", 10.0), options.get("unet_time_cond_proj_dim")
    student = ("LCMScheduler", scaling, 4, 10.0 if told else 1.0, told)
    assert drawn == [("EulerDiscreteScheduler", None, 25, 10.0, None), student, student]
    card = (run / "README.md").read_text()
    extra = ", timestep_scaling=5.0" if scaling == 5 else ""
    assert f"pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config{extra})" in card
    assert f"pipe('a red circle', num_inference_steps=4, guidance_scale={student[3]:g})" in card


SD = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PEAKS, SPREAD = torch.tensor([-1.0, 1.0]), 0.2


@dataclass
class Toy:
    """What a student learnt of two peaks: distances to the data, mean samples, and losses of each step."""

    before: tuple[float, float]
    after: tuple[float, float]
    """Earth mover's distance of samples in one step and in two."""
    mean: float
    """Of samples in two steps."""
    losses: list[float]


def distil_two_peaks(reward_scale: float = 0.0) -> Toy:
    """The exact denoiser of two peaks is the teacher; one step of it lands between them. The reward is x itself."""
    process, generator = from_scheduler_config(SD), torch.Generator().manual_seed(0)
    grid = solver_grid(process, 20)

    def data(count: int) -> Tensor:
        peaks = PEAKS[torch.randint(2, (count,), generator=generator)]
        return (peaks + SPREAD * torch.randn(count, generator=generator)).reshape(-1, 1, 1, 1)

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = (level.float().reshape(-1, 1, 1, 1) for level in (process.alpha(t), process.sigma(t)))
        variance = (alpha * SPREAD) ** 2 + sigma**2
        share = (-((x - alpha * PEAKS) ** 2) / (2 * variance)).softmax(-1)
        x0 = share * (PEAKS + alpha * SPREAD**2 / variance * (x - alpha * PEAKS))
        return (x - alpha * x0.sum(-1, keepdim=True)) / sigma

    with torch.random.fork_rng():
        torch.manual_seed(0)
        change = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    for parameter in change[-1].parameters():
        nn.init.zeros_(parameter)

    def student(x: Tensor, t: Tensor) -> Tensor:
        known = [(level.float().reshape(-1, 1, 1, 1)).expand_as(x) for level in (t / 1000, process.alpha(t))]
        return teacher(x, t) + change(torch.cat([x, *known], -1))

    @torch.no_grad()
    def draw(num_steps: int) -> Tensor:
        steps, own = make_steps(process, SD, num_steps, "lcm"), torch.Generator().manual_seed(5)
        x = torch.randn(4096, 1, 1, 1, generator=own)
        for i in range(num_steps):
            index = torch.full((len(x),), i)
            x = steps.step(student(x, steps.timesteps[index]), x, index).sample(torch.randn(x.shape, generator=own))
        return x.flatten().sort()[0]

    def error(num_steps: int) -> float:
        return (draw(num_steps) - data(4096).flatten().sort()[0]).abs().mean().item()

    before = error(1), error(2)
    optimizer, losses = torch.optim.Adam(change.parameters(), lr=2e-2), []
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 600)
    for _ in range(600):
        x0, index = data(256), torch.randint(20, (256,), generator=generator)
        t, previous = grid.timesteps[index], grid.previous[index]
        x_t = process.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
        epsilon = teacher(x_t, t)
        x_previous = solver_step(process, epsilon, epsilon, torch.zeros(256), x_t, t, previous)
        with torch.no_grad():
            target = consistency_function(process, student(x_previous, previous), x_previous, previous)
        predicted = consistency_function(process, student(x_t, t), x_t, t)
        distillation = lcd_loss(predicted, target)
        optimizer.zero_grad()
        rg_lcd_losses(distillation, predicted.flatten(), reward_scale).mean().backward()
        optimizer.step()
        schedule.step()
        losses.append(distillation.mean().item())
    return Toy(before, (error(1), error(2)), draw(2).mean().item(), losses)


def test_a_toy_student_draws_two_peaks_in_one_step_and_two() -> None:
    toy = distil_two_peaks()
    assert toy.after[0] < toy.before[0] / 2 and toy.after[1] < toy.before[1] / 2, toy
    assert sum(toy.losses[-20:]) < 0.7 * sum(toy.losses[:20])


def test_a_reward_moves_the_toy_students_samples_and_it_stays_consistent() -> None:
    plain, guided = distil_two_peaks(), distil_two_peaks(0.3)
    assert guided.mean > plain.mean + 0.1, (plain.mean, guided.mean)
    assert sum(guided.losses[-20:]) < sum(guided.losses[:20])


def test_settings_that_cannot_be_are_refused() -> None:
    def config(**settings: Any) -> LCDConfig:
        return LCDConfig(pretrained_model_name_or_path="m", output_dir="o", dataset_name="d", **settings)

    with pytest.raises(UserError, match="w_max 3 is below w_min 5"):
        config(w_min=5.0, w_max=3.0)
    with pytest.raises(UserError, match="w_min must be 0 or more"):
        config(w_min=-1.0)
    with pytest.raises(UserError, match="huber_c must be above 0"):
        config(huber_c=0.0)
    with pytest.raises(UserError, match="which a LoRA does not hold: set train_mode full"):
        config(unet_time_cond_proj_dim=256)
    with pytest.raises(UserError, match=r"validation_guidance_scale 20 .* learns 4 to 16"):
        config(train_mode="full", unet_time_cond_proj_dim=256, validation_guidance_scale=20.0)
    assert config(train_mode="full", unet_time_cond_proj_dim=256).validation_guidance_scale == 10


def test_a_distilled_model_is_no_teacher(start: Any, tiny_sdxl_path: str, tmp_path: Path) -> None:
    start(max_train_steps=1, **FULL).train()
    shutil.copytree(tiny_sdxl_path, tmp_path / "student")
    shutil.rmtree(tmp_path / "student" / "unet")
    shutil.copytree(tmp_path / "run" / "unet", tmp_path / "student" / "unet")
    with pytest.raises(UserError, match="told its guidance scale already"):
        start(pretrained_model_name_or_path=str(tmp_path / "student"), output_dir=str(tmp_path / "other"), **FULL)

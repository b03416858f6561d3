"""What a run of some settings will do, for :mod:`diffalign.estimation`: no model is loaded for this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from diffalign.data.geometry import Geometry
from diffalign.errors import UserError
from diffalign.estimation.work import Model, Part, Pass, Phase, RewardModel, Work
from diffalign.rewards import registry
from diffalign.training.config import TrainingConfig
from diffalign.training.groups import Arithmetic
from diffalign.training.optimizers import state_bytes

_DTYPES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_TEXT_ENCODERS: frozenset[Part] = frozenset({"text_encoders"})
_VAE_AND_TEXT: frozenset[Part] = frozenset({"vae", "text_encoders"})
_ALL: frozenset[Part] = frozenset({"denoiser", "vae", "text_encoders"})
# As build_cache does.
_PICTURES_AT_ONCE, _PROMPTS_AT_ONCE = 8, 64


def model_of(config: TrainingConfig) -> Model:
    """The networks of a run, at its largest shape."""
    height, width = _largest_shape(config)
    precision = _DTYPES[config.mixed_precision]
    full = config.train_mode == "full"
    return Model(
        path=config.pretrained_model_name_or_path,
        revision=config.revision,
        vae=config.pretrained_vae_model_name_or_path,
        dtype=torch.float32 if full or precision is None else precision,
        bits={"none": None, "8bit": 8, "4bit": 4}[config.quantize_base],
        autocast=precision,
        full=full,
        rank=config.rank,
        targets=tuple(config.lora_targets) if config.lora_targets else None,
        text_encoders=config.train_text_encoder,
        checkpointed=tuple(config.checkpointed_blocks or ()) if config.gradient_checkpointing else None,
        height=height,
        width=width,
    )


def _largest_shape(config: Any) -> tuple[int | None, int | None]:
    """Height and width of the largest images; None for the model's own."""
    resolution: int | None = config.resolution
    buckets = getattr(config, "aspect_ratio_buckets", None)
    if not buckets or (buckets == "auto" and resolution is None):
        return resolution, resolution
    shapes = Geometry(resolution or 8, buckets=buckets).targets
    return max(shapes, key=lambda shape: shape[0] * shape[1])


def rewards_of(config: Any) -> tuple[RewardModel, ...]:
    """The rewards of a run that has a model, as their cards know them."""
    found = []
    for entry in getattr(config, "rewards", None) or []:
        given: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"reward": entry}
        name, options = given.get("reward"), given.get("options") or {}
        size = registry.card(name).memory_gb if isinstance(name, str) else None
        if size:
            short = str(options.get("dtype", "float32")) in ("bf16", "fp16", "bfloat16", "float16")
            offloaded = options.get("offload") == "cpu_between_calls"
            found.append(
                RewardModel(
                    name=str(name),
                    weights=round(size * 1e9 * (1 if short else 2)),
                    offloaded=offloaded,
                    judge=bool(given.get("eval_only")),
                )
            )
    return tuple(found)


def offline_work(config: Any, *, passes: int, frozen_passes: int, needs_reference: bool, copies: int) -> Work:
    """A method that learns from images on disk.

    Args:
        config: of the run, a :class:`diffalign.training.config.DataConfig`.
        passes: samples through the policy for each sample of a batch.
        frozen_passes: forward passes without gradient beside each of the policy's.
        needs_reference: a full fine-tune keeps a frozen copy.
        copies: slow copies of the trained weights.
    """
    model = model_of(config)
    # The two images of a pair one after the other, and each once more where it is differentiated.
    apart = passes if getattr(config, "two_pass_gradient", False) else 1
    count, size = config.gradient_accumulation_steps * apart, config.train_batch_size * passes // apart
    parts: frozenset[Part] = frozenset({"denoiser"})
    inside: list[Pass] = []
    phases: list[Phase] = []
    if config.cache_latents:
        phases.append(_caching(model, config))
    else:
        parts = _ALL
        inside.append(Pass("encode images", "vae_encoder", size * apart, count / apart, autocast=False))
    if config.train_text_encoder:
        parts |= _TEXT_ENCODERS
        inside.append(Pass("text encoders", "text_encoders", size * apart, count / apart, grad=True))
    elif not config.cache_latents:
        inside.append(Pass("encode prompts", "text_encoders", size * apart, count / apart))
    if frozen_passes:
        inside.append(Pass("reference", "denoiser", size, count * frozen_passes, adapters=False))
    if apart > 1:
        inside.append(Pass("policy, first pass", "denoiser", size, count))
    inside.append(Pass("policy", "denoiser", size, count, grad=True))
    phases.append(Phase("step", tuple(inside), parts))
    samples = config.gradient_accumulation_steps * config.train_batch_size
    return finish(config, model, phases, needs_reference, copies, samples, passes > 1)


def finish(
    config: Any, model: Model, phases: list[Phase], needs_reference: bool, copies: int, samples: int, pairs: bool
) -> Work:
    """The work with these phases, validation, rewards and what the optimiser keeps."""
    if config.validation_prompts:
        guided = 2 if config.validation_guidance_scale != 1 else 1
        size = config.train_batch_size
        passes = (
            Pass("draw", "denoiser", size * guided, native=True),
            Pass("decode", "vae_decoder", size, native=True, split=True),
        )
        phases = [*phases, Phase("validation", passes, _ALL, in_step=False)]
    return Work(
        model=model,
        phases=tuple(phases),
        samples_per_step=samples,
        unit="pair" if pairs else "image",
        steps=config.max_train_steps,
        frozen_copy=needs_reference and config.train_mode == "full",
        copies=copies + config.use_ema,
        state_bytes=state_bytes(config),
        rewards=rewards_of(config),
        offload_idle=config.offload_idle,
    )


def _caching(model: Model, config: Any) -> Phase:
    """Latents and embeddings, before the denoiser is loaded."""
    passes = [Pass("encode images", "vae_encoder", _PICTURES_AT_ONCE, autocast=False, split=True)]
    if not config.train_text_encoder:
        passes.append(Pass("encode prompts", "text_encoders", _PROMPTS_AT_ONCE, autocast=False))
    return Phase("caching", tuple(passes), _VAE_AND_TEXT, in_step=False, before_training=True)


def online_work(
    config: Any, *, frozen_passes: int, replays_steps: bool, needs_reference: bool, copies: int, processes: int
) -> Work:
    """A method that draws rollouts and learns from their rewards.

    Args:
        config: of the run, a :class:`diffalign.training.online_config.OnlineConfig`.
        frozen_passes: as for :func:`offline_work`.
        replays_steps: it trains on steps of the sampler, with its guidance.
        needs_reference, copies: as for :func:`offline_work`.
        processes: that share a rollout.
    """
    model = model_of(config)
    guided = 2 if config.guidance_scale != 1 else 1
    trained = config.num_train_steps_per_image or (config.num_inference_steps - 1 if replays_steps else 1)
    arithmetic = Arithmetic(
        groups=config.num_prompts_per_rollout,
        images_per_group=config.num_images_per_prompt,
        updates=config.num_updates_per_rollout,
        epochs=config.num_inner_epochs,
        micro_batch=config.train_batch_size,
        passes_per_image=trained,
        world_size=processes,
    )
    arithmetic.check()
    drawn = arithmetic.images / processes / arithmetic.steps_per_rollout
    phases = [_rollout(config, guided, drawn)]
    size = config.train_batch_size * (guided if replays_steps else 1)
    count = arithmetic.micro_batches
    inside = [Pass("policy", "denoiser", size, count, grad=True)]
    if frozen_passes:
        inside.insert(0, Pass("reference", "denoiser", size, count * frozen_passes, adapters=False))
    phases.append(Phase("step", tuple(inside), _ALL))
    return finish(config, model, phases, needs_reference, copies, arithmetic.images_per_step // processes, False)


def _rollout(config: Any, guided: int, images: float) -> Phase:
    """Drawing so many images an optimiser step, decoding and scoring them; rewards work while the next are drawn."""
    at_once, decoded = config.rollout_batch_size, min(config.decode_batch_size, config.rollout_batch_size)
    passes = (
        Pass("draw", "denoiser", at_once * guided, images / at_once * config.num_inference_steps),
        Pass("decode", "vae_decoder", decoded, images / decoded, autocast=False),
    )
    return Phase("rollout", passes, _ALL | {"rewards"})


def gradient_work(config: Any, *, frozen_passes: int, copies: int, steps_with_gradient: int, times: int) -> Work:
    """A method that differentiates a reward through the last steps of the sampler.

    Args:
        config: of the run.
        frozen_passes: forward passes of the reference beside each step with gradient.
        copies: slow copies of the trained weights.
        steps_with_gradient: of the sampler.
        times: latents that each image is decoded from.
    """
    model = model_of(config)
    guided = 2 if config.guidance_scale != 1 else 1
    size, count = config.train_batch_size * guided, config.gradient_accumulation_steps
    images = config.train_batch_size * times
    decoded = min(config.decode_batch_size, images)
    without = config.num_inference_steps - steps_with_gradient
    # A step that is recomputed as a whole is run once more, and then only one of them keeps its activations.
    again = config.checkpoint_steps
    held = 1 if again else steps_with_gradient * times
    passes = [
        Pass("draw", "denoiser", size, count * (without + again * steps_with_gradient * times)),
        Pass("policy", "denoiser", size, count * steps_with_gradient * times, grad=True, held=held),
        Pass("decode", "vae_decoder", decoded, count * images / decoded, autocast=False),
        Pass("decode with gradient", "vae_decoder", decoded, count * images / decoded, grad=True, autocast=False),
    ]
    if frozen_passes:
        count *= frozen_passes * steps_with_gradient * times
        passes.insert(1, Pass("reference", "denoiser", size, count, adapters=False))
    phases = [Phase("step", tuple(passes), _ALL | {"rewards"})]
    samples = config.gradient_accumulation_steps * config.train_batch_size
    return finish(config, model, phases, frozen_passes > 0, copies, samples, False)


def with_rewarded_images(work: Work, config: Any) -> Work:
    """The same work with a reward that is differentiated through the VAE in each step."""
    size = min(config.decode_batch_size, config.train_batch_size)
    count = config.gradient_accumulation_steps * config.train_batch_size / size
    decoding = tuple(
        Pass("decode with gradient" if grad else "decode", "vae_decoder", size, count, grad=grad, autocast=False)
        for grad in (False, True)
    )
    extra: frozenset[Part] = frozenset({"vae", "rewards"})
    phases = tuple(
        replace(phase, passes=phase.passes + decoding, parts=phase.parts | extra) if phase.name == "step" else phase
        for phase in work.phases
    )
    return replace(work, phases=phases)


def sharded(work: Work, processes: int, stay_together: bool) -> Work:
    """The same work with what trains shared out between processes, see :mod:`diffalign.training.sharding`.

    Raises:
        UserError: a LoRA trains.
    """
    if not work.model.full:
        raise UserError("only a full fine-tune is shared out (--train_mode full); a LoRA runs by DDP")
    model = replace(work.model, sharded=True)
    return replace(work, model=model, shards=processes, stay_together=stay_together)


def with_like(work: Work, like: str | None) -> Work:
    """The same work with the shapes of another architecture's bundled configs, see ``--like``."""
    return work if like is None else replace(work, model=replace(work.model, like=like))

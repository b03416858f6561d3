"""The settings of methods that learn from rewards of the images they draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from diffalign.config import field
from diffalign.diffusion.steps import SamplerName
from diffalign.errors import UserError
from diffalign.rewards.ensembles import Mode
from diffalign.training.config import TrainingConfig
from diffalign.training.groups import Arithmetic


@dataclass(kw_only=True)
class JudgedConfig(TrainingConfig):
    """How images are scored, and what a run is judged by."""

    # Rewards
    rewards: list[Any] = field(
        help="Rewards to learn from: names, or mappings of reward, weight, transform, options; eval_only ones are "
        "scored on the held-out prompts and never trained on."
    )
    combine: Mode = field("sum", help="How several rewards become one, see docs/combining-rewards.md.")
    on_reward_failure: Literal["stop", "retry", "drop"] = field(
        "stop", help="Images that cannot be scored: end the run (it can be resumed), try again, or leave them out."
    )
    decode_batch_size: int = field(4, help="Images the VAE decodes at once.")

    # Held-out evaluation
    heldout_prompts: str | None = field(
        None, help="Prompts to judge by, never trained on; takes the same as prompts, such as shapes-validation."
    )
    num_heldout_prompts: int = field(64, help="How many of them, one image each.")
    evaluation_steps: int = field(50, help="Judge every so many optimiser steps, at step 0 and at the end.")
    early_stop: bool = field(
        False, help="End the run when the trained reward rises while the held-out one falls significantly."
    )
    early_stop_patience: int = field(2, help="Evaluations in a row that must show it.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("decode_batch_size", "num_heldout_prompts", "evaluation_steps", "early_stop_patience"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        if not self.rewards:
            raise UserError("rewards is empty: name at least one, for example rewards: [pickscore]")
        if self.early_stop and not self.heldout_prompts:
            raise UserError("early_stop needs heldout_prompts to judge by")
        if self.early_stop and self.combine == "vote":
            raise UserError("early_stop compares evaluations, and votes within one cannot be: use another combine")


@dataclass(kw_only=True)
class PromptConfig(JudgedConfig):
    """What to draw."""

    # Prompts
    prompts: str = field(
        help="Prompts to draw: a text file (one a line), a JSONL file, hub:NAME:COLUMN, module:function, "
        "file.py:function, or shapes-train."
    )
    max_prompts: int | None = field(None, help="Use only the first so many prompts.")

    # Sampling
    rollout_batch_size: int = field(8, help="Images a process draws at once.")
    num_inference_steps: int = field(20, help="Sampling steps.")
    sampler: SamplerName = field("ddim", help="Sampler; flow_sde, dance and cps are for flow models.")
    eta: float = field(1.0, help="Noise of the sampler; 0 is deterministic.")
    guidance_scale: float = field(
        5.0, help="Classifier-free guidance, the same in drawing and training; 1 is without."
    )
    resolution: int | None = field(None, help="Side of the images in pixels. Default: the model's own.")
    evaluation_inference_steps: int | None = field(None, help="Sampling steps then. Default: num_inference_steps.")
    evaluation_eta: float = field(0.0, help="Noise of the DDIM sampler that judges; the same noise each time.")
    evaluation_guidance_scale: float | None = field(None, help="Guidance then. Default: guidance_scale.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rollout_batch_size", "num_inference_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("eta", "evaluation_eta"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        for name in ("guidance_scale", "evaluation_guidance_scale"):
            value = getattr(self, name)
            self._require(name, value is None or value >= 1, "at least 1")
        steps = self.evaluation_inference_steps
        self._require("evaluation_inference_steps", steps is None or steps >= 1, "at least 1")
        if self.train_text_encoder:
            raise UserError(
                "train_text_encoder: prompts of a rollout are encoded once, so methods on rewards train the denoiser "
                "alone. Leave it off."
            )
        if self.max_train_steps is None:
            raise UserError("say max_train_steps: a run on prompts has no end of its own")


@dataclass(kw_only=True)
class OnlineConfig(PromptConfig):
    """How rollouts are made and learned from."""

    # Rollout
    num_prompts_per_rollout: int = field(8, help="Prompts of a rollout, over all processes.")
    num_images_per_prompt: int = field(8, help="Images of each prompt: the group that advantages compare within.")
    store_bf16: bool = field(False, help="Keep latents of a rollout in bfloat16: half the memory, rounded steps.")

    # Updates
    num_updates_per_rollout: int = field(1, help="Optimiser steps that the images of a rollout are cut into.")
    num_inner_epochs: int = field(1, help="How often a rollout is trained on.")
    num_train_steps_per_image: int | None = field(
        None, help="Forward passes of training for each image: sampling steps trained on (default all), or timesteps."
    )
    gradient_accumulation_steps: int = field(1, help="Worked out from the sizes above; leave it alone.")

    # Advantages
    normalise_each_reward: bool = field(
        True, help="Turn each reward into advantages before they are added, so that weights mean what they say."
    )
    advantage: Literal["group", "global_std", "tracker", "batch"] = field(
        "group",
        help="What a reward is compared with: its group; its group, in units of the spread of all; running statistics "
        "of its prompt; or the whole rollout.",
    )
    advantage_clip: float = field(5.0, help="Largest advantage.")
    tracker_buffer_size: int = field(32, help="Rewards of a prompt that the tracker remembers.")
    tracker_min_count: int = field(16, help="Fewer than this, and the tracker uses statistics of the rollout.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (
            "num_prompts_per_rollout",
            "num_images_per_prompt",
            "num_updates_per_rollout",
            "num_inner_epochs",
            "tracker_buffer_size",
        ):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("advantage_clip", self.advantage_clip > 0, "above 0")
        trained = self.num_train_steps_per_image
        self._require("num_train_steps_per_image", trained is None or trained >= 1, "at least 1")
        if self.advantage in ("group", "global_std") and self.num_images_per_prompt < 2:
            raise UserError(
                f"advantage {self.advantage} compares images of one prompt: num_images_per_prompt must be at least 2, "
                "or use advantage tracker or batch"
            )
        steps = self.num_updates_per_rollout * self.num_inner_epochs
        for name in ("checkpointing_steps", "max_train_steps"):
            every = getattr(self, name)
            if every % steps:
                near = max(steps, round(every / steps) * steps)
                raise UserError(
                    f"{name} {every} falls within a rollout of {steps} steps, from where nothing can be resumed; "
                    f"use {near}"
                )

    def work_out(self, arithmetic: Arithmetic) -> None:
        """Set what follows from the sizes of a rollout.

        Raises:
            UserError: gradient_accumulation_steps was given and is another.
        """
        wanted = arithmetic.micro_batches
        if self.gradient_accumulation_steps not in (1, wanted):
            raise UserError(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} does not fit: a step of "
                f"{arithmetic.images_per_step} images in micro-batches of {self.train_batch_size} on "
                f"{arithmetic.world_size} process(es) accumulates {wanted}. Leave it out."
            )
        self.gradient_accumulation_steps = wanted

"""The settings that every method shares. Names are those of the diffusers and TRL training scripts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffalign.config import field
from diffalign.errors import UserError


@dataclass(kw_only=True)
class RunConfig:
    """The run: how long, how fast, and what it leaves behind."""

    # Run
    output_dir: str = field(help="Folder of the run: config, metrics, checkpoints and the result.")
    overwrite_output_dir: bool = field(False, help="Delete what an earlier run left in output_dir.")
    seed: int = field(0, help="Seed of all randomness of the run.")
    max_train_steps: int | None = field(None, help="Optimiser steps. Without it, num_train_epochs counts.")
    num_train_epochs: float = field(1.0, help="Passes over the data, where max_train_steps is not given.")
    train_batch_size: int = field(1, help="Samples (pairs) per process in one forward pass.")
    gradient_accumulation_steps: int = field(1, help="Forward passes per optimiser step.")
    mixed_precision: Literal["no", "fp16", "bf16"] = field("no", help="Autocast type; frozen weights are held in it.")
    allow_tf32: bool = field(False, help="Allow TF32 matrix products on Ampere and later.")
    gradient_checkpointing: bool = field(False, help="Recompute activations in the backward pass to save memory.")
    process_timeout: float = field(
        30.0,
        help="Minutes that a process waits for the others in an exchange; then the run ends and says who is late.",
    )
    dataloader_num_workers: int = field(0, help="Worker processes that read the data.")

    # LoRA
    rank: int = field(16, help="Rank of the LoRA.")
    lora_alpha: float | None = field(None, help="LoRA alpha; the strength is alpha / rank. Default: the rank.")
    lora_dropout: float = field(0.0, help="Dropout on the LoRA's input.")
    lora_targets: list[str] | None = field(None, help="Modules that get a LoRA. Default: attention projections.")

    # Optimiser
    learning_rate: float = field(1e-5, help="Peak learning rate.")
    scale_lr: bool = field(False, help="Multiply the learning rate by the effective batch size.")
    lr_scheduler: str = field("constant_with_warmup", help="Schedule, by its name in diffusers.optimization.")
    lr_warmup_steps: int = field(0, help="Warm-up, in optimiser steps.")
    optimizer: Literal["adamw", "adafactor"] = field("adamw", help="Optimiser.")
    use_8bit_adam: bool = field(False, help="Hold AdamW's state in 8 bits (needs bitsandbytes and CUDA).")
    adam_beta1: float = field(0.9, help="AdamW beta1.")
    adam_beta2: float = field(0.999, help="AdamW beta2.")
    adam_epsilon: float = field(1e-8, help="AdamW epsilon.")
    weight_decay: float = field(1e-2, help="Decoupled weight decay.")
    max_grad_norm: float = field(1.0, help="Clip the gradient to this norm.")
    max_nonfinite_steps: int = field(5, help="Stop after this many non-finite steps in a row; each is skipped.")

    # Checkpoints and logging
    checkpointing_steps: int = field(500, help="Save a checkpoint every so many steps; 0 for none.")
    checkpoints_total_limit: int | None = field(None, help="Keep at most this many checkpoints.")
    resume_from_checkpoint: str | None = field(None, help="'latest', or the path of a checkpoint folder.")
    report_to: list[str] = field(["auto"], help="Trackers: auto (TensorBoard if installed), none, wandb, trackio, ...")
    push_to_hub: bool = field(False, help="Upload the results and their model card with your hub login.")
    hub_model_id: str | None = field(None, help="Repository to upload to. Default: the name of output_dir.")

    def __post_init__(self) -> None:
        for name in ("train_batch_size", "gradient_accumulation_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "max_grad_norm", "num_train_epochs", "max_nonfinite_steps", "process_timeout"):
            self._require(name, getattr(self, name) > 0, "above 0")
        for name in ("checkpointing_steps", "lr_warmup_steps", "dataloader_num_workers", "seed", "weight_decay"):
            self._require(name, getattr(self, name) >= 0, "0 or more")
        self._require("lora_dropout", 0 <= self.lora_dropout < 1, "in [0, 1)")
        self._require("max_train_steps", self.max_train_steps is None or self.max_train_steps >= 1, "at least 1")
        limit = self.checkpoints_total_limit
        self._require("checkpoints_total_limit", limit is None or limit >= 1, "at least 1, or none for no limit")
        if self.use_8bit_adam and self.optimizer != "adamw":
            raise UserError(f"use_8bit_adam needs optimizer adamw, got {self.optimizer}")

    def _require(self, name: str, holds: bool, bound: str) -> None:
        if not holds:
            raise UserError(f"{name} must be {bound}, got {getattr(self, name)!r}")


@dataclass(kw_only=True)
class TrainingConfig(RunConfig):
    """What of a diffusion model to train, and what to draw meanwhile."""

    # Model
    method: str | None = field(
        None, help="The method these settings are for; `diffalign train --config FILE` reads it. Default: what runs."
    )
    pretrained_model_name_or_path: str = field(help="Pipeline folder, hub id, or a bundled name such as shapes-sdxl.")
    revision: str | None = field(None, help="Revision of the model on the hub.")
    variant: str | None = field(None, help="Weight file variant of the model, such as fp16.")
    pretrained_vae_model_name_or_path: str | None = field(None, help="Another VAE to use, such as an fp16-safe one.")

    # Speed
    enable_xformers_memory_efficient_attention: bool = field(False, help="xformers attention (default: SDPA).")
    compile_repeated_blocks: bool = field(False, help="Compile the denoiser's repeated blocks with torch.compile.")
    channels_last: bool = field(False, help="Hold the denoiser's convolutions in the channels-last memory format.")
    checkpointed_blocks: list[str] | None = field(
        None,
        help="Use gradient_checkpointing in these blocks only, such as down_blocks.0 up_blocks.2. Default: in all.",
    )

    quantize_base: Literal["none", "8bit", "4bit"] = field(
        "none", help="Hold the denoiser's frozen weights in fewer bits, for small cards (needs bitsandbytes and CUDA)."
    )
    offload_idle: bool = field(
        False, help="Keep the VAE and the text encoders, where they are not cached away, on the CPU between uses."
    )

    # Before the run
    check_first: bool | None = field(
        None,
        help="Try one save, one validation image and one step at the largest shape before all else, so that running "
        "out of memory happens in the first minute; the run stays the same. Default: on a GPU.",
    )
    dry_run: bool = field(False, help="Make only that trial, and end.")

    # What trains
    train_mode: Literal["lora", "full"] = field("lora", help="Train a LoRA, or all of the denoiser's weights.")
    train_text_encoder: bool = field(False, help="Train a LoRA on the text encoder(s) too (needs train_mode lora).")
    initial_lora: str | None = field(None, help="Go on from this LoRA, trained with the same rank, alpha and targets.")
    reference: Literal["base", "start"] = field(
        "base", help="What a method compares with: the base model, or what the run starts from (initial_lora)."
    )
    use_ema: bool = field(False, help="Keep an exponential moving average of the trained weights and save it.")
    ema_decay: float = field(0.9999, help="Decay of the EMA, reached after a warm-up.")

    # Validation and export
    validation_prompts: list[str] | None = field(None, help="Prompts to draw during training.")
    validation_steps: int = field(100, help="Draw them every so many steps, and at step 0.")
    num_validation_images: int = field(1, help="Images (seeds) for each validation prompt.")
    validation_inference_steps: int = field(25, help="Sampling steps of a validation image.")
    validation_scheduler: str | None = field(
        None, help="Sampler of a validation image: ddim, lcm, dpm++, ... Default: the model's own."
    )
    validation_guidance_scale: float = field(5.0, help="Classifier-free guidance of a validation image.")
    save_comfyui_lora: bool = field(False, help="Also save the final LoRA for ComfyUI and kohya tools.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_validation_images", "validation_steps"):
            self._require(name, getattr(self, name) >= 1, "at least 1")
        self._require("rank", self.train_mode == "full" or self.rank >= 1, "at least 1; it is the width of the LoRA")
        self._require("ema_decay", 0 <= self.ema_decay < 1, "in [0, 1)")
        if self.checkpointed_blocks is not None and not self.gradient_checkpointing:
            raise UserError("checkpointed_blocks says where to checkpoint; it needs gradient_checkpointing")
        if self.train_mode == "full" and self.quantize_base != "none":
            raise UserError("quantize_base is for frozen weights; it needs train_mode lora, got full")
        if self.offload_idle and self.train_text_encoder:
            raise UserError(
                "offload_idle keeps text encoders on the CPU, and train_text_encoder trains them: choose one"
            )
        if self.train_mode == "full" and self.train_text_encoder:
            raise UserError("train_text_encoder trains a LoRA; it needs train_mode lora, got full")
        if self.train_mode == "full" and self.initial_lora:
            raise UserError("initial_lora goes on with a LoRA; it needs train_mode lora, got full")
        if self.save_comfyui_lora and self.train_mode == "full":
            raise UserError("save_comfyui_lora needs train_mode lora: a full fine-tune has no LoRA to save")


@dataclass(kw_only=True)
class DataConfig(TrainingConfig):
    """The settings of every method that learns from images on disk: pairs, or single ones."""

    # Data
    dataset_name: str = field(help="Data: a folder, a parquet or JSONL file, a hub id, or the bundled shapes-pairs.")
    dataset_config_name: str | None = field(None, help="Configuration of the hub data set.")
    dataset_split: str = field("train", help="Split to train on.")
    columns: dict[str, str] | None = field(None, help="Column names, where they differ: {prompt: my_caption, ...}.")
    rankings: str = field(
        "all", help="Pairs made of ranked images: all, adjacent, best-worst, or a number of random ones a list."
    )
    data_order: Literal["shuffled", "sequential"] = field(
        "shuffled",
        help="A new order each pass, or that of the data (easy to hard, as `diffalign difficulty` writes).",
    )
    max_train_samples: int | None = field(None, help="Use only the first so many samples.")
    max_bad_rows: int = field(10, help="Skip and list up to this many unreadable rows; more is an error.")
    streaming: bool = field(False, help="Read a hub data set as a stream instead of downloading it first.")
    resolution: int | None = field(None, help="Side of the training images in pixels. Default: the model's own.")
    aspect_ratio_buckets: str | None = field(
        None, help="Several sizes instead of one square: auto, or a list such as '1024,1024;832,1216' (height,width)."
    )
    random_crop: bool = field(False, help="Crop at a random place instead of the centre; both images of a pair alike.")
    random_flip: bool = field(False, help="Flip half of the images; both of a pair alike.")
    proportion_empty_prompts: float = field(0.0, help="Share of samples trained with an empty prompt, for guidance.")
    cache_latents: bool = field(True, help="Encode images and prompts once, to disk, and free VAE and text encoders.")
    cache_dir: str | None = field(None, help="Where caches live, shared by runs. Default: ~/.cache/diffalign.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("proportion_empty_prompts", 0 <= self.proportion_empty_prompts <= 1, "in [0, 1]")
        self._require("max_bad_rows", self.max_bad_rows >= 0, "0 or more")
        samples = self.max_train_samples
        self._require("max_train_samples", samples is None or samples >= 1, "at least 1")
        self._require("resolution", self.resolution is None or self.resolution >= 8, "at least 8")
        if self.resolution is not None and self.resolution % 8:
            near = max(8, round(self.resolution / 8) * 8)
            raise UserError(f"resolution must be divisible by 8, got {self.resolution}; the nearest is {near}")


@dataclass(kw_only=True)
class PairConfig(DataConfig):
    """The settings of every method that learns from preference pairs."""

    ties: Literal["drop", "keep", "error"] = field("drop", help="What to do with undecided pairs.")

"""What a run does on one device, in the terms that memory and time are counted in.

A trainer says it of itself (:meth:`diffalign.training.loop.Trainer.work`); everything else here knows no method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Network = Literal["denoiser", "text_encoders", "vae_decoder", "vae_encoder"]
Part = Literal["denoiser", "text_encoders", "vae", "rewards"]


@dataclass(frozen=True)
class Model:
    """The networks, and what of them trains.

    Attributes:
        path, revision, vae, like: see :func:`diffalign.pipelines.skeleton.find_configs`.
        dtype: of the frozen weights.
        bits: of the linear layers' frozen weights, where the base is quantised.
        autocast: the type of autocast; None is without.
        full: all weights of the denoiser train, in float32; else a LoRA.
        sharded: these are shared out, and brought together in the type of autocast.
        rank, targets: of the LoRA.
        text_encoders: they have a LoRA too.
        checkpointed: blocks whose activations are recomputed; () is all, None is none.
        height, width: of the images, in pixels; None is what the checkpoint was made for.
    """

    path: str
    revision: str | None = None
    vae: str | None = None
    like: str | None = None
    dtype: torch.dtype = torch.float32
    bits: int | None = None
    autocast: torch.dtype | None = None
    full: bool = False
    sharded: bool = False
    rank: int = 16
    targets: tuple[str, ...] | None = None
    text_encoders: bool = False
    checkpointed: tuple[str, ...] | None = None
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Pass:
    """Samples that go through a network together.

    Attributes:
        name: what for.
        network: which.
        samples: how many at once; with guidance each image is two.
        count: how often in one optimiser step.
        grad: a backward pass follows.
        adapters: the LoRA is on.
        autocast: autocast is on, where the run has it.
        native: at the size that the checkpoint was made for, whatever size is trained.
        split: where images are large, fewer go at once (:func:`diffalign.data.encoding.images_at_once`).
        held: how many of these passes keep their activations at the same time.
    """

    name: str
    network: Network
    samples: int
    count: float = 1.0
    grad: bool = False
    adapters: bool = True
    autocast: bool = True
    native: bool = False
    split: bool = False
    held: int = 1


@dataclass(frozen=True)
class Phase:
    """A part of a run, with what is in memory during it.

    Attributes:
        name: such as "step" or "rollout".
        passes: what goes through networks, one after the other.
        parts: frozen networks that are there.
        in_step: its time belongs to the time of a step.
        before_training: the policy is not made yet.
    """

    name: str
    passes: tuple[Pass, ...]
    parts: frozenset[Part]
    in_step: bool = True
    before_training: bool = False


@dataclass(frozen=True)
class RewardModel:
    """A reward.

    Attributes:
        name: of it.
        weights: bytes.
        offloaded: they leave the card when it does not score.
        judge: it scores held-out images only, between steps.
    """

    name: str
    weights: int
    offloaded: bool
    judge: bool = False


@dataclass(frozen=True)
class Work:
    """A run on one of its devices.

    Attributes:
        model: the networks.
        phases: the parts of the run, in order.
        samples_per_step: of this device: pairs or images of one optimiser step.
        unit: what a sample is called.
        steps: optimiser steps of the run, where they are known.
        frozen_copy: a full fine-tune keeps a copy of the denoiser to compare with.
        copies: slow copies of the trained weights, an EMA included.
        state_bytes: of the optimiser for each trained number.
        rewards: models that score.
        shards: processes that the weights that train are shared out between.
        stay_together: from the forward to the backward pass, once brought together (ZeRO-2).
        offload_idle: VAE and text encoders are on the card only while they work.
    """

    model: Model
    phases: tuple[Phase, ...]
    samples_per_step: int
    unit: str = "sample"
    steps: int | None = None
    frozen_copy: bool = False
    copies: int = 0
    state_bytes: int = 8
    rewards: tuple[RewardModel, ...] = ()
    shards: int = 1
    stay_together: bool = False
    offload_idle: bool = False

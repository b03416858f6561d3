"""The arithmetic of a run, said before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffalign.training.config import TrainingConfig
from diffalign.training.optimizers import state_bytes
from diffalign.training.policy import Policy

if TYPE_CHECKING:
    from diffalign.training.steps import Plan


def estimate_memory(config: TrainingConfig, policy: Policy) -> int:
    """Bytes for weights, gradients and optimiser state on one device; activations come on top."""
    optimizer = state_bytes(config)
    weights = sum(p.numel() * p.element_size() for m in policy.modules.values() for p in m.parameters())
    trained = sum(p.numel() * (p.element_size() + optimizer + 4 * config.use_ema) for p in policy.parameters.values())
    return weights + trained + policy.frozen_bytes


def summarise(config: TrainingConfig, plan: Plan, policy: Policy, facts: Mapping[str, str]) -> str:
    """The lines printed at the start: data, batch, steps, what trains, learning rate, memory, the method's own."""
    processes = policy.accelerator.num_processes
    trained = sum(p.numel() for p in policy.parameters.values())
    total = sum(p.numel() for m in policy.modules.values() for p in m.parameters())
    rate = config.learning_rate * (plan.effective_batch if config.scale_lr else 1)
    what = (
        f"LoRA rank {config.rank}, alpha {policy.spec.alpha or config.rank:g}"
        if config.train_mode == "lora"
        else "all"
    )
    rows = {
        "model": f"{config.pretrained_model_name_or_path} ({policy.family.name}, "
        f"{policy.family.noise_process.prediction_type} prediction)",
        "data": f"{plan.samples:,} samples",
        "batch": f"{plan.effective_batch} = {config.train_batch_size} per process x "
        f"{config.gradient_accumulation_steps} accumulated x {processes} process{'es' if processes > 1 else ''}",
        "steps": f"{plan.steps:,} ({plan.steps * plan.effective_batch / plan.samples:.2f} passes over the data)",
        "trains": f"{trained:,} of {total:,} parameters ({what})",
        "learning rate": f"{rate:g}, {config.lr_scheduler}, {config.lr_warmup_steps} warm-up steps",
        "precision": f"{config.mixed_precision} on {policy.accelerator.device}",
        "memory": f"{estimate_memory(config, policy) / 2**20:,.1f} MiB for weights, gradients and optimiser; "
        "activations come on top",
        **facts,
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:>{width}}  {value}" for name, value in rows.items())

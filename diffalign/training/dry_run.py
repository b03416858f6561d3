"""A trial before a run: one save, one validation image and one step at the largest shape, of which nothing stays.

What would end a run after hours, a card or a disk that is too small, ends it in its first minute instead. The trial
draws from no stream of randomness that the run draws from (all of its randomness is keyed), takes no part in what is
exchanged between processes, and puts weights, optimiser and counters back: the run after it is the same, bit for bit.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.training_utils import free_memory

from diffalign.data.shards import free_space
from diffalign.diffusion.random import key_seed
from diffalign.errors import UserError
from diffalign.training.checkpoints import space_errors
from diffalign.training.optimizers import state_bytes
from diffalign.training.sharding import local, take_apart
from diffalign.training.validation import draw_images

if TYPE_CHECKING:
    from diffalign.training.loop import Trainer

FOLDER = ".dry-run"
_PLAIN = (bool, int, float, str, list, dict, type(None))
_FEW_STEPS = 2


def try_out(trainer: Trainer[Any, Any]) -> str:
    """Make the trial, and return what it found, in a line.

    Raises:
        UserError: out of memory, on any process; or the disk is too small for the run's checkpoints.
    """
    folder = trainer.output_dir / FOLDER
    main = trainer.accelerator.is_main_process
    if main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    phases: dict[str, Callable[[], str]] = {
        "saving": lambda: _save(trainer, folder),
        "validation": lambda: _validate(trainer),
        "the step": lambda: _step(trainer),
    }
    found = []
    try:
        with _untouched(trainer, folder):
            for name, run in phases.items():
                start = time.perf_counter()
                said = _on_every_process(trainer, name, run)
                if said:
                    found.append(f"{name} {time.perf_counter() - start:.1f} s ({said})")
    finally:
        trainer.accelerator.wait_for_everyone()
        if main:
            shutil.rmtree(folder, ignore_errors=True)
    peak = ""
    if trainer.accelerator.device.type == "cuda":
        peak = f"; at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB in tensors"
    return f"dry run: {', '.join(found)}{peak}"


def _on_every_process(trainer: Trainer[Any, Any], phase: str, run: Callable[[], str]) -> str:
    """Run a phase; where it runs out of memory on one process, all say so instead of waiting for it."""
    failed: BaseException | None = None
    said = ""
    try:
        said = run()
    except torch.OutOfMemoryError as error:
        failed = error
    flag = torch.tensor(float(failed is not None), device=trainer.accelerator.device)
    if trainer.accelerator.reduce(flag, "sum") > 0:
        raise trainer.out_of_memory(f"{phase} of the dry run") from failed
    return said


@contextmanager
def _untouched(trainer: Trainer[Any, Any], folder: Path) -> Iterator[None]:
    """Inside, a fresh trainer may take steps; afterwards it is as fresh as before.

    Copies lie in the memory of the machine: on the card they might be what is too much.
    """
    parameters = trainer.parameters()
    weights = [local(p).to("cpu", copy=True) for p in parameters]
    plain = {name: copy.copy(value) for name, value in vars(trainer).items() if isinstance(value, _PLAIN)}
    scaler = trainer.accelerator.scaler
    scale = scaler.state_dict() if scaler is not None else None
    devices = [trainer.accelerator.device] if trainer.accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        take_apart(*trainer.policy.modules.values())
        with torch.no_grad():
            for parameter, kept in zip(parameters, weights, strict=True):
                local(parameter).copy_(kept)
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.optimizer.optimizer.state.clear()
        vars(trainer).update(plain)
        if scale:
            scaler.load_state_dict(scale)
        if any(folder.iterdir()):
            trainer.load_extra(folder)
        free_memory()


def _save(trainer: Trainer[Any, Any], folder: Path) -> str:
    trainer.gather()
    if trainer.accelerator.is_main_process:
        with space_errors(trainer.output_dir):
            trainer._write_state(folder)
    trainer.release()
    trainer.accelerator.wait_for_everyone()
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    _check_space(trainer, size)
    return f"{size / 1e6:.1f} MB a checkpoint"


def _check_space(trainer: Trainer[Any, Any], size: int) -> None:
    """Refuse a run whose checkpoints the disk cannot hold; the optimiser's state is not in the first one yet."""
    config = trainer.config
    if not config.checkpointing_steps:
        return
    size += state_bytes(config) * sum(p.numel() for p in trainer.parameters())
    wanted = -(-trainer.plan.steps // config.checkpointing_steps)
    limit = config.checkpoints_total_limit
    # While one is written, the oldest is still there.
    kept = wanted if limit is None else min(wanted, limit + 1)
    free = free_space(trainer.output_dir)
    if kept * size > free:
        raise UserError(
            f"{kept} checkpoints of {size / 1e6:,.0f} MB do not go into {trainer.output_dir} ({free / 1e6:,.0f} MB "
            "free). Make room, save less often (checkpointing_steps) or keep fewer (checkpoints_total_limit)."
        )


def _validate(trainer: Trainer[Any, Any]) -> str:
    """Draw as many images at once as validation will, in few steps."""
    cases = trainer.validation.cases[: trainer.config.train_batch_size]
    if not cases:
        return ""
    with trainer.accelerator.autocast():
        draw_images(
            trainer.family,
            trainer.policy.modules[trainer.family.denoiser_part],
            replace(trainer.sampling(), num_inference_steps=_FEW_STEPS),
            [prompt for prompt, _ in cases],
            [seed for _, seed in cases],
            batch_size=trainer.config.train_batch_size,
        )
    return f"{len(cases)} image{'s' * (len(cases) > 1)} at once"


def _step(trainer: Trainer[Any, Any]) -> str:
    """Forward, backward, optimiser: on each process alone, so that none waits for one that failed."""
    batch, shape = trainer.batches.trial()
    torch.manual_seed(key_seed(trainer.config.seed, "dry run"))
    with ExitStack() as stack:
        for module in trainer.prepared():
            stack.enter_context(trainer.accelerator.no_sync(module))
        with trainer.accelerator.autocast():
            loss, _ = trainer.compute_loss(batch)
        trainer.accelerator.backward(loss)
    del loss, batch
    # Not finite is nothing to end a run for: real steps look at their gradient, and are skipped.
    trainer.optimizer.step()
    return f"{trainer.config.train_batch_size} at once of {shape}"

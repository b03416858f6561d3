"""The loop under every run that trains something: a diffusion model with a method, or a reward model.

It owns accelerate, accumulation, clipping, the optimiser, checkpoints, exact resume, logging and stopping. What is
trained, on what and how it is saved is said by a subclass. Step s of a run is a function of the weights and s alone,
because all randomness is keyed; so a run resumes from the number of steps done.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Generic, NoReturn, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor, nn

from diffalign.config import save_yaml
from diffalign.diffusion.random import key_seed
from diffalign.errors import DiffalignError
from diffalign.training.batches import Batch, Batches, Plan, StopAsked, Stopped
from diffalign.training.checkpoints import load_state, save_checkpoint
from diffalign.training.config import RunConfig
from diffalign.training.optimizers import build_optimizer, build_schedule
from diffalign.training.processes import Presence, lost_contact, process_group
from diffalign.training.run_folder import open_run_folder
from diffalign.training.run_log import RunLog, tracker_names
from diffalign.training.sharding import check_launch, gradient_norm

logger = logging.getLogger(__name__)

__all__ = ["Batch", "Batches", "Plan", "StepLoop", "StopAsked", "Stopped"]
Config = TypeVar("Config", bound=RunConfig)


class StepLoop(ABC, Generic[Config, Batch]):
    """Runs the steps of a config. A subclass makes its model and :attr:`batches`, and calls :meth:`make_optimizer`."""

    method: ClassVar[str]
    usual_causes: ClassVar[str] = ""
    """Further causes of steps that are not finite, for the error's text: ", a ..."."""
    batches: Batches[Batch]

    def __init__(self, config: Config) -> None:
        check_launch()
        self.config = config
        self.output_dir = Path(config.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=config.mixed_precision,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            log_with=tracker_names(config.report_to) or None,
            project_config=ProjectConfiguration(str(self.output_dir), logging_dir=str(self.output_dir / "logs")),
            kwargs_handlers=[process_group(config.process_timeout)],
        )
        if not self.accelerator.is_main_process:
            logging.getLogger("diffalign").setLevel(logging.ERROR)
        self.presence = Presence(self.output_dir, self.accelerator.process_index, self.accelerator.num_processes)
        self.checkpoint = open_run_folder(config, self.output_dir, self.accelerator)
        set_seed(config.seed)
        if config.allow_tf32:
            torch.backends.cuda.matmul.allow_tf32 = True
        self.step = 0
        self.done = False
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        self._stop_asked = self._stopping = False

    def make_optimizer(self) -> None:
        """Plan the run and make its optimiser and schedule; called when model and batches are there."""
        config = self.config
        self.plan = self._make_plan()
        scale = self.plan.effective_batch if config.scale_lr else 1
        optimizer = build_optimizer(config, self.parameters(), config.learning_rate * scale)
        # Not `prepare`, which under FSDP2 wants the model with it, to share out both.
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.schedule = build_schedule(config, optimizer, self.plan.steps)

    @abstractmethod
    def compute_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of a micro-batch, and metrics to log beside it.

        A metric is a scalar, whose mean over micro-batches and processes is logged; or (sum, count), shape (2,), for
        the mean over what only some samples have. It is left out of a step without any.
        """

    @abstractmethod
    def parameters(self) -> Sequence[nn.Parameter]:
        """What trains, always in the same order."""

    @abstractmethod
    def prepared(self) -> Sequence[nn.Module]:
        """The modules that hold these parameters, as accelerate prepared them."""

    @abstractmethod
    def summary(self) -> str:
        """The lines to print before the first step."""

    @abstractmethod
    def save_weights(self, folder: Path) -> None:
        """Write the weights that train into a checkpoint."""

    @abstractmethod
    def load_weights(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Read them back; ``state`` are the counters of the checkpoint."""

    def before_export(self) -> None:
        """Called on every process when all steps are done and saved, such as to score with all of them."""

    @abstractmethod
    def export(self) -> None:
        """Write the result of the run; on the main process."""

    def train(self) -> Path:
        """Run to the end and return the folder of the run.

        Raises:
            Stopped: SIGTERM came; a checkpoint was saved.
            DiffalignError: too many non-finite steps in a row.
        """
        if self.try_out():
            return self.output_dir
        self._resume()
        log = RunLog(self.accelerator, self.config, self.output_dir, self.plan.steps, self.step)
        if self.accelerator.is_main_process:
            log.say(self.summary())
        try:
            with self._stop_on_sigterm():
                if self.step == 0:
                    self.at_start(log)
                self.before_training(log)
                self._steps(log)
            return self._finish()
        except torch.OutOfMemoryError as error:
            raise self.out_of_memory(f"step {self.step + 1}") from error
        except RuntimeError as error:
            if self.accelerator.num_processes == 1 or not lost_contact(error):
                raise
            raise self.presence.error(error, self.step) from error
        finally:
            log.close()

    def _steps(self, log: RunLog) -> None:
        stream = self.batches.stream(self.step, self.plan.steps)
        while self.step < self.plan.steps and not self.done:
            self.presence.note(self.step)
            try:
                metrics = self.training_step(stream)
            except StopAsked:
                self._stop()
            log.row(self.step, metrics)
            self._check_health(log, metrics)
            if self._stopping and self.may_stop():
                self._stop()
            self.after_step(log, metrics)
            every = self.config.checkpointing_steps
            if every and self.step % every == 0 and self.step < self.plan.steps:
                self._save()
            self.after_saving(log)

    def _stop(self) -> NoReturn:
        path = self._save()
        raise Stopped(
            f"stopped by SIGTERM after step {self.step}; saved {path}. Go on with --resume_from_checkpoint latest."
        )

    def may_stop(self) -> bool:
        """Whether a checkpoint taken now can be resumed from; if not, a run that is asked to stop goes on a little."""
        return True

    def stop_asked(self) -> bool:
        """Whether any process was asked to stop; every process must ask at the same place."""
        flag = torch.tensor(float(self._stop_asked), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def try_out(self) -> bool:
        """Called before all else: a trial of what the run will do, of which nothing stays. True ends the run here."""
        return False

    def out_of_memory(self, phase: str) -> DiffalignError:
        """The error for a device that is too small, in some phase."""
        return DiffalignError(
            f"out of memory on {self.accelerator.device} in {phase}. Use a smaller train_batch_size with more "
            "gradient_accumulation_steps, or gradient_checkpointing."
        )

    def at_start(self, log: RunLog) -> None:
        """Called before the first step of a run; not where it resumes."""

    def before_training(self, log: RunLog) -> None:
        """Called once, before the first step of a run or of what is left of it."""

    def after_step(self, log: RunLog, metrics: Mapping[str, float]) -> None:
        """Called after every step; may set :attr:`done` to end the run early."""

    def after_saving(self, log: RunLog) -> None:
        """Called after every step and after the checkpoint of the step, if one was due."""

    def after_update(self) -> None:
        """Called after every step that changed the weights."""

    def training_step(self, stream: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step on the next batches of the stream; returns its metrics."""
        start = time.perf_counter()
        waited = 0.0
        reports = []
        # Dropout draws from the global stream: keyed by step and process, it is the same after a resume.
        torch.manual_seed(key_seed(self.config.seed, "step", self.step, self.accelerator.process_index))
        for _ in range(self.config.gradient_accumulation_steps):
            asked = time.perf_counter()
            batch = next(stream)
            waited += time.perf_counter() - asked
            with self.accelerator.accumulate(*self.prepared()):
                with self.accelerator.autocast():
                    loss, report = self.compute_loss(batch)
                self.accelerator.backward(loss)
            reports.append({"loss": loss, **report})
        grad_norm = self.accelerator.clip_grad_norm_(self.parameters(), self.config.max_grad_norm)
        metrics = self._reduce(reports, gradient_norm(grad_norm))
        rate = float(self.schedule.get_last_lr()[0])
        self._update(metrics)
        self.step += 1
        seconds = time.perf_counter() - start
        metrics |= {
            "learning_rate": rate,
            "skipped_steps": self.skipped_steps,
            "step_seconds": seconds,
            "data_seconds": waited,
            "samples_per_second": self.plan.effective_batch / seconds,
        }
        return metrics

    def _reduce(self, reports: list[dict[str, Tensor]], grad_norm: Tensor) -> dict[str, float]:
        """Mean over micro-batches and processes, in one exchange."""
        names = list(reports[0])
        local = torch.stack([torch.stack([_sum_and_count(report[name]) for name in names]) for report in reports])
        ends = torch.stack([_sum_and_count(torch.as_tensor(x)) for x in (grad_norm, float(self._stop_asked))])
        row = torch.cat([local.mean(0), ends.to(local.device)])
        sums, counts = self.accelerator.reduce(row, "mean").unbind(1)
        means = zip([*names, "grad_norm", "stop"], (sums / counts).tolist(), counts.tolist(), strict=True)
        metrics = {name: mean for name, mean, count in means if count > 0}
        self._stopping = metrics.pop("stop") > 0
        return metrics

    def _update(self, metrics: dict[str, float]) -> None:
        """Step the optimiser, unless loss or gradient is not finite: then the weights stay as they are."""
        finite = math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])
        scaled = self.accelerator.scaler is not None
        if finite or scaled:
            # With fp16 the scaler itself skips a step whose gradient overflowed, and lowers its scale.
            self.optimizer.step()
            finite = finite and not self.accelerator.optimizer_step_was_skipped
        self.optimizer.zero_grad()
        # The schedule counts skipped steps too: the run keeps its length.
        self.schedule.step()
        if finite:
            self.skipped_in_a_row = 0
            self.after_update()
        else:
            self.skipped_steps += 1
            self.skipped_in_a_row += 1

    def _check_health(self, log: RunLog, metrics: dict[str, float]) -> None:
        if not self.skipped_in_a_row:
            return
        what = f"step {self.step} skipped: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}"
        log.say(f"{what} (non-finite; the weights were not touched; {self.skipped_steps} skipped so far)")
        if self.skipped_in_a_row >= self.config.max_nonfinite_steps:
            raise DiffalignError(
                f"{self.skipped_in_a_row} steps in a row were not finite (last: {what}). The weights are those of the "
                f"last good step. Usual causes: learning_rate too high, fp16 overflow (use bf16){self.usual_causes}. "
                "Lower the learning rate and resume from the last checkpoint."
            )

    def _make_plan(self) -> Plan:
        config = self.config
        batch = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        steps = config.max_train_steps or max(1, math.ceil(config.num_train_epochs * self.batches.samples / batch))
        return Plan(self.batches.samples, batch, steps)

    @contextmanager
    def _stop_on_sigterm(self) -> Iterator[None]:
        def ask(signum: int, frame: Any) -> None:
            self._stop_asked = True

        try:
            before = signal.signal(signal.SIGTERM, ask)
        except ValueError:  # Not in the main thread, as in a notebook's worker: signals are not ours to handle.
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _save(self) -> Path | None:
        """Write ``checkpoint-<step>`` from the main process; the others wait."""
        path = None
        self.gather()
        if self.accelerator.is_main_process:
            path = save_checkpoint(
                self.output_dir, self.step, self.counters(), self._write_state, self.config.checkpoints_total_limit
            )
        self.release()
        self.accelerator.wait_for_everyone()
        return path

    def gather(self) -> None:
        """Called on every process before the main one saves or exports."""

    def release(self) -> None:
        """Called on every process after that."""

    def optimizer_state(self) -> dict[str, Any]:
        """The optimiser's state with whole tensors, for the main process to save."""
        state: dict[str, Any] = self.optimizer.state_dict()
        return state

    def load_optimizer(self, state: dict[str, Any]) -> None:
        """Read back what :meth:`optimizer_state` gave."""
        self.optimizer.load_state_dict(state)

    def counters(self) -> dict[str, Any]:
        """What a checkpoint's state file says; JSON-able."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "method": self.method,
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self.skipped_in_a_row,
            "scaler": scaler.state_dict() if scaler else None,
            "effective_batch": self.plan.effective_batch,
        }

    def _write_state(self, folder: Path) -> None:
        """Write all that a checkpoint holds but its counters."""
        self.save_weights(folder)
        torch.save(self.optimizer_state(), folder / "optimizer.pt")
        torch.save(self.schedule.state_dict(), folder / "scheduler.pt")
        save_yaml(self.config, folder / "config.yaml")
        self.save_extra(folder)

    def save_extra(self, folder: Path) -> None:
        """Write what a method must have to resume, beside the weights and the optimiser, on the main process."""

    def load_extra(self, folder: Path) -> None:
        """Read what :meth:`save_extra` wrote; :attr:`step` is set."""

    def _resume(self) -> None:
        if self.checkpoint is None:
            return
        state = load_state(self.checkpoint)
        self.load_weights(self.checkpoint, state)
        options: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
        self.load_optimizer(torch.load(self.checkpoint / "optimizer.pt", **options))
        self.schedule.load_state_dict(torch.load(self.checkpoint / "scheduler.pt", **options))
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.skipped_steps, self.skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self.load_extra(self.checkpoint)
        if state["effective_batch"] != self.plan.effective_batch:
            logger.warning(
                "resuming with an effective batch of %d where the run had %d: the order of the data changes here",
                self.plan.effective_batch,
                state["effective_batch"],
            )
        logger.info("resumed from %s at step %d", self.checkpoint, self.step)

    def _finish(self) -> Path:
        if self.config.checkpointing_steps:
            self._save()
        self.before_export()
        self.gather()
        if self.accelerator.is_main_process:
            self.export()
            if self.config.push_to_hub:
                from diffalign.training.hub import push

                push(self.config, self.output_dir)
        self.release()
        self.accelerator.wait_for_everyone()
        self.presence.leave()
        return self.output_dir


def _sum_and_count(metric: Tensor) -> Tensor:
    """(2,), float32; a scalar is a sum over one."""
    value = metric.detach().float()
    return value if value.ndim else torch.stack([value, torch.ones_like(value)])

"""The policy (what trains) and its reference (what it started from).

With a LoRA both share the base weights: the reference is the same network with its adapters off. In full fine-tuning
the reference is a frozen copy, made only for methods that need one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffalign.diffusion.random import key_seed
from diffalign.errors import UserError
from diffalign.pipelines.base import Family
from diffalign.pipelines.lora import LoraSpec, adapters_off, add_lora, load_lora_state, lora_parameters, save_lora
from diffalign.training.config import TrainingConfig
from diffalign.training.sharding import check_sharded, gathered, is_sharded, local, part_of, shard, take_apart
from diffalign.training.speed import SameGraph, checkpoint_activations, speed_up

WEIGHTS_FILE = "policy.safetensors"
EMA_FILE = "ema.safetensors"
COPY_FILE = "copy-{}.safetensors"
_START = "start"


class Policy:
    """The networks that train.

    Args:
        family: the model; its denoiser (and text encoders) get the adapters.
        config: what to train.
        accelerator: prepares the networks for the device and processes.
        needs_reference: keep a frozen copy in full fine-tuning.
    """

    def __init__(
        self, family: Family, config: TrainingConfig, accelerator: Accelerator, needs_reference: bool
    ) -> None:
        self.family, self.config, self.accelerator = family, config, accelerator
        self.spec = LoraSpec(
            rank=config.rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=tuple(config.lora_targets) if config.lora_targets else None,
        )
        self._part = family.denoiser_part
        self.modules: dict[str, nn.Module] = {self._part: family.denoiser}
        self._frozen: nn.Module | None = None
        if config.train_mode == "lora":
            if config.train_text_encoder:
                self.modules |= family.text_encoders
            self._add_adapters()
            if config.initial_lora:
                self._check_parts(load_lora_state(family, config.initial_lora))
        else:
            family.denoiser.to(torch.float32)
            if needs_reference:
                self._frozen = copy.deepcopy(family.denoiser).requires_grad_(False).to(accelerator.device)
            family.denoiser.requires_grad_(True)
        self._apply_options()
        self.sharded = is_sharded(accelerator)
        self._whole: dict[str, list[Tensor]] = {}
        if self.sharded:
            check_sharded(config)
            for module in (family.denoiser, self._frozen):
                if module is not None:
                    shard(module, accelerator, family.shard_blocks, trains=module is not self._frozen)
            self.prepared = dict(self.modules)
        else:
            self.prepared = {name: accelerator.prepare(module) for name, module in self.modules.items()}
        self.copies: dict[str, list[Tensor]] = {}
        if config.initial_lora and config.reference == "start" and needs_reference:
            self.add_copy(_START)
        self.ema: EMAModel | None = None
        if config.use_ema:
            self.ema = EMAModel(self.parameters.values(), decay=config.ema_decay, use_ema_warmup=True, power=0.75)

    def _add_adapters(self) -> None:
        for name, module in self.modules.items():
            own = name == self._part
            add_lora(
                module,
                self.spec if own else replace(self.spec, targets=None),
                targets=self.family.lora_targets if own else self.family.text_lora_targets,
                # The initial weights must not depend on what was drawn from the global stream before.
                seed=key_seed(self.config.seed, "lora", name),
            )

    def _check_parts(self, read: tuple[str, ...]) -> None:
        """What is read from a LoRA must be what trains; other parts would be in no checkpoint."""
        if set(read) != set(self.modules):
            raise UserError(
                f"initial_lora {self.config.initial_lora} is a LoRA of {', '.join(read)}, and this run trains one of "
                f"{', '.join(self.modules)}. Set train_text_encoder as it was trained with."
            )

    def _apply_options(self) -> None:
        for module in self.modules.values():
            module.to(self.accelerator.device)
            module.train()
            if self.config.gradient_checkpointing:
                own = module is self.family.denoiser
                checkpoint_activations(module, self.config.checkpointed_blocks if own else None)
        for denoiser in (self.family.denoiser, self._frozen):
            if denoiser is not None:
                speed_up(denoiser, self.config)

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser to call for the policy's prediction."""
        return self.prepared[self._part]

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """What trains, by name ("unet.<...>")."""
        if self.config.train_mode == "full":
            return {
                f"{self._part}.{name}": p for name, p in self.modules[self._part].named_parameters() if p.requires_grad
            }
        return {
            f"{part}.{name}": parameter
            for part, module in self.modules.items()
            for name, parameter in lora_parameters(module).items()
        }

    @property
    def frozen_bytes(self) -> int:
        """Memory of the frozen copy; 0 where the reference shares the base weights."""
        return 0 if self._frozen is None else sum(p.numel() * p.element_size() for p in self._frozen.parameters())

    @contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The reference denoiser, without gradients; text encoders are the reference's too inside.

        The adapters are off inside (or hold the weights that the run started from) and on again afterwards, whatever
        happens. Call it before the policy's own forward pass of a step, not between that and its backward pass.
        """
        if _START in self.copies:
            with self.evaluating(), self.copy_weights(_START) as denoiser:
                yield denoiser
            return
        with torch.no_grad(), ExitStack() as stack:
            if self.config.train_mode == "lora" and self.config.compile_repeated_blocks:
                yield stack.enter_context(self._holding(self._base_weights()))
            elif self.config.train_mode == "lora":
                for module in self.modules.values():
                    stack.enter_context(adapters_off(module))
                yield self.modules[self._part]
            elif self._frozen is not None:
                yield self._as_in_training(self._frozen)
            else:
                raise RuntimeError("this method asked for no reference, so none was kept")

    @contextmanager
    def base(self) -> Iterator[nn.Module]:
        """The base model's denoiser, for drawing. A full fine-tune that keeps no reference has it only at step 0."""
        if self.config.train_mode == "full":
            yield self.modules[self._part] if self._frozen is None else self._frozen
            return
        with torch.no_grad(), ExitStack() as stack:
            for module in self.modules.values():
                stack.enter_context(adapters_off(module))
            yield self.modules[self._part]

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """The EMA's weights in place of the trained ones, where there is an EMA."""
        if self.ema is None:
            yield
            return
        parameters = list(self.parameters.values())
        take_apart(*self.modules.values())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            take_apart(*self.modules.values())
            self.ema.restore(parameters)

    def add_copy(self, name: str) -> None:
        """Keep a slow copy of the trained weights under a name ("old", "ema"), equal to them now."""
        self.copies[name] = [p.detach().clone() for p in self.parameters.values()]

    def update_copy(self, name: str, decay: float) -> None:
        """``copy = decay * copy + (1 - decay) * weights``; 0 takes the weights as they are."""
        torch._foreach_lerp_(self.copies[name], [p.detach() for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def copy_weights(self, name: str) -> Iterator[nn.Module]:
        """The denoiser with a copy's weights, without gradients; the trained ones are back afterwards."""
        with self._holding(self.copies[name]) as denoiser:
            yield denoiser

    def recomputed(self, predict: Callable[[nn.Module], Tensor]) -> Tensor:
        """``predict(denoiser)``, run once more in the backward pass instead of keeping its activations until then."""
        # The second call must not go through the wrapper of several processes: that takes every call for the start of
        # a new step.
        networks = iter([self.denoiser])

        def run() -> Tensor:
            return predict(next(networks, self.modules[self._part]))

        prediction: Tensor = checkpoint(run, use_reentrant=False)
        return prediction

    def _base_weights(self) -> list[Tensor]:
        """Values of the trained LoRA with which the network is the base model."""
        named = self.parameters.items()
        return [torch.zeros_like(p) if ".lora_B." in name else p.detach() for name, p in named]

    @contextmanager
    def _holding(self, values: Sequence[Tensor]) -> Iterator[nn.Module]:
        parameters = list(self.parameters.values())
        if self.sharded:
            with self._copied_in(parameters, values):
                yield self._as_in_training(self.modules[self._part])
            return
        own = [p.data for p in parameters]
        with torch.no_grad():
            # Tensors change places and nothing is copied: in full fine-tuning this is the whole model, each step.
            _put(parameters, values)
            try:
                yield self._as_in_training(self.modules[self._part])
            finally:
                _put(parameters, own)

    @contextmanager
    def _copied_in(self, parameters: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
        """Other values in the parameters' own memory: FSDP knows the weights by it."""
        own = [local(p).clone() for p in parameters]
        with torch.no_grad():
            take_apart(*self.modules.values())
            torch._foreach_copy_([local(p) for p in parameters], [local(value) for value in values])
            try:
                yield
            finally:
                take_apart(*self.modules.values())
                torch._foreach_copy_([local(p) for p in parameters], own)

    def _as_in_training(self, denoiser: nn.Module) -> nn.Module:
        return SameGraph(denoiser) if self.config.compile_repeated_blocks else denoiser

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The networks in evaluation mode (LoRA dropout off) inside."""
        modes = [(module, module.training) for module in self.modules.values()]
        for module, _ in modes:
            module.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.train(training)

    def update_ema(self) -> None:
        """Take the step just made into the average."""
        if self.ema is not None:
            self.ema.to(self.accelerator.device)
            self.ema.step(self.parameters.values())

    def gather(self) -> None:
        """Before saving, on every process: where weights are shared out, bring them together for the main process."""
        if not self.sharded:
            return
        keep = self.accelerator.is_main_process
        kept = {"weights": list(self.parameters.values()), **{f"copy {n}": v for n, v in self.copies.items()}}
        if self.ema is not None:
            kept["ema"] = list(self.ema.shadow_params)
        self._whole = {name: gathered(values, keep) for name, values in kept.items()}

    def release(self) -> None:
        """After saving: let go of what :meth:`gather` brought together."""
        self._whole = {}

    def _saved(self, name: str, values: Iterable[Tensor]) -> dict[str, Tensor]:
        """Values of the trained weights by their names, whole and on the CPU."""
        if self.sharded:
            values = self._whole[name]
        return {key: v.detach().cpu().contiguous() for key, v in zip(self.parameters, values, strict=True)}

    def save_state(self, folder: Path) -> dict[str, int]:
        """Write the exact trained weights (and EMA) for resuming; return the counters that go with them."""
        save_file(self._saved("weights", self.parameters.values()), folder / WEIGHTS_FILE)
        for copy_name, values in self.copies.items():
            save_file(self._saved(f"copy {copy_name}", values), folder / COPY_FILE.format(copy_name))
        if self.ema is None:
            return {}
        save_file(self._saved("ema", self.ema.shadow_params), folder / EMA_FILE)
        return {"ema_steps": self.ema.optimization_step}

    def load_state(self, folder: Path, counters: dict[str, int]) -> None:
        """Read back what :meth:`save_state` wrote.

        Raises:
            UserError: the checkpoint trained other weights than this run would.
        """
        parameters = self.parameters
        stored = load_file(folder / WEIGHTS_FILE)
        if {n: p.shape for n, p in stored.items()} != {n: p.shape for n, p in parameters.items()}:
            raise UserError(
                f"{folder} holds other weights than this configuration trains ({len(stored)} tensors there, "
                f"{len(parameters)} here). Resume with the same model, train_mode, rank and lora_targets."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                local(parameter).copy_(local(part_of(stored[name], parameter)))
            for copy_name, values in self.copies.items():
                file = folder / COPY_FILE.format(copy_name)
                if not file.is_file():
                    raise UserError(
                        f"{folder} has no copy {copy_name!r} of the weights, which these settings need. Resume with "
                        "the settings it was made with, or start a new run."
                    )
                kept = load_file(file)
                for value, name in zip(values, parameters, strict=True):
                    local(value).copy_(local(part_of(kept[name], value)))
            if self.ema is not None:
                if not (folder / EMA_FILE).is_file():
                    raise UserError(f"{folder} has no EMA. Resume with use_ema off, or start a new run.")
                shadow = load_file(folder / EMA_FILE)
                for average, name in zip(self.ema.shadow_params, parameters, strict=True):
                    local(average).copy_(local(part_of(shadow[name], average)))
                self.ema.optimization_step = counters["ema_steps"]

    def export(self, folder: Path, comfyui: bool = False) -> list[Path]:
        """Write what users load: the LoRA (in one or two layouts), or the whole denoiser as a folder."""
        if self.sharded:
            return [self._export_gathered(folder / self._part)]
        with self.ema_weights():
            if self.config.train_mode == "full":
                self.family.denoiser.save_pretrained(folder / self._part)
                return [folder / self._part]
            texts = self.config.train_text_encoder
            written = [save_lora(self.family, folder, text_encoders=texts)]
            if comfyui:
                written.append(save_lora(self.family, folder, text_encoders=texts, layout="kohya"))
            return written

    def _export_gathered(self, folder: Path) -> Path:
        """The denoiser of what was gathered, in a network of its own: the live one has only a part of its weights."""
        live = self.family.denoiser
        with torch.device("meta"):
            network = self.family.denoiser_class.from_config(live.config)  # type: ignore[attr-defined]
        values = self._whole["ema" if self.ema is not None else "weights"]
        named = {n.removeprefix(f"{self._part}."): v for n, v in zip(self.parameters, values, strict=True)}
        network.load_state_dict(named, assign=True)
        network.save_pretrained(folder)
        return folder


def _put(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Other values into parameters, without a copy."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.data = value
    # Autocast keeps what it has rounded by parameter, and would go on with the values of before.
    torch.clear_autocast_cache()

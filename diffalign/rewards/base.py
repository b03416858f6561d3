"""The contract of a reward: images (and prompts) in, one float32 score an image out, or an error. Never a silent 0.

A reward of one's own is a subclass of :class:`Reward` with a ``score``, or just a function
``f(images, prompts, metadata)``: see :func:`diffalign.rewards.registry.load_reward`.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError, did_you_mean
from diffalign.rewards.identity import code_of, describe, digest, options_of
from diffalign.rewards.inputs import (
    GroupIds,
    Images,
    Metadata,
    as_dtype,
    as_group_ids,
    as_pictures,
    as_prompts,
    as_rows,
    as_tensors,
    device_of,
)
from diffalign.rewards.output import RewardError, RewardOutput, Scores, as_output, merge

__all__ = [
    "FunctionReward",
    "GroupIds",
    "Images",
    "Metadata",
    "Reward",
    "RewardCard",
    "RewardError",
    "RewardOutput",
    "Scores",
]

logger = logging.getLogger(__name__)

OFFLOAD = ("none", "cpu_between_calls")


@dataclass(frozen=True)
class RewardCard:
    """What there is to know about a reward before it is loaded. Fields as the attributes of :class:`Reward`."""

    name: str
    summary: str = ""
    scale: str = "unbounded"
    typical: tuple[float, float] | None = None
    differentiable: bool = False
    uses_prompt: bool = True
    mode: str = "pointwise"
    input_size: int | None = None
    memory_gb: float | None = None
    licence: str = ""
    hacks: tuple[str, ...] = ()


class Reward(ABC):
    """Scores images.

    A subclass says in attributes what it is and implements :meth:`score`; :meth:`load` if it has a model.

    Attributes:
        name, version: both go with every stored score; the version changes when the same image would score otherwise.
        summary: one line on what a high score means.
        differentiable: ``score`` keeps the gradient with respect to the images.
        uses_prompt: prompts must be given.
        required_metadata: keys that each image's metadata must have.
        mode: "pointwise": the score of an image does not depend on the others of the call. "groupwise": it depends on
            those of its group, which are always scored together.
        scale: "bt_logit" (a difference d is preferred with probability sigmoid(d)), "cosine", "rating", "probability"
            or "unbounded".
        typical: range of usual mean scores; a mean outside is warned of once, since wrong preprocessing shows so.
        input_size: side in pixels that images are resized to, None for any.
        takes: what ``score`` is given: "tensor" (float (n, 3, H, W) in [0, 1]) or "pil" (a list of RGB images).
        memory_gb: of the published weights in half precision, in GB; None where there are none to speak of.
        licence: of the published weights, or of the code where there are none.
        hacks: how training on it is known to go wrong, a short sentence each.
        weights: names of instance attributes that hold the file, folder or hub id of what the scores depend on.
        batch_size: images given to ``score`` at once; scores do not depend on it.
        scoring: of the last call, which images were in the last batch given to ``score``: after an exception, those
            that it was about.
    """

    name: str = ""
    version: str = "1"
    summary: str = ""
    differentiable: bool = False
    uses_prompt: bool = True
    required_metadata: tuple[str, ...] = ()
    mode: Literal["pointwise", "groupwise"] = "pointwise"
    scale: Literal["bt_logit", "cosine", "rating", "probability", "unbounded"] = "unbounded"
    typical: tuple[float, float] | None = None
    input_size: int | None = None
    takes: Literal["tensor", "pil"] = "tensor"
    memory_gb: float | None = None
    licence: str = ""
    hacks: tuple[str, ...] = ()
    weights: tuple[str, ...] = ("checkpoint", "processor", "tower_path")

    _arguments: tuple[tuple[Any, ...], dict[str, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        made = super().__new__(cls)
        made._arguments = (args, kwargs)  # the identity depends on them, whatever a subclass makes of them
        return made

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = torch.float32,
        batch_size: int = 32,
        offload: Literal["none", "cpu_between_calls"] = "none",
    ) -> None:
        """
        Args:
            device: where the models run; a GPU if there is one by default.
            dtype: of the models, also by name (fp16); scores are float32 whatever it is.
            batch_size: images given to ``score`` at once.
            offload: "cpu_between_calls" moves the models to the CPU after each call and back for the next.

        Raises:
            UserError: batch_size below 1, or an unknown dtype or offload.
        """
        if batch_size < 1:
            raise UserError(f"batch_size of the reward {self.name} must be at least 1, got {batch_size}")
        if offload not in OFFLOAD:
            raise UserError(
                f"offload of the reward {self.name} is {offload!r}.{did_you_mean(offload, OFFLOAD)} "
                f"Choose one of {', '.join(OFFLOAD)}."
            )
        self.device = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = as_dtype(dtype, self.name)
        self.batch_size = batch_size
        self.offload = offload
        self.scoring: list[int] = []
        self._loaded = False
        self._warned = False
        self._identity = ""

    @abstractmethod
    def score(self, images: Any, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Scores:
        """Score a small batch of images of one size.

        A groupwise reward is also given ``group_ids``, a list of ints, and gets whole groups.

        Args:
            images: as :attr:`takes` says; a tensor is float32 on :attr:`device`.
            prompts: one for each image; "" where none were given.
            metadata: one for each image; empty where none was given.

        Returns:
            (n,) scores, or these and named details of each image; or a :class:`RewardOutput`, where some images cannot
            be scored: ``valid`` False, and a message that says why.
        """

    def check_prompts(self, prompts: Sequence[str]) -> None:  # noqa: B027
        """Raise a UserError for prompts that this reward cannot judge; called before any image is drawn or scored."""

    def load(self) -> None:  # noqa: B027
        """Read the model. Called once, before the first batch."""

    def prepare(self) -> None:
        """Load the model now, if it is not there; otherwise the first call does."""
        if not self._loaded:
            self.load()
            self._loaded = True

    def close(self) -> None:
        """Let the models go; they are loaded again when next needed."""
        for name, value in list(vars(self).items()):
            if isinstance(value, nn.Module):
                delattr(self, name)
        self._loaded = False
        _empty_cache(self.device)

    def to(self, device: torch.device | str) -> Reward:
        """Move the models. Returns self."""
        self.device = torch.device(device)
        self._move_models(self.device)
        return self

    def park(self) -> None:
        """Move the models to the CPU, whatever ``offload`` says; the next call brings them back."""
        self._move_models(torch.device("cpu"))
        _empty_cache(self.device)

    def _move_models(self, device: torch.device) -> None:
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(device)

    @property
    def identity(self) -> str:
        """``name/version/fingerprint``: equal for scorers that give equal scores, kept with every stored score.

        The fingerprint is of the options given, of the dtype, of the weights (local ones by content, those of the hub
        by id and revision), and of the code of a reward that is not part of diffalign. It is taken once.
        """
        if not self._identity:
            kind = type(self)
            parts: dict[str, Any] = {"dtype": str(self.dtype)}
            parts["options"] = describe(options_of(kind, *self._arguments))
            parts["weights"] = {name: describe(getattr(self, name)) for name in self.weights if hasattr(self, name)}
            if not kind.__module__.startswith("diffalign."):
                parts["code"] = code_of(kind)
            self._identity = f"{self.name}/{self.version}/{digest(parts)}"
        return self._identity

    @classmethod
    def card(cls, name: str = "") -> RewardCard:
        """What is known about it without loading it; ``name`` where the registry knows it by another one."""
        known = {key: getattr(cls, key) for key in RewardCard.__dataclass_fields__}
        known["name"] = name or cls.name
        known["summary"] = cls.summary or (cls.__doc__ or "").strip().partition("\n")[0]
        return RewardCard(**known)

    def __call__(
        self,
        images: Images,
        prompts: Sequence[str] | str | None = None,
        metadata: Metadata | None = None,
        *,
        group_ids: GroupIds | None = None,
        grad: bool = False,
    ) -> RewardOutput:
        """Score N images.

        Args:
            images: float tensor (N, 3, H, W) in [0, 1], or uint8; or a list of PIL images or of tensors (3, H, W),
                of any sizes.
            prompts: N prompts, or one for all.
            metadata: N mappings.
            group_ids: (N,) whole numbers, equal for the images of one group; only a groupwise reward needs them.
            grad: keep the gradient with respect to the images. The models then stay on their device, whatever
                ``offload`` says, since the backward pass needs them there.

        Returns:
            Scores on the device of the images; on the CPU for PIL images.

        Raises:
            UserError: the images are not in range or not of this form, or numbers do not fit; before a model is run.
            TypeError: ``grad`` for a reward that is not differentiable.
            RewardError: the reward returned something that is no score. Any other exception of the reward is passed on
                as it is: see :mod:`diffalign.rewards.failures` for what to do about them.
        """
        if grad and not self.differentiable:
            raise TypeError(f"the reward {self.name} is not differentiable: no gradient can pass through it")
        if isinstance(images, Image.Image):
            raise UserError(f"the reward {self.name} takes a list of PIL images, got a single one")
        count, self.scoring = len(images), list(range(len(images)))
        texts = as_prompts(prompts, count, self.name, needed=self.uses_prompt)
        rows = as_rows(metadata, count, self.name, self.required_metadata)
        groups = as_group_ids(group_ids, count, self.name, needed=self.mode == "groupwise")
        ready = (as_tensors if self.takes == "tensor" else as_pictures)(images, self.name)
        target = device_of(images)
        if not count:
            return RewardOutput(torch.zeros(0, device=target), valid=torch.ones(0, dtype=torch.bool, device=target))
        batch = _Batch(ready, texts, rows, groups if self.mode == "groupwise" else None)
        if not self._loaded:
            self.prepare()
        elif self.offload != "none":
            self._move_models(self.device)
        try:
            self.check_prompts(texts)
            with torch.set_grad_enabled(grad), torch.autocast(self.device.type, enabled=False):
                output = self._in_batches(batch, target)
        finally:
            if self.offload != "none" and not grad:
                self.park()
        self._check(output)
        return output

    def _in_batches(self, batch: _Batch, target: torch.device) -> RewardOutput:
        """Score images of one size together, at most ``batch_size`` at once, and put the scores back in order.

        A group is never divided: one larger than ``batch_size`` is a batch of its own.
        """
        order: list[int] = []
        parts: list[RewardOutput] = []
        todo = batch.units(self.name, by_size=self.takes == "tensor")
        while todo:
            units = todo[0]
            taken = _fitting(units, self.batch_size)
            now = self.scoring = [index for unit in units[:taken] for index in unit]
            try:
                part = self._score(now, batch)
            except torch.cuda.OutOfMemoryError:
                if taken == 1:
                    raise
                self.batch_size = math.ceil(len(now) / 2)
                logger.warning("%s: out of memory, going on with batches of %d", self.name, self.batch_size)
                torch.cuda.empty_cache()
                continue
            parts.append(part)
            order += now
            todo[0] = units[taken:]
            if not todo[0]:
                todo.pop(0)
        self.scoring = list(range(len(order)))
        return merge(parts, order, target, self.name)

    def _score(self, indices: list[int], batch: _Batch) -> RewardOutput:
        chosen: Any = [batch.images[i] for i in indices]
        if self.takes == "tensor":
            chosen = torch.stack(chosen).to(self.device)
        texts, rows = [batch.texts[i] for i in indices], [batch.rows[i] for i in indices]
        extra = {} if batch.groups is None else {"group_ids": [batch.groups[i] for i in indices]}
        return as_output(self.score(chosen, texts, rows, **extra), len(indices), self.name, self.device)

    def _check(self, output: RewardOutput) -> None:
        bad = (~torch.isfinite(output.rewards) & output.valid).nonzero().flatten().tolist()
        if bad:
            self.scoring = bad
            raise RewardError(
                f"the reward {self.name} scored image {bad[0]} as {output.rewards[bad[0]].item()} "
                f"({len(bad)} of {len(output.rewards)} scores are not finite)"
            )
        if not self.typical or self._warned or not output.valid.any():
            return
        mean = output.rewards[output.valid].mean().item()
        if not self.typical[0] <= mean <= self.typical[1]:
            self._warned = True
            logger.warning(
                "%s: a mean score of %.3g is outside its usual range %g to %g. Are the images RGB in [0, 1]? Is it "
                "the right checkpoint?",
                self.name,
                mean,
                *self.typical,
            )


class FunctionReward(Reward):
    """A plain function ``f(images, prompts, metadata)`` as a reward.

    It gets float images (n, 3, H, W) in [0, 1] and returns n scores as a tensor, array or list; or a pair of these and
    a mapping of named details; or a :class:`RewardOutput`.
    """

    def __init__(self, function: Any, name: str | None = None, **options: Any) -> None:
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        self.summary = (getattr(function, "__doc__", None) or "").strip().partition("\n")[0]
        super().__init__(**options)
        self.function = function

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Scores:
        result: Scores = self.function(images, prompts, metadata)
        return result


@dataclass(frozen=True)
class _Batch:
    """What one call was given; lists of N."""

    images: list[Any]
    texts: list[str]
    rows: list[Mapping[str, Any]]
    groups: list[int] | None

    def units(self, name: str, *, by_size: bool) -> list[list[list[int]]]:
        """Indices that go together, an image or a group each, in lists of units of one size."""
        together: dict[int, list[int]] = {}
        for index in range(len(self.images)):
            together.setdefault(index if self.groups is None else self.groups[index], []).append(index)
        sizes: dict[tuple[int, ...], list[list[int]]] = {}
        for group, unit in together.items():
            shapes = {tuple(self.images[index].shape) if by_size else () for index in unit}
            if len(shapes) > 1:
                raise UserError(f"group {group} for the reward {name} has images of several sizes: {sorted(shapes)}")
            sizes.setdefault(shapes.pop(), []).append(unit)
        return list(sizes.values())


def _fitting(units: list[list[int]], batch_size: int) -> int:
    """How many units of the front fit into a batch: at least one."""
    total, taken = 0, 0
    while taken < len(units) and (not taken or total + len(units[taken]) <= batch_size):
        total += len(units[taken])
        taken += 1
    return taken


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()

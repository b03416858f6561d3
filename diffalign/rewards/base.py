"""The contract of a reward: images (and prompts) in, one float32 score an image out, or an error. Never a silent 0.

A reward of one's own is a subclass of :class:`Reward` with a ``score``, or just a function
``f(images, prompts, metadata)``: see :func:`diffalign.rewards.registry.load_reward`.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import DiffalignError, UserError

logger = logging.getLogger(__name__)

Images: TypeAlias = Tensor | Sequence[Image.Image] | Sequence[Tensor]
Metadata: TypeAlias = Sequence[Mapping[str, Any]]
Scores: TypeAlias = Tensor | tuple[Tensor, Mapping[str, Tensor]]
_SLACK = 0.01


class RewardError(DiffalignError):
    """A reward could not score an image, or returned what is no score."""


@dataclass
class RewardOutput:
    """Scores of N images.

    Attributes:
        rewards: (N,) float32; NaN where ``valid`` is False.
        details: further values of each image by name, (N,) or (N, K) float32.
        valid: (N,) bool.
        messages: for each image why it has no score, or None.
    """

    rewards: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)
    valid: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool))
    messages: list[str | None] = field(default_factory=list)


class Reward(ABC):
    """Scores images.

    A subclass says in attributes what it is and implements :meth:`score`; :meth:`load` if it has a model.

    Attributes:
        name, version: both go with every stored score; the version changes when the same image would score otherwise.
        summary: one line on what a high score means.
        differentiable: ``score`` keeps the gradient with respect to the images.
        uses_prompt: prompts must be given.
        required_metadata: keys that each image's metadata must have.
        mode: "pointwise": the score of an image does not depend on the others of the call.
        scale: "bt_logit" (a difference d is preferred with probability sigmoid(d)), "cosine", "rating", "probability"
            or "unbounded".
        typical: range of usual mean scores; a mean outside is warned of once, since wrong preprocessing shows so.
        input_size: side in pixels that images are resized to, None for any.
        takes: what ``score`` is given: "tensor" (float (n, 3, H, W) in [0, 1]) or "pil" (a list of RGB images).
        batch_size: images given to ``score`` at once; scores do not depend on it.
    """

    name: str = ""
    version: str = "1"
    summary: str = ""
    differentiable: ClassVar[bool] = False
    uses_prompt: ClassVar[bool] = True
    required_metadata: tuple[str, ...] = ()
    mode: ClassVar[Literal["pointwise"]] = "pointwise"
    scale: ClassVar[Literal["bt_logit", "cosine", "rating", "probability", "unbounded"]] = "unbounded"
    typical: tuple[float, float] | None = None
    input_size: int | None = None
    takes: ClassVar[Literal["tensor", "pil"]] = "tensor"

    def __init__(
        self,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        batch_size: int = 32,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"batch_size of the reward {self.name} must be at least 1, got {batch_size}")
        self.device = torch.device(device) if device else torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype
        self.batch_size = batch_size
        self._loaded = False
        self._warned = False

    @abstractmethod
    def score(self, images: Any, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Scores:
        """Score a small batch of images of one size.

        Args:
            images: as :attr:`takes` says; a tensor is float32 on :attr:`device`.
            prompts: one for each image; "" where none were given.
            metadata: one for each image; empty where none was given.

        Returns:
            (n,) scores, or these and named details of each image.
        """

    def check_prompts(self, prompts: Sequence[str]) -> None:  # noqa: B027
        """Raise a UserError for prompts that this reward cannot judge; called before any image is drawn or scored."""

    def load(self) -> None:  # noqa: B027
        """Read the model. Called once, before the first batch."""

    def close(self) -> None:
        """Let the models go; they are loaded again when next needed."""
        for name, value in list(vars(self).items()):
            if isinstance(value, nn.Module):
                delattr(self, name)
        self._loaded = False
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def to(self, device: torch.device | str) -> Reward:
        """Move the models. Returns self."""
        self.device = torch.device(device)
        for value in vars(self).values():
            if isinstance(value, nn.Module):
                value.to(self.device)
        return self

    def __call__(
        self,
        images: Images,
        prompts: Sequence[str] | str | None = None,
        metadata: Metadata | None = None,
        *,
        grad: bool = False,
    ) -> RewardOutput:
        """Score N images.

        Args:
            images: float tensor (N, 3, H, W) in [0, 1], or uint8; or a list of PIL images or of tensors (3, H, W),
                of any sizes.
            prompts: N prompts, or one for all.
            metadata: N mappings.
            grad: keep the gradient with respect to the images.

        Returns:
            Scores on the device of the images; on the CPU for PIL images.

        Raises:
            UserError: the images are not in range or not of this form, or numbers do not fit; before a model is run.
            TypeError: ``grad`` for a reward that is not differentiable.
            RewardError: the reward returned something that is no score.
        """
        if grad and not self.differentiable:
            raise TypeError(f"the reward {self.name} is not differentiable: no gradient can pass through it")
        if isinstance(images, Image.Image):
            raise UserError(f"the reward {self.name} takes a list of PIL images, got a single one")
        count = len(images)
        texts, rows = self._texts(prompts, count), self._rows(metadata, count)
        ready = _tensors(images, self.name) if self.takes == "tensor" else _pictures(images, self.name)
        target = images.device if isinstance(images, Tensor) else _device_of(images)
        if not count:
            return RewardOutput(torch.zeros(0, device=target), valid=torch.ones(0, dtype=torch.bool, device=target))
        if not self._loaded:
            self.load()
            self._loaded = True
        self.check_prompts(texts)
        with torch.set_grad_enabled(grad), torch.autocast(self.device.type, enabled=False):
            rewards, details = self._in_batches(ready, texts, rows, target)
        self._check(rewards)
        return RewardOutput(rewards, details, torch.ones(count, dtype=torch.bool, device=target), [None] * count)

    def _texts(self, prompts: Sequence[str] | str | None, count: int) -> list[str]:
        if prompts is None:
            if self.uses_prompt and count:
                raise UserError(f"the reward {self.name} needs the prompts of the images")
            return [""] * count
        texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
        if len(texts) != count:
            raise UserError(f"the reward {self.name} was given {count} images but {len(texts)} prompts")
        return texts

    def _rows(self, metadata: Metadata | None, count: int) -> list[Mapping[str, Any]]:
        rows: list[Mapping[str, Any]] = list(metadata) if metadata is not None else [{}] * count
        if len(rows) != count:
            raise UserError(f"the reward {self.name} was given {count} images but metadata of {len(rows)}")
        for index, row in enumerate(rows):
            lacking = [key for key in self.required_metadata if key not in row]
            if lacking:
                raise UserError(f"the reward {self.name} needs {lacking[0]!r} in the metadata of image {index}")
        return rows

    def _in_batches(
        self, images: list[Any], texts: list[str], rows: list[Mapping[str, Any]], target: torch.device
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score images of one size together, at most ``batch_size`` at once, and put the scores back in order."""
        order: list[int] = []
        parts: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        todo = [indices for indices in self._buckets(images) if indices]
        while todo:
            indices = todo.pop(0)
            now, later = indices[: self.batch_size], indices[self.batch_size :]
            try:
                part = self._score(now, images, texts, rows)
            except torch.cuda.OutOfMemoryError:
                if len(now) == 1:
                    raise
                self.batch_size = math.ceil(len(now) / 2)
                logger.warning("%s: out of memory, going on with batches of %d", self.name, self.batch_size)
                torch.cuda.empty_cache()
                todo.insert(0, indices)
                continue
            parts.append(part)
            order += now
            if later:
                todo.insert(0, later)
        back = torch.tensor(order).argsort().to(target)
        names = parts[0][1]
        merged = {name: torch.cat([details[name].to(target) for _, details in parts])[back] for name in names}
        return torch.cat([scores.to(target) for scores, _ in parts])[back], merged

    def _buckets(self, images: list[Any]) -> list[list[int]]:
        if self.takes == "pil":
            return [list(range(len(images)))]
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            sizes.setdefault(tuple(image.shape), []).append(index)
        return list(sizes.values())

    def _score(
        self, indices: list[int], images: list[Any], texts: list[str], rows: list[Mapping[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        chosen: Any = [images[i] for i in indices]
        if self.takes == "tensor":
            chosen = torch.stack(chosen).to(self.device)
        result = self.score(chosen, [texts[i] for i in indices], [rows[i] for i in indices])
        scores, details = result if isinstance(result, tuple) else (result, {})
        values = {name: _as_tensor(value, self.name) for name, value in details.items()}
        rewards = _as_tensor(scores, self.name)
        if rewards.shape != (len(indices),):
            raise RewardError(
                f"the reward {self.name} returned scores of shape {tuple(rewards.shape)} for {len(indices)} images; "
                f"expected ({len(indices)},)"
            )
        for name, value in values.items():
            if value.shape[:1] != (len(indices),):
                raise RewardError(
                    f"the reward {self.name} returned {name!r} for {len(value)} of {len(indices)} images"
                )
        return rewards, values

    def _check(self, rewards: Tensor) -> None:
        bad = (~torch.isfinite(rewards)).nonzero().flatten().tolist()
        if bad:
            raise RewardError(
                f"the reward {self.name} scored image {bad[0]} as {rewards[bad[0]].item()} "
                f"({len(bad)} of {len(rewards)} scores are not finite)"
            )
        mean = rewards.mean().item()
        if self.typical and not self._warned and not self.typical[0] <= mean <= self.typical[1]:
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
    a mapping of named details.
    """

    def __init__(self, function: Any, name: str | None = None, **options: Any) -> None:
        self.name = name or str(getattr(function, "__name__", type(function).__name__))
        super().__init__(**options)
        self.function = function

    def score(self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Scores:
        result: Scores = self.function(images, prompts, metadata)
        return result


def _as_tensor(values: Any, name: str) -> Tensor:
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(np.asarray(values, dtype=np.float64))
        except (TypeError, ValueError) as error:
            raise RewardError(f"the reward {name} returned {values!r:.80}, which are no scores: {error}") from error
    return values.float()


def _tensors(images: Any, name: str) -> list[Tensor]:
    """Float images (3, H, W) in [0, 1]."""
    if isinstance(images, np.ndarray):
        raise UserError(f"the reward {name} takes a tensor (N, 3, H, W) in [0, 1] or PIL images, not a numpy array")
    if isinstance(images, Tensor) and images.ndim != 4:
        advice = "; add a dimension in front for one image" if images.ndim == 3 else ""
        raise UserError(
            f"the reward {name} takes images (N, 3, H, W), got a tensor of shape {tuple(images.shape)}{advice}"
        )
    return [_tensor(image, index, name) for index, image in enumerate(images)]


def _tensor(image: Tensor | Image.Image, index: int, name: str) -> Tensor:
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255
    if not isinstance(image, Tensor):
        raise UserError(f"image {index} for the reward {name} is a {type(image).__name__}, not a tensor or PIL image")
    if image.ndim != 3 or image.shape[0] != 3:
        raise UserError(f"image {index} for the reward {name} has shape {tuple(image.shape)}, expected (3, H, W)")
    if image.dtype == torch.uint8:
        return image.float() / 255
    if not image.is_floating_point():
        raise UserError(f"image {index} for the reward {name} is {image.dtype}; give floats in [0, 1] or uint8")
    low, high = (value.item() for value in torch.aminmax(image.detach()))
    if not (low >= -_SLACK and high <= 1 + _SLACK):
        advice = "they are not finite" if not math.isfinite(low + high) else "divide by 255"
        if -1 - _SLACK <= low < -_SLACK and high <= 1 + _SLACK:
            advice = "from [-1, 1], convert by images / 2 + 0.5"
        raise UserError(
            f"image {index} for the reward {name} has values from {low:.3g} to {high:.3g}, expected [0, 1]: {advice}"
        )
    return image.float()


def _pictures(images: Images, name: str) -> list[Image.Image]:
    """RGB PIL images."""
    if not isinstance(images, Tensor) and all(isinstance(image, Image.Image) for image in images):
        return [image.convert("RGB") for image in images]  # type: ignore[union-attr]
    return [
        Image.fromarray((image.detach() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
        for image in _tensors(images, name)
    ]


def _device_of(images: Sequence[Any]) -> torch.device:
    return images[0].device if len(images) and isinstance(images[0], Tensor) else torch.device("cpu")

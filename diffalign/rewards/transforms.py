"""What is done to a reward's scores before they are combined. Objects that compose: a list is applied in order.

In YAML a transform is its name, or a mapping with ``kind`` and its options:

    transform: zscore
    transform: {kind: cap, at: 7.0}
    transform: [{kind: affine, scale: 100}, {kind: lsc, reference: prompt}]
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from diffalign.config.fields import from_dict
from diffalign.errors import UserError, did_you_mean
from diffalign.rewards.inputs import Metadata
from diffalign.rewards.statistics import RunningStats

REFERENCES = "r_ref"
"""Key of an image's metadata that holds its prompt's reference for each reward, by the reward's name."""

Gather = Callable[[list[float]], list[float]]
"""Makes one list of those of all processes, as ``accelerate.utils.gather_object`` does."""


@dataclass(frozen=True)
class Context:
    """What a transform may need to know besides the scores.

    Attributes:
        name: of the reward.
        metadata: of each image, or empty.
        update: take the scores into running statistics.
        gather: so that all processes have the same statistics; None for one process.
    """

    name: str
    metadata: Metadata = ()
    update: bool = True
    gather: Gather | None = None


@dataclass
class Transform(ABC):
    """Scores (N,) to scores (N,), differentiable; NaN (no score) stays NaN."""

    kind: ClassVar[str]

    @abstractmethod
    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        """The transformed scores; ``context`` says of which reward and images they are."""

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON; empty without running statistics."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from what :meth:`state_dict` gave."""


@dataclass
class Affine(Transform):
    """``scale * r + shift``; such as scale 100, from cosines to logits."""

    kind: ClassVar[str] = "affine"
    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return self.scale * scores + self.shift


@dataclass
class Clip(Transform):
    """Scores below ``low`` and above ``high`` count as these; no gradient there."""

    kind: ClassVar[str] = "clip"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        if self.low is None and self.high is None:
            raise UserError("the transform clip needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UserError(f"the transform clip has low {self.low} above high {self.high}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return scores.clamp(self.low, self.high)


@dataclass
class Cap(Transform):
    """``min(r, at)``: past ``at`` nothing more is gained. For rewards that never saturate, as aesthetic."""

    kind: ClassVar[str] = "cap"
    at: float

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return scores.clamp(max=self.at)


@dataclass
class Target(Transform):
    """``-|r - value|``: best at ``value``, worse on both sides."""

    kind: ClassVar[str] = "target"
    value: float

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return -(scores - self.value).abs()


@dataclass
class _Running(Transform):
    """A transform with running statistics of what comes in, the current scores included.

    ``freeze_after``: statistics stop once this many scores are in, so that they are those of the model before training
    and the reward keeps its unit; None: they go on for ever.
    """

    freeze_after: int | None = None
    stats: RunningStats = dataclasses.field(default_factory=RunningStats, init=False)

    def __post_init__(self) -> None:
        if self.freeze_after is not None and self.freeze_after < 2:
            raise UserError(f"freeze_after of the transform {self.kind} must be at least 2, got {self.freeze_after}")

    def observe(self, scores: Tensor, context: Context) -> None:
        """Take the scores of all processes into the statistics."""
        if not context.update or (self.freeze_after is not None and self.stats.count >= self.freeze_after):
            return
        values = scores.detach().double().flatten().tolist()
        self.stats.update(context.gather(values) if context.gather is not None else values)

    def state_dict(self) -> dict[str, Any]:
        return self.stats.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.stats.load_state_dict(state)


@dataclass
class ZScore(_Running):
    """``(r - mean) / std`` with running statistics: every reward in units of its own spread."""

    kind: ClassVar[str] = "zscore"

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        self.observe(scores, context)
        if not self.stats.count:
            return scores * torch.nan  # nothing but missing scores so far
        centred = scores.double() - self.stats.mean
        std = self.stats.std
        if std <= 1e-9 * (1 + abs(self.stats.mean)):
            if self.freeze_after is not None and self.stats.count >= self.freeze_after:
                raise UserError(
                    f"the first {self.stats.count} scores of {context.name} are all {self.stats.mean:g}: there is no "
                    "spread to normalise by. Use another transform, or a larger freeze_after."
                )
            return (centred * 0).float()
        return (centred / std).float()


@dataclass
class LSC(_Running):
    """``log sigmoid((r - ref) / temperature)``, log-sigmoid centred (Wang et al. 2024, "Transforming and Combining
    Rewards", arXiv 2402.00742).

    For scores whose differences are Bradley-Terry logits it is the log-probability that the image beats the reference;
    the sum over rewards is that of being good in all of them. Concave: bad images gain most, good ones little, which
    leaves less to be hacked.

    Attributes:
        reference: a number; "prompt": each prompt's own, in the image's metadata as ``r_ref: {NAME: number}``;
            "running": the running mean of all scores.
        fallback: for "prompt", the reference of images without one; None: an error.
        temperature: what makes differences logits: 1 for PickScore; 0.01 for a cosine without its scale.
    """

    kind: ClassVar[str] = "lsc"
    reference: Literal["running", "prompt"] | float = "running"
    fallback: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise UserError(f"temperature of the transform {self.kind} must be above 0, got {self.temperature}")

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return logsigmoid(self.centred(scores, context))

    def centred(self, scores: Tensor, context: Context) -> Tensor:
        """``(r - ref) / temperature``, (N,)."""
        if self.reference == "running":
            self.observe(scores, context)
            return (scores - self.stats.mean) / self.temperature
        if self.reference == "prompt":
            references = [self._of_prompt(index, context) for index in range(len(scores))]
            return (scores - torch.tensor(references, device=scores.device)) / self.temperature
        return (scores - self.reference) / self.temperature

    def _of_prompt(self, index: int, context: Context) -> float:
        known = context.metadata[index].get(REFERENCES, {}) if context.metadata else {}
        found = known.get(context.name, self.fallback)
        if found is None:
            raise UserError(
                f"image {index} has no reference for {context.name}: its metadata needs {REFERENCES}: "
                f"{{{context.name}: number}}, as diffalign.rewards.statistics.prompt_references makes them of the "
                "base model's scores; or give the transform a fallback, or another reference"
            )
        return float(found)


@dataclass
class PAR(LSC):
    """``sigmoid((r - ref) / temperature)``, preference as reward (Fu et al. 2025, arXiv 2502.18770): from 0 to 1."""

    kind: ClassVar[str] = "par"

    def __call__(self, scores: Tensor, context: Context) -> Tensor:
        return torch.sigmoid(self.centred(scores, context))


KINDS: dict[str, type[Transform]] = {t.kind: t for t in (Affine, Clip, Cap, Target, ZScore, LSC, PAR)}


def parse_transforms(value: Any, where: str) -> list[Transform]:
    """Transforms from what YAML says: None, a name, a mapping with ``kind``, a transform, or a list of these.

    Args:
        where: the start of errors.

    Raises:
        UserError: an unknown kind or option; says what is near.
    """
    if value is None:
        return []
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [transform for item in value for transform in parse_transforms(item, where)]
    if isinstance(value, Transform):
        return [value]
    if not isinstance(value, str | Mapping):
        raise UserError(f"{where}: a transform is a name or a mapping with kind, got {value!r}")
    options = {} if isinstance(value, str) else dict(value)
    kind = value if isinstance(value, str) else options.pop("kind", None)
    if kind not in KINDS:
        raise UserError(
            f"{where}: there is no transform {kind!r}.{did_you_mean(str(kind), KINDS)} Known: {', '.join(KINDS)}."
        )
    return [from_dict(KINDS[kind], options, f"{where}: transform {kind}")]


def apply(transforms: Sequence[Transform], scores: Tensor, context: Context) -> Tensor:
    """All transforms in order, (N,) to (N,) float32."""
    for transform in transforms:
        scores = transform(scores, context)
    return scores

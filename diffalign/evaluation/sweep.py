"""Models at settings: which are drawn, what they are called side by side, and where their images lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.config import field, from_dict, parse_yaml
from diffalign.errors import UserError
from diffalign.evaluation.comparisons import Variant
from diffalign.evaluation.models import ModelSpec, unique_names
from diffalign.evaluation.sampling import DrawConfig, slug

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class ModelEntry:
    """A model of the list, as YAML says it.

    Attributes:
        model: "base", PATH, PATH@SCALE, or several joined by +.
        name: what it is called.
        steps, guidance, scheduler: where it wants others than the rest, such as 4 steps, guidance 1 and lcm; it is
            then left out of the sweep of steps or of guidance.
    """

    model: str
    name: str | None = None
    steps: int | None = None
    guidance: float | None = None
    scheduler: str | None = None

    @classmethod
    def of(cls, value: Any, where: str) -> ModelEntry:
        """From an item of the list; a text in braces, as on a command line, is read as YAML."""
        if isinstance(value, str) and value.startswith("{"):
            value = parse_yaml(value, where)
        if isinstance(value, str):
            return cls(value)
        if not isinstance(value, Mapping):
            raise UserError(f"{where}: a model is a text or a mapping with model:, got {value!r}")
        return from_dict(cls, value, where)

    def spec(self) -> ModelSpec:
        """The model to draw with."""
        spec = ModelSpec.parse(self.model)
        name = self.name or spec.name
        return replace(spec, name=name, steps=self.steps, guidance=self.guidance, scheduler=self.scheduler)


@dataclass(kw_only=True)
class SweepConfig(DrawConfig):
    """Which models are drawn, each at which settings."""

    models: list[Any] = field(
        [],
        help="Models beside the base: LoRAs as PATH, PATH@SCALE or NAME=PATH@SCALE, several joined by +; pipelines; "
        "folders of fine-tuned denoisers; or mappings with model, name, steps, guidance, scheduler.",
    )
    base: bool = field(True, help="Make the base model the first. The others are compared with the first.")
    guidance_scales: list[float] | None = field(
        None, help="Draw every model at each of these, unless it has a guidance of its own."
    )
    steps: list[int] | None = field(
        None, help="Draw every model with each of these numbers of steps, unless it has one of its own."
    )
    lora_scales: list[float] | None = field(None, help="Draw every model with LoRAs at each of these scales.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.base and not self.models:
            raise UserError("nothing to compare: give --models, or leave the base in")
        for name in ("guidance_scales", "steps", "lora_scales"):
            values = getattr(self, name)
            if values is not None and len(set(values)) != max(len(values), 1):
                raise UserError(f"{name} must be different numbers, got {values}")
        if self.steps is not None and min(self.steps) < 1:
            raise UserError(f"steps must be at least 1, got {self.steps}")

    def variants(self) -> dict[Variant, ModelSpec]:
        """What is drawn: every model at every setting, those of one model together.

        Raises:
            UserError: a model is nothing that can be drawn with.
        """
        specs = [ModelEntry.of(value, f"models[{index}]").spec() for index, value in enumerate(self.models)]
        if self.base and not any(_is_base(spec) for spec in specs):
            specs.insert(0, ModelSpec("base"))
        scaled = [one for spec in unique_names(specs) for one in self._at_scales(spec)]
        names = unique_names([spec for spec, _ in scaled])
        found: dict[Variant, ModelSpec] = {}
        for named, (spec, scale) in zip(names, scaled, strict=True):
            family = "" if scale is None else named.name.removesuffix(_at(scale))
            run, trained = _checkpoint(spec)
            guidances = [spec.guidance] if spec.guidance is not None else self.guidance_scales or [self.guidance_scale]
            counts = [spec.steps] if spec.steps is not None else self.steps or [self.num_inference_steps]
            for guidance in guidances:
                for count in counts:
                    variant = Variant(named.name, float(guidance), count, family, scale, run, trained)
                    found[variant] = replace(named, name=variant.name, guidance=float(guidance), steps=count)
        return found

    def _at_scales(self, spec: ModelSpec) -> list[tuple[ModelSpec, float | None]]:
        """The model at each scale of its LoRAs, and that scale; as it is, and None, without a sweep."""
        if not self.lora_scales or not spec.loras:
            return [(spec, None)]
        return [
            (replace(spec, name=spec.name + _at(s), loras=tuple((path, own * s) for path, own in spec.loras)), s)
            for s in self.lora_scales
        ]


def folder_names(names: Sequence[str]) -> list[str]:
    """A folder of each name; numbered where two differ only in what a folder cannot be called."""
    found: list[str] = []
    for name in names:
        folder = slug(name)
        taken = {other.lower() for other in found}
        found.append(folder if folder.lower() not in taken else f"{folder}-{len(found)}")
    return found


def _checkpoint(spec: ModelSpec) -> tuple[str, int | None]:
    """Run and training step of a model that is one checkpoint of a run; "" and None of any other."""
    places = [path for path, _ in spec.loras] + ([spec.denoiser] if spec.denoiser else [])
    for folder in [Path(places[0]), *Path(places[0]).parents] if len(places) == 1 else []:
        if (match := _CHECKPOINT.fullmatch(folder.name)) is not None:
            return str(folder.parent), int(match[1])
    return "", None


def _at(scale: float) -> str:
    return f" at {scale:g}"


def _is_base(spec: ModelSpec) -> bool:
    return spec.path is None and not spec.loras and spec.denoiser is None

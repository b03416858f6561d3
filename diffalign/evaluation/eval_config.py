"""What ``diffalign eval`` is asked for: models, settings, prompts, rewards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from diffalign.config import field, from_dict, load_yaml, parse_yaml
from diffalign.data.prompts import Prompt, read_prompts
from diffalign.errors import UserError
from diffalign.evaluation.comparisons import Variant
from diffalign.evaluation.models import ModelSpec, unique_names
from diffalign.evaluation.multiple import Correction
from diffalign.evaluation.sampling import DrawConfig
from diffalign.rewards.combine import RewardSpec
from diffalign.rewards.failures import FailurePolicy

CLIP = "openai/clip-vit-large-patch14"
Role = Literal["trained on", "held out", ""]


@dataclass(frozen=True)
class ModelEntry:
    """A model of the list, as YAML says it.

    Attributes:
        model: "base", PATH, PATH@SCALE, or several joined by +.
        name: what it is called.
        steps, guidance: where it wants others than the rest, such as 4 steps and guidance 1; it is then left out of
            the sweep of guidance.
    """

    model: str
    name: str | None = None
    steps: int | None = None
    guidance: float | None = None

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
        return replace(spec, name=self.name or spec.name, steps=self.steps, guidance=self.guidance)


@dataclass(kw_only=True)
class EvalConfig(DrawConfig):
    """Draw models on a set of prompts, score the images, and report which is better, how surely, and at what price."""

    models: list[Any] = field(
        [],
        help="Models beside the base: LoRAs as PATH, PATH@SCALE or NAME=PATH@SCALE, several joined by +; pipelines; "
        "folders of fine-tuned denoisers; or mappings with model, name, steps, guidance.",
    )
    base: bool = field(True, help="Make the base model the first. The others are compared with the first.")
    guidance_scales: list[float] | None = field(
        None, help="Draw every model at each of these. They are compared at the same one, and each at its best."
    )
    lora_scales: list[float] | None = field(None, help="Draw every model with LoRAs at each of these scales as well.")
    rewards: list[Any] = field([], help="Rewards to score by: names, or mappings as in the rewards of a training run.")
    trained_on: list[str] = field(
        [], help="Names of rewards that the models were trained on; those of a run's config.yaml are found."
    )
    diversity: str | None = field(
        CLIP, help="CLIP by which the images of one prompt are told apart, where there are several; none to leave out."
    )
    reference_images: str | None = field(
        None, help="Folder of real images: the distance of each model's images to them (FID, KID) is measured."
    )
    runs: list[Path] = field([], help="Folders of training runs whose curves are drawn.")
    correction: Correction = field("holm", help="p values for many comparisons: holm, bh (false discoveries) or none.")
    bootstrap_draws: int = field(10_000, help="Draws of the bootstrap over prompts.")
    score_batch_size: int = field(32, help="Images scored at once; as many are scored again after a kill.")
    on_failure: Literal["stop", "retry", "drop"] = field("stop", help="What to do about an image without a score.")
    plots: bool = field(True, help="Draw plots, which needs matplotlib (pip install 'diffalign[eval]').")
    title: str = field("Evaluation", help="Title of the report.")
    html: Literal["inside", "beside", "none"] = field(
        "beside",
        help="Write images.html too: a page that links to the images, or has them inside to be sent, or none.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.base and not self.models:
            raise UserError("nothing to evaluate: give --models, or leave the base in")
        if not self.rewards:
            raise UserError("nothing to score by: give --rewards NAME ...; diffalign rewards lists them")
        for name in ("bootstrap_draws", "score_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("guidance_scales", "lora_scales"):
            values = getattr(self, name)
            if values is not None and len(set(values)) != max(len(values), 1):
                raise UserError(f"{name} must be different numbers, got {values}")
        self.policy()

    def policy(self) -> FailurePolicy:
        """What is done about images that cannot be scored."""
        return FailurePolicy(self.on_failure)

    def variants(self) -> dict[Variant, ModelSpec]:
        """What is drawn: every model at every setting, those of one model together."""
        specs = [ModelEntry.of(value, f"models[{index}]").spec() for index, value in enumerate(self.models)]
        if self.base and not any(_is_base(spec) for spec in specs):
            specs.insert(0, ModelSpec("base"))
        found: dict[Variant, ModelSpec] = {}
        for spec in unique_names([scaled for plain in specs for scaled in self._at_scales(plain)]):
            guidances = [spec.guidance] if spec.guidance is not None else self.guidance_scales or [self.guidance_scale]
            for guidance in guidances:
                variant = Variant(spec.name, float(guidance), spec.steps or self.num_inference_steps)
                found[variant] = replace(spec, name=variant.name, guidance=float(guidance))
        return found

    def _at_scales(self, spec: ModelSpec) -> list[ModelSpec]:
        if not self.lora_scales or not spec.loras:
            return [spec]
        return [
            replace(
                spec,
                name=f"{spec.name} at {scale:g}",
                loras=tuple((path, own * scale) for path, own in spec.loras),
            )
            for scale in self.lora_scales
        ]

    def read_prompts(self) -> list[Prompt]:
        """The prompts, with their metadata.

        Raises:
            UserError: there are none.
        """
        source = self.prompts or self.prompts_file
        if not source:
            raise UserError("which prompts? Give --prompts_file diffalign-small, partiprompts:PLACE, a file, ...")
        return read_prompts(source, limit=self.max_prompts)

    def roles(self, specs: list[ModelSpec]) -> dict[str, Role]:
        """Of each reward by its text or name: whether a model was trained on it; "" where nothing is known.

        A reward counts as held out if it is marked eval_only, or if some are known to be trained on and it is not.
        """
        trained = {*self.trained_on, *(name for spec in specs for name in _trained_on(spec))}
        parsed = [RewardSpec.of(item, f"rewards[{index}]") for index, item in enumerate(self.rewards)]
        found: dict[str, Role] = {}
        for spec in parsed:
            if {spec.reward, spec.name} & trained:
                found[spec.name or spec.reward] = "trained on"
            else:
                found[spec.name or spec.reward] = "held out" if trained or spec.eval_only else ""
        return found


def _is_base(spec: ModelSpec) -> bool:
    return spec.path is None and not spec.loras and spec.denoiser is None


def _trained_on(spec: ModelSpec) -> list[str]:
    """Rewards that the config.yaml of a run names, beside a LoRA or denoiser or above a checkpoint of it."""
    names = []
    for place in [path for path, _ in spec.loras] + ([spec.denoiser] if spec.denoiser else []):
        for folder in [Path(place), *Path(place).parents][:3]:
            file = folder / "config.yaml"
            if not file.is_file():
                continue
            listed = load_yaml(file).get("rewards") or []
            found = [RewardSpec.of(item, str(file)) for item in listed] if isinstance(listed, list) else []
            names += [name for r in found if not r.eval_only for name in (r.reward, r.name) if name]
            break
    return names

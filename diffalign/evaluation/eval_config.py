"""What ``diffalign eval`` is asked for: models, settings, prompts, rewards."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from diffalign.config import field, load_yaml
from diffalign.errors import UserError
from diffalign.evaluation.distribution import INCEPTION
from diffalign.evaluation.models import ModelSpec
from diffalign.evaluation.multiple import Correction
from diffalign.evaluation.sweep import SweepConfig
from diffalign.rewards.combine import RewardSpec
from diffalign.rewards.failures import FailurePolicy

CLIP = "openai/clip-vit-large-patch14"
Role = Literal["trained on", "held out", ""]


@dataclass(kw_only=True)
class EvalConfig(SweepConfig):
    """Draw models on a set of prompts, score the images, and report which is better, how surely, and at what price."""

    rewards: list[Any] = field([], help="Rewards to score by: names, or mappings as in the rewards of a training run.")
    trained_on: list[str] = field(
        [], help="Names of rewards that the models were trained on; those of a run's config.yaml are found."
    )
    diversity: str | None = field(
        CLIP, help="CLIP by which the images of one prompt are told apart, where there are several; none to leave out."
    )
    lpips: Literal["alex", "vgg", "squeeze"] | None = field(
        None,
        help="Network of LPIPS, by which they are told apart too: alex, vgg or squeeze; its weights are downloaded.",
    )
    reference_images: str | None = field(
        None, help="Folder of real images: the distance of each model's images to them (FID, KID) is measured."
    )
    reference_features: str = field(
        INCEPTION, help="What FID and KID compare: inception, or a CLIP, such as shapes-clip or one of the hub."
    )
    runs: list[Path] = field([], help="Folders of training runs whose curves are drawn.")
    correction: Correction = field("holm", help="p values for many comparisons: holm, bh (false discoveries) or none.")
    bootstrap_draws: int = field(10_000, help="Draws of the bootstrap over prompts.")
    score_batch_size: int = field(32, help="Images scored at once; as many are scored again after a kill.")
    on_failure: Literal["stop", "retry", "drop"] = field("stop", help="What to do about an image without a score.")
    plots: bool = field(True, help="Draw plots, which needs matplotlib (pip install 'diffalign[eval]').")
    example_rows: int = field(
        6, help="Rows of the report's picture, from the largest gain to the largest loss; 0: none."
    )
    title: str = field("Evaluation", help="Title of the report.")
    html: Literal["inside", "beside", "none"] = field(
        "beside",
        help="Write images.html too: a page that links to the images, or has them inside to be sent, or none.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.rewards:
            raise UserError("nothing to score by: give --rewards NAME ...; diffalign rewards lists them")
        for name in ("bootstrap_draws", "score_batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.example_rows < 0:
            raise UserError(f"example_rows must be 0 or more, got {self.example_rows}")
        self.policy()

    def policy(self) -> FailurePolicy:
        """What is done about images that cannot be scored."""
        return FailurePolicy(self.on_failure)

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

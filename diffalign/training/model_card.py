"""The README.md that a run leaves: what the weights are, how they were made, how to use them."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData

from diffalign.assets import BUNDLED
from diffalign.config import to_dict
from diffalign.pipelines.schedulers import make_scheduler, parse_scheduler
from diffalign.training.config import TrainingConfig

if TYPE_CHECKING:
    from diffalign.training.steps import Plan
    from diffalign.training.validation import Sampling

_LIBRARIES = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft")

_USE = {
    "lora": """from diffusers import AutoPipelineForText2Image{names}
{imports}
pipe = AutoPipelineForText2Image.from_pretrained({base})
pipe.load_lora_weights("{folder}"){scheduler}
image = pipe({arguments}).images[0]""",
    "full": """from diffusers import AutoPipelineForText2Image, UNet2DConditionModel{names}
{imports}
unet = UNet2DConditionModel.from_pretrained("{folder}", subfolder="unet")
pipe = AutoPipelineForText2Image.from_pretrained({base}, unet=unet){scheduler}
image = pipe({arguments}).images[0]""",
}


_BEST = """
`best/` holds the weights that the held-out rewards liked best; `heldout.jsonl` has every evaluation.
"""


def write_model_card(
    config: TrainingConfig, method: str, paper: str, plan: Plan, output_dir: Path, sampling: Sampling | None = None
) -> Path:
    """Write ``README.md`` with the front matter the hub reads; returns its path.

    Args:
        config, method, paper, plan, output_dir: of the run.
        sampling: how the result must be drawn, if it asks for a scheduler; else the pipeline's own defaults are left.
    """
    rewards = "".join(f"\n- {_reward(reward)}" for reward in getattr(config, "rewards", []))
    rewards = f"\nRewards:\n{rewards}\n" if rewards else ""
    settings = to_dict(config)
    dataset = settings.get("dataset_name")
    data = f"on `{dataset}`" if dataset else f"on rewards of its images for the prompts of `{settings.get('prompts')}`"
    best = _BEST if (output_dir / "best").is_dir() else ""
    use = _how_to_use(config, output_dir, sampling)
    anew = " --resume_from_checkpoint none" if config.resume_from_checkpoint else ""
    sheets = sorted((output_dir / "samples").glob("step-*.png"), key=lambda p: int(p.stem.split("-")[1]))
    picture = f"\n![base beside trained](samples/{sheets[-1].name})\n" if sheets else ""
    rows = "\n".join(f"| {name} | {version(name)} |" for name in _LIBRARIES)
    text = f"""
# {output_dir.name}

{"A LoRA for" if config.train_mode == "lora" else "Fine-tuned weights of"} `{config.pretrained_model_name_or_path}`,
trained with {method} {data}: {plan.steps} steps of {plan.effective_batch} samples.
{rewards}{best}{picture}
## Use

```python
{use}
```

## Training

`config.yaml` holds every setting, `metrics.jsonl` one row a step. The same run again:

```
diffalign train {method} --config config.yaml --output_dir NEW_FOLDER{anew}
```

| library | version |
|---|---|
| python | {platform.python_version()} |
{rows}

## Citation

```bibtex
{paper}
```
"""
    card = ModelCard(f"---\n{_front_matter(config, method, dataset).to_yaml()}\n---\n{text}")
    path = output_dir / "README.md"
    card.save(path)
    return path


def _front_matter(config: TrainingConfig, method: str, dataset: str | None) -> ModelCardData:
    """What the hub files the model under."""
    tags = ["text-to-image", "diffusers", "diffusers-training", "diffalign", method]
    return ModelCardData(
        base_model=config.pretrained_model_name_or_path,
        library_name="diffusers",
        license="other",
        tags=tags + (["lora"] if config.train_mode == "lora" else []),
        datasets=[dataset] if dataset else None,
        widget=[{"text": prompt} for prompt in config.validation_prompts or []] or None,
    )


def _reward(reward: Any) -> str:
    """A reward of a configuration, as a line."""
    if not isinstance(reward, Mapping):
        return f"`{reward}`"
    notes = [f"weight {reward['weight']:g}"] if "weight" in reward else []
    notes += ["judges only"] if reward.get("eval_only") else []
    return f"`{reward.get('reward')}`" + (f" ({', '.join(notes)})" if notes else "")


def _how_to_use(config: TrainingConfig, output_dir: Path, sampling: Sampling | None) -> str:
    base, imports = f'"{config.pretrained_model_name_or_path}"', ""
    if config.pretrained_model_name_or_path in BUNDLED:
        base, imports = f"resolve({base})", "\nfrom diffalign.assets import resolve\n"
    arguments = repr((config.validation_prompts or ["a photo of a lighthouse at dusk"])[0])
    names = scheduler = ""
    if sampling is not None and sampling.scheduler:
        kind, named, stepping = parse_scheduler(sampling.scheduler)
        options = "".join(f", {name}={value!r}" for name, value in {**named, **sampling.options}.items())
        names = f", {kind.__name__}"
        scheduler = f"\npipe.scheduler = {kind.__name__}.from_config(pipe.scheduler.config{options})"
        steps = f"num_inference_steps={sampling.num_inference_steps}"
        if stepping:
            made: Any = make_scheduler(sampling.scheduler, {}, **sampling.options)
            made.set_timesteps(sampling.num_inference_steps)
            steps = f"timesteps={made.timesteps.tolist()}"
        arguments += f", {steps}, guidance_scale={sampling.guidance_scale:g}"
    return _USE[config.train_mode].format(
        base=base,
        imports=imports,
        folder=config.hub_model_id or output_dir.name,
        names=names,
        scheduler=scheduler,
        arguments=arguments,
    )

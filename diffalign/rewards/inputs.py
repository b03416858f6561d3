"""What a reward may be given, checked and brought into one form before a model sees it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError, did_you_mean

Images: TypeAlias = Tensor | Sequence[Image.Image] | Sequence[Tensor]
Metadata: TypeAlias = Sequence[Mapping[str, Any]]
GroupIds: TypeAlias = Tensor | Sequence[int]
_SLACK = 0.01


DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
"""How a type of weights may be written in YAML and on the command line."""


def as_dtype(dtype: torch.dtype | str, name: str) -> torch.dtype:
    """The type of a model's weights, also by its name. Raises UserError for another name."""
    if isinstance(dtype, str) and dtype not in DTYPES:
        hint = did_you_mean(dtype, DTYPES)
        raise UserError(f"dtype of the reward {name} is {dtype!r}.{hint} Choose one of {', '.join(DTYPES)}.")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def as_tensors(images: Any, name: str) -> list[Tensor]:
    """Float32 images (3, H, W) in [0, 1], each on the device where it was.

    Args:
        images: as :meth:`diffalign.rewards.base.Reward.__call__` takes them.
        name: of the reward, for errors.

    Raises:
        UserError: something else, or out of range; says which image, and what to do.
    """
    if isinstance(images, np.ndarray):
        raise UserError(f"the reward {name} takes a tensor (N, 3, H, W) in [0, 1] or PIL images, not a numpy array")
    if isinstance(images, Tensor) and images.ndim != 4:
        advice = "; add a dimension in front for one image" if images.ndim == 3 else ""
        raise UserError(
            f"the reward {name} takes images (N, 3, H, W), got a tensor of shape {tuple(images.shape)}{advice}"
        )
    ready = [_tensor(image, index, name) for index, image in enumerate(images)]
    _check_ranges(images, name)
    return ready


def as_pictures(images: Any, name: str) -> list[Image.Image]:
    """RGB PIL images; tensors are rounded to 8 bits. Arguments and errors as of :func:`as_tensors`."""
    if not isinstance(images, Tensor | np.ndarray) and all(isinstance(image, Image.Image) for image in images):
        return [image.convert("RGB") for image in images]
    return [
        Image.fromarray((image.detach() * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy())
        for image in as_tensors(images, name)
    ]


def as_prompts(prompts: Sequence[str] | str | None, count: int, name: str, *, needed: bool) -> list[str]:
    """One prompt an image; a single one is for all. Empty texts where none are given and none are needed.

    Raises:
        UserError: missing, of another number, or not text.
    """
    if prompts is None:
        if needed and count:
            raise UserError(f"the reward {name} needs the prompts of the images")
        return [""] * count
    texts = [prompts] * count if isinstance(prompts, str) else list(prompts)
    if len(texts) != count:
        raise UserError(f"the reward {name} was given {count} images but {len(texts)} prompts")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise UserError(
                f"prompt {index} for the reward {name} is a {type(text).__name__}, not a text: {text!r:.60}"
            )
    return texts


def as_rows(metadata: Metadata | None, count: int, name: str, required: Sequence[str]) -> list[Mapping[str, Any]]:
    """One mapping an image, each with the required keys.

    Raises:
        UserError: of another number, not mappings, or a key is lacking.
    """
    rows: list[Any] = list(metadata) if metadata is not None else [{}] * count
    if len(rows) != count:
        raise UserError(f"the reward {name} was given {count} images but metadata of {len(rows)}")
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise UserError(
                f"the metadata of image {index} for the reward {name} is a {type(row).__name__}, not a dict"
            )
        lacking = [key for key in required if key not in row]
        if lacking:
            raise UserError(f"the reward {name} needs {lacking[0]!r} in the metadata of image {index}")
    return rows


def as_group_ids(group_ids: GroupIds | None, count: int, name: str, *, needed: bool) -> list[int] | None:
    """The group of each image; None where none are given and none are needed.

    Raises:
        UserError: missing, of another number, or not whole numbers.
    """
    if group_ids is None:
        if needed and count:
            raise UserError(
                f"the reward {name} compares the images of a group: give group_ids=, one number an image, equal for "
                "the images of one prompt"
            )
        return [] if needed else None
    values = (
        group_ids.tolist()
        if isinstance(group_ids, Tensor)
        else [getattr(g, "item", lambda g=g: g)() for g in group_ids]
    )
    if len(values) != count:
        raise UserError(f"the reward {name} was given {count} images but {len(values)} group_ids")
    for index, value in enumerate(values):
        if not isinstance(value, int):
            raise UserError(f"group_ids[{index}] for the reward {name} is {value!r}, not a whole number")
    return values


def device_of(images: Images) -> torch.device:
    """Where the scores of images go: to the images, and to the CPU for PIL images."""
    first: Any = images if isinstance(images, Tensor) else images[0] if len(images) else None
    return first.device if isinstance(first, Tensor) else torch.device("cpu")


def subset(images: Images, indices: Sequence[int]) -> Any:
    """Some of the images, in the form they came in."""
    return images[list(indices)] if isinstance(images, Tensor) else [images[index] for index in indices]


def _tensor(image: Any, index: int, name: str) -> Tensor:
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
    return image.float()


def _check_ranges(images: Any, name: str) -> None:
    """Float images must be in [0, 1]. A batch is looked at in one go: each look at a GPU's numbers waits for it."""
    if isinstance(images, Tensor) and images.is_floating_point() and len(images):
        flat = images.detach().flatten(1)  # aminmax along a dimension takes many times as long as both
        extremes = torch.stack([flat.amin(1), flat.amax(1)], dim=1).tolist()
    else:
        floats = [isinstance(image, Tensor) and image.is_floating_point() for image in images]
        extremes = [
            [value.item() for value in torch.aminmax(image.detach())] if is_float else [0.0, 1.0]
            for image, is_float in zip(images, floats, strict=True)
        ]
    for index, (low, high) in enumerate(extremes):
        if low >= -_SLACK and high <= 1 + _SLACK:
            continue
        advice = "they are not finite" if not math.isfinite(low + high) else "divide by 255"
        if -1 - _SLACK <= low < -_SLACK and high <= 1 + _SLACK:
            advice = "from [-1, 1], convert by images / 2 + 0.5"
        elif low < -_SLACK and math.isfinite(low + high):
            advice = "neither 0 to 255 nor -1 to 1: undo whatever normalised them"
        raise UserError(
            f"image {index} for the reward {name} has values from {low:.3g} to {high:.3g}, expected [0, 1]: {advice}"
        )

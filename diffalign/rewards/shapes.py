"""The judges of the shapes world as rewards: the checker, which knows the truth, and the simulated annotators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.shapes import annotators, checker
from diffalign.shapes.scene import parse


class ShapesJudge(Reward):
    """What judges of the shapes world have in common: they read pictures and understand only its captions."""

    takes = "pil"
    input_size = 64
    licence = "Apache-2.0"

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for index, prompt in enumerate(prompts):
            try:
                parse(prompt)
            except ValueError as error:
                raise UserError(f"{self.name} cannot judge prompt {index}: {error}") from error


class ShapesChecker(ShapesJudge):
    """Share of the caption's facts that hold, read from the pixels: in [0, 1]."""

    name = "shapes-checker"
    summary = "share of the caption's facts that hold in a picture of the shapes world"
    scale = "probability"
    typical = (0.0, 1.0)
    hacks = ("What a caption leaves open is free: a model may always draw the same, and lose its diversity unseen.",)

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        return torch.from_numpy(checker.scores(images, prompts))


class ShapesAnnotator(ShapesJudge):
    """Utility of a picture to the simulated annotators, without their noise, about 0 to 15.

    Args:
        user_id: a user of :data:`diffalign.shapes.annotators.ANNOTATORS`; None for the mean of all.
        options: device, dtype, batch_size: see :class:`diffalign.rewards.base.Reward`.

    Raises:
        UserError: there is no such user.
    """

    name = "shapes-annotator"
    summary = "how much the simulated annotators of the shapes world like a picture"
    scale = "bt_logit"
    typical = (0.0, 16.0)
    hacks = (
        "Part of it is taste: large things in the middle score wherever the caption leaves that open, and diversity "
        "is lost.",
    )

    def __init__(self, user_id: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        if user_id is not None:
            annotators.annotator(user_id)
        self.user_id = user_id

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        utilities = [
            annotators.utility(image, prompt, self.user_id) for image, prompt in zip(images, prompts, strict=True)
        ]
        return torch.tensor(utilities)

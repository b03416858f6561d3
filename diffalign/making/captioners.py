"""What describes an image in words: the checker of the shapes world, a vision-language model, or a function.

A captioner sees the image and the prompt it was made for.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.imports import find_callable, is_import_path
from diffalign.making.hub import load_pretrained, model_identity
from diffalign.shapes.checker import Found, Reading, describe, read
from diffalign.shapes.scene import Thing, parse

SHAPES = "shapes-checker"
INSTRUCTION = (
    "Describe this image in one short sentence that could serve as its prompt. Say only what is there. "
    'It was generated from the prompt: "{prompt}".'
)
"""What a vision-language model is asked, unless told otherwise."""


class Captioner(ABC):
    """Describes images.

    Attributes:
        identity: what decides the captions beside image and prompt; plain text.
    """

    identity: str

    @abstractmethod
    def captions(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str | None]:
        """A caption for each RGB image; None where there is nothing to say of it."""

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str | None]:
        """:meth:`captions`, checked: single lines, and None for an empty one.

        Raises:
            UserError: not one text or None for each image.
        """
        found = self.captions(images, prompts)
        if len(found) != len(images):
            raise UserError(f"the captioner {self.identity} gave {len(found)} captions for {len(images)} images")
        for caption in found:
            if caption is not None and not isinstance(caption, str):
                raise UserError(f"the captioner {self.identity} gave {caption!r:.80}, which is no text")
        return [" ".join(caption.split()) or None if caption is not None else None for caption in found]


class ShapesCaptioner(Captioner):
    """States all that the checker of the shapes world recognises.

    A thing whose shape cannot be told takes the shape that the prompt asks for, where image and prompt have as many
    things; None where they have not, or where no caption can say what is there.
    """

    identity = f"{SHAPES} 1"

    def captions(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str | None]:
        return [describe(_with_shapes_of(read(image), prompt)) for image, prompt in zip(images, prompts, strict=True)]


def _with_shapes_of(reading: Reading, prompt: str) -> Reading:
    """The reading, with the prompt's shapes for things of unknown shape."""
    if all(found.shape is not None for found in reading.things):
        return reading
    try:
        wanted = parse(prompt).things
    except ValueError as error:
        raise UserError(f"the captioner {SHAPES} understands prompts of the shapes world only: {error}") from error
    if len(wanted) != len(reading.things):
        return reading
    # The things may have swapped places: the order in which more of what was recognised fits.
    order = max((wanted, wanted[::-1]), key=lambda things: sum(map(_fit, reading.things, things)))
    things = [replace(f, shape=f.shape or w.shape) for f, w in zip(reading.things, order, strict=True)]
    return replace(reading, things=tuple(things))


def _fit(found: Found, thing: Thing) -> int:
    return (found.shape == thing.shape) + (found.color == thing.color) + (found.size == thing.size)


class FunctionCaptioner(Captioner):
    """A function ``f(images, prompts)`` that returns a text or None for each image."""

    def __init__(self, function: Callable[..., Any], identity: str) -> None:
        self.function, self.identity = function, identity

    def captions(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str | None]:
        return list(self.function(list(images), list(prompts)))


class ModelCaptioner(Captioner):
    """An image-text-to-text model of transformers (LLaVA, Qwen-VL, SmolVLM, BLIP ...), decoded greedily.

    Where the processor has a chat template, the instruction is the user's turn beside the image. Where it has none
    (BLIP, GIT) the instruction is a prefix that the model continues, and what it adds is the caption.

    Args:
        path: folder or hub id.
        instruction: with ``{prompt}`` for the image's prompt.
        max_new_tokens: length of a caption.
        device, dtype: where and in which type; by default a GPU in bfloat16 where there is one.

    Raises:
        UserError: no such model, or none of this kind.
    """

    def __init__(
        self,
        path: str,
        *,
        instruction: str = INSTRUCTION,
        max_new_tokens: int = 64,
        device: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.path, self.instruction, self.max_new_tokens, self.revision = path, instruction, max_new_tokens, revision
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        self.identity = model_identity(path, revision)
        self._model: Any = None
        self._processor: Any = None

    def load(self) -> None:
        """Read the model; called with the first images."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        options = {"revision": self.revision} if self.revision else {}
        self._processor = load_pretrained(AutoProcessor, self.path, "captioner", **options)
        model = load_pretrained(AutoModelForImageTextToText, self.path, "captioner", dtype=self.dtype, **options)
        self._model = model.to(self.device).eval()
        # The answers of a batch must end at the same place.
        self._processor.tokenizer.padding_side = "left"
        if self._processor.tokenizer.pad_token is None:
            self._processor.tokenizer.pad_token = self._processor.tokenizer.eos_token

    def captions(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str | None]:
        if self._model is None:
            self.load()
        texts = [self.instruction.replace("{prompt}", prompt) for prompt in prompts]
        if chat := bool(getattr(self._processor, "chat_template", None)):
            texts = [self._turn(text) for text in texts]
        nested = [[image] for image in images] if chat else list(images)
        inputs = self._processor(images=nested, text=texts, padding=True, return_tensors="pt").to(self.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.dtype)
        with torch.no_grad():
            answers = self._model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return [self._answer(row, asked) for row, asked in zip(answers.cpu(), inputs["input_ids"].cpu(), strict=True)]

    def _turn(self, text: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": text}]
        turn = self._processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        return str(turn)

    def _answer(self, row: torch.Tensor, asked: torch.Tensor) -> str:
        """What was generated after the instruction, which most models repeat in their output."""
        decode = self._processor.tokenizer.decode
        if len(row) >= len(asked) and bool((row[: len(asked)] == asked).all()):
            return str(decode(row[len(asked) :], skip_special_tokens=True)).strip()
        # BLIP puts another token at the start and takes one off the end, so only the text tells.
        answer, prefix = (str(decode(ids, skip_special_tokens=True)).strip() for ids in (row, asked))
        return answer.removeprefix(prefix).strip()


def load_captioner(name: str, **options: Any) -> Captioner:
    """Find a captioner.

    Args:
        name: "shapes-checker"; ``package.module:object`` or ``path/to/file.py:object``, a function of
            ``(images, prompts)`` or a class without arguments whose instances are one; or the folder or hub id of an
            image-text-to-text model of transformers.
        options: of :class:`ModelCaptioner`.

    Raises:
        UserError: nothing of this.
    """
    if name == SHAPES:
        return ShapesCaptioner()
    if is_import_path(name) and not Path(name).exists():
        found = find_callable(name, "captioner")
        made: Any = found() if inspect.isclass(found) else found
        return made if isinstance(made, Captioner) else FunctionCaptioner(made, name)
    return ModelCaptioner(name, **options)

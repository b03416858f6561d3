"""Human Preference Score v2 and v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine of a CLIP tuned on choices.

The published files are open_clip checkpoints of that model and are loaded as such; their own package is not needed.
Differences from it: batches, float32 dot products (its half precision rounds scores to steps of 0.00024), and a
picture whose longest side is 224 already is padded like any other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from accelerate import init_empty_weights
from torch import Tensor
from transformers import CLIPModel

from diffalign.errors import UserError
from diffalign.rewards.checkpoints import fill, load_model, locate, read_weights
from diffalign.rewards.clip import CosineReward
from diffalign.rewards.encoders import Encoder, load_config
from diffalign.rewards.pixels import Preprocess

_CONVERTED_KEY = "vision_model.embeddings.patch_embedding.weight"


class HPSv2(CosineReward):
    """HPSv2: the cosine of image and prompt, about 0.23 to 0.29; tables print it times 100. No logit scale.

    Pictures are letterboxed: longest side to 224, black around. Versions 2 and 2.1 are not comparable, nor are prompt
    sets and styles.

    Args:
        checkpoint: the published file, torch or safetensors; a folder or hub id that holds it; or a folder or hub id
            with the weights converted to transformers (``config.json`` and ``model.safetensors``).
        architecture: of the file: a model that open_clip lists, or a JSON file with such a config.
        antialias: off for the numbers that the package gave with torchvision before 0.17, whose resize of tensors was
            not antialiased; they differ by up to a point in the tables.
        options: revision, local_files_only, device, dtype, batch_size, offload: see
            :class:`diffalign.rewards.clip.CosineReward`.
    """

    name = "hpsv2"
    version = "letterbox-1"
    summary = "which of several pictures people prefer for a prompt (version 2.0)"
    scale = "cosine"
    typical = (0.18, 0.34)
    input_size = 224
    memory_gb = 1.97
    licence = "Apache-2.0"
    hacks = (
        "Pictures become vivid, contrasty and painterly whatever style the prompt asks for.",
        "Scores of a few percent more come from style alone: faces, counts and prompt details get worse unnoticed.",
        "Direct back-propagation finds fine grids and noise, which a resize to 224 pixels hides from the eye.",
    )
    default_checkpoint = "xswu/HPSv2"
    file_name: ClassVar[str] = "HPS_v2_compressed.pt"

    def __init__(
        self,
        checkpoint: str | None = None,
        architecture: str = "ViT-H-14",
        antialias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, **options)
        self.architecture, self.antialias = architecture, antialias

    def make_encoder(self) -> Encoder:
        # open_clip takes seconds to import, and only these rewards need it.
        from open_clip import SimpleTokenizer

        from diffalign.rewards.open_clip_encoder import ConvertedEncoder, OpenClipEncoder, architecture

        config = architecture(self.architecture)
        model = self._read(config)
        converted = isinstance(model, CLIPModel)
        side = model.config.vision_config.image_size if converted else config["vision_cfg"]["image_size"]
        words = model.config.text_config.vocab_size if converted else config["text_cfg"]["vocab_size"]
        context = model.config.text_config.max_position_embeddings if converted else model.context_length
        tokenizer = SimpleTokenizer(context_length=context)
        if tokenizer.vocab_size != words:
            raise UserError(
                f"{self.checkpoint!r} has {words} tokens, but CLIP's tokenizer, which {self.name} was trained with, "
                f"has {tokenizer.vocab_size}: it is not a checkpoint of {self.name}"
            )
        preprocess = Preprocess(side, side, mode="letterbox", antialias=self.antialias, eight_bit=False)
        return (ConvertedEncoder if converted else OpenClipEncoder)(model, preprocess, tokenizer)

    def from_cosine(self, cosine: Tensor) -> Tensor:
        return cosine

    def _read(self, config: dict[str, Any]) -> Any:
        """The model: open_clip's, or a ``CLIPModel`` if the weights were converted to that."""
        from diffalign.rewards.open_clip_encoder import clip_config, from_state_dict

        options: dict[str, Any] = {"revision": self.revision, "local_files_only": self.local_files_only}
        folder = Path(self.checkpoint).expanduser()
        if (folder / "config.json").is_file() and not (folder / self.file_name).is_file():
            load_config(self.checkpoint, ("clip",), **options)
            return load_model(CLIPModel, self.checkpoint, **options)
        names = (self.file_name, self.file_name.replace(".pt", ".safetensors"), "model.safetensors")
        file = locate(self.checkpoint, names, what=f"weights of {self.name}", **options)
        state = read_weights(file)
        if _CONVERTED_KEY not in state:
            return from_state_dict(config, state, str(file), f"{self.architecture} of open_clip")
        with init_empty_weights(include_buffers=False):
            model = CLIPModel(clip_config(config))
        fill(model, state, str(file), f"{self.architecture} converted to transformers")
        return model.eval().requires_grad_(False)


class HPSv21(HPSv2):
    """HPSv2.1: the cosine of image and prompt, about 0.14 to 0.32; like :class:`HPSv2`, trained on better data."""

    name = "hpsv2.1"
    summary = "which of several pictures people prefer for a prompt"
    typical = (0.10, 0.40)
    file_name = "HPS_v2.1_compressed.pt"

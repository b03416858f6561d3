"""CLIPScore (Hessel et al. 2021, arXiv 2104.08718) by any CLIP or SigLIP of transformers or open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from diffalign.errors import UserError, did_you_mean
from diffalign.rewards.clip import CLIPReward
from diffalign.rewards.encoders import Encoder, load_encoder

FORMS = {"x100": 100.0, "w2.5": 2.5, "cosine": 1.0}
"""Forms of the score, and by what the cosine is multiplied."""
_PAPERS_PREFIX = "A photo depicts "


class CLIPScore(CLIPReward):
    """How well image and prompt agree: 100 max(cosine, 0), about 20 to 35 with a CLIP.

    Values of different models, even ViT-B/32 and ViT-L/14, are not comparable: the model is part of the reward's name.

    Args:
        checkpoint: a folder or hub id of a CLIP or SigLIP of transformers; or one of open_clip: ``hf-hub:owner/name``,
            a folder in its layout, or ``MODEL:TAG`` such as ``ViT-B-32:laion2b_s34b_b79k`` (or ``MODEL:FILE``).
        processor: where tokenizer and image processor are, if not with the checkpoint (transformers only).
        form: "x100" for 100 max(cosine, 0), as torchmetrics and most tables; "w2.5" for 2.5 max(cosine, 0), the
            paper's; "cosine" for the bare cosine. The first two have no gradient where the cosine is negative.
        prompt_prefix: put before each prompt; by default the paper's, "A photo depicts ", for "w2.5", else nothing.
        options: revision, local_files_only, device, dtype, batch_size, offload: see
            :class:`diffalign.rewards.clip.CosineReward`.

    Raises:
        UserError: there is no such form.
    """

    name = "clipscore"
    version = "1"
    summary = "how well a picture agrees with its prompt, in the eyes of a CLIP of one's choice"
    scale = "cosine"
    typical: tuple[float, float] | None = (10.0, 45.0)
    input_size = 224
    memory_gb = 0.86
    licence = "MIT (OpenAI's CLIPs); that of the model chosen"
    hacks = (
        "Things of the prompt are shown again and again, or written into the picture as text.",
        "Who does what to whom is not understood: swapped attributes and relations score the same.",
        "Direct back-propagation finds patterns that only this CLIP sees; judge by another model.",
    )
    default_checkpoint = "openai/clip-vit-large-patch14"

    def __init__(
        self,
        checkpoint: str | None = None,
        processor: str | None = None,
        form: Literal["x100", "w2.5", "cosine"] = "x100",
        prompt_prefix: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(checkpoint, processor, **options)
        if form not in FORMS:
            raise UserError(
                f"form of {self.name} is {form!r}.{did_you_mean(form, FORMS)} Choose of {', '.join(FORMS)}."
            )
        self.form = form
        self.prompt_prefix = (_PAPERS_PREFIX if form == "w2.5" else "") if prompt_prefix is None else prompt_prefix
        self.name = f"clipscore:{Path(self.checkpoint).name}"

    def make_encoder(self) -> Encoder:
        # open_clip takes seconds to import, and most checkpoints do not need it.
        from diffalign.rewards.open_clip_encoder import is_open_clip, load_open_clip

        options: dict[str, Any] = {"revision": self.revision, "local_files_only": self.local_files_only}
        if is_open_clip(self.checkpoint):
            encoder: Encoder = load_open_clip(self.checkpoint, **options)
        else:
            encoder = load_encoder(self.checkpoint, self.processor, kinds=("clip", "siglip"), **options)
        self.typical = self._usual(encoder)
        return encoder

    def from_cosine(self, cosine: Tensor) -> Tensor:
        scaled = FORMS[self.form] * cosine
        return scaled if self.form == "cosine" else scaled.clamp(min=0)

    def _usual(self, encoder: Encoder) -> tuple[float, float] | None:
        """A SigLIP was trained with a bias, and its cosines have no usual range."""
        if getattr(encoder.model, "logit_bias", None) is not None:
            return None
        low, high = type(self).typical or (0.0, 100.0)
        factor = FORMS[self.form] / FORMS["x100"]
        return low * factor, high * factor

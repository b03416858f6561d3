"""A model without its weights: its family and networks, on the meta device, from the configs of a checkpoint alone.

Of a hub id only the configs are fetched, a few kB; those of the usual base models come with diffalign.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from torch import nn

from diffalign import assets
from diffalign.errors import UserError, did_you_mean
from diffalign.pipelines.base import Family
from diffalign.pipelines.detect import load_family
from diffalign.pipelines.files import check_not_a_file

CONFIGS = Path(__file__).parent / "configs"
ARCHITECTURES = ("sdxl", "sd15")
"""What the bundled configs describe; every fine-tune of these has the same shapes."""

_KNOWN = {
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "runwayml/stable-diffusion-v1-5": "sd15",
    "CompVis/stable-diffusion-v1-4": "sd15",
    "madebyollin/sdxl-vae-fp16-fix": "sdxl-vae-fp16-fix",
}
_FILES = ["model_index.json", "config.json", "*/config.json", "scheduler/scheduler_config.json"]


@dataclass(frozen=True)
class Configs:
    """A folder with the configs of a checkpoint, and in words where they are from."""

    folder: str
    source: str


def find_configs(path: str, *, revision: str | None = None, like: str | None = None) -> Configs:
    """The configs of a checkpoint, without its weights.

    Args:
        path: folder in the diffusers layout, bundled name or hub id.
        revision: of a hub id.
        like: one of :data:`ARCHITECTURES`, to take its shapes whatever ``path`` is.

    Raises:
        UserError: there are none to be had; the message says what to do.
    """
    if like is not None:
        if like not in ARCHITECTURES:
            raise UserError(f"like {like!r} is not one of {', '.join(ARCHITECTURES)}.")
        return Configs(str(CONFIGS / like), f"the bundled configuration {like!r}, as asked")
    folder = assets.resolve(path)
    if Path(folder).is_dir():
        return Configs(folder, f"the configs in {path}")
    check_not_a_file(folder)
    if path in _KNOWN:
        return Configs(str(CONFIGS / _KNOWN[path]), f"the bundled configuration {_KNOWN[path]!r} of {path}")
    try:
        return Configs(snapshot_download(path, revision=revision, allow_patterns=_FILES), f"the configs of {path}")
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise UserError(
            f"the configs of {path!r} could not be had from the hub ({type(error).__name__}), and none are bundled. "
            f"If it is a fine-tune of a usual base model, say so: --like sdxl or --like sd15; or give a local folder."
            + did_you_mean(path, _KNOWN)
        ) from error


class Skeleton:
    """The networks of a checkpoint on the meta device. Nothing here has weights.

    Args:
        configs: from :func:`find_configs`.
        vae: the same of a VAE to use instead.
        dtype: of the frozen weights.
    """

    def __init__(self, configs: Configs, *, vae: Configs | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.configs = configs
        self.family: Family = load_family(configs.folder, vae=vae.folder if vae else None, dtype=dtype, device="meta")
        self.dtype = dtype

    def denoiser(self) -> nn.Module:
        """The denoiser, frozen."""
        kind, config = self.family.denoiser_class, self.family._denoiser_config
        with torch.device("meta"):
            return self._placed(kind.from_config(config), self.dtype)  # type: ignore[attr-defined]

    def vae(self) -> nn.Module:
        """The VAE, in the dtype in which the family would load it."""
        with torch.device("meta"):
            return self._placed(AutoencoderKL.from_config(self.family._vae_config), self.family._vae_dtype)

    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by their names in the pipeline."""
        encoders = {}
        for name, kind in self.family.encoder_classes.items():
            config = kind.config_class.from_pretrained(self.configs.folder, subfolder=name)
            with torch.device("meta"):
                encoders[name] = self._placed(kind(config), self.dtype)
        return encoders

    @staticmethod
    def _placed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
        # Not the `to` of diffusers, which warns of every change of dtype.
        return nn.Module.to(module, dtype).requires_grad_(False).eval()

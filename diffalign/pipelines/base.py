"""The contract of a model family, and what every latent-diffusion family has in common.

A family answers what differs between SD, SDXL and those to come: how prompts are encoded, what the denoiser is given,
which parts a checkpoint has. Nothing outside this package asks which family it is.

Parts load on first use and separately, and can be freed: a run on cached latents and embeddings never holds the VAE or
the text encoders.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from diffusers import AutoencoderKL, DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import free_memory
from torch import Tensor, nn
from transformers import CLIPTokenizer, PreTrainedModel

from diffalign.diffusion.noise import NoiseProcess, from_scheduler_config
from diffalign.errors import UserError, did_you_mean
from diffalign.pipelines import vae as vae_io
from diffalign.pipelines.adapters import DENOISER_TARGETS, TEXT_TARGETS, LoraSpec, add_lora
from diffalign.pipelines.files import fingerprint_files, load_config, load_part, locate
from diffalign.pipelines.kohya import KohyaNames
from diffalign.pipelines.prompts import tokenize
from diffalign.pipelines.savings import Quantization, at_work, quantized, wait_on_cpu
from diffalign.pipelines.schedulers import make_scheduler

PARTS = ("denoiser", "vae", "text_encoders")


class Family(ABC):
    """One kind of text-to-image model, loaded from one checkpoint.

    Use :func:`diffalign.pipelines.load_family`, which finds the family by itself.

    Args:
        path: folder in the diffusers layout, bundled name or hub id.
        revision, variant: of the checkpoint, as in diffusers ("fp16" is a usual variant).
        vae: folder or hub id of a VAE to use instead of the checkpoint's own.
        dtype: of the frozen weights: float32 on a CPU, bfloat16 or float16 on a GPU.
        vae_dtype: of the VAE; by default the safe one (:func:`diffalign.pipelines.vae.safe_dtype`).
        device: where parts are loaded.
        quantize, offload_idle: bits of the denoiser, parts on the CPU: see :mod:`diffalign.pipelines.savings`.

    Raises:
        UserError: there is no such checkpoint, or the replacement VAE does not fit it.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[type[DiffusionPipeline]]
    denoiser_class: ClassVar[type] = UNet2DConditionModel
    denoiser_part: ClassVar[str] = "unet"
    encoder_classes: ClassVar[Mapping[str, type[PreTrainedModel]]]
    lora_targets: ClassVar[tuple[str, ...]] = DENOISER_TARGETS
    text_lora_targets: ClassVar[tuple[str, ...]] = TEXT_TARGETS
    shard_blocks: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock", "ResnetBlock2D")
    """Classes of the denoiser's modules whose weights are brought together at once, where they are shared out."""
    unused_parts: ClassVar[tuple[str, ...]] = ()
    """Parts of the pipeline that are neither downloaded nor used (the safety checker)."""

    def __init__(
        self,
        path: str,
        *,
        revision: str | None = None,
        variant: str | None = None,
        vae: str | None = None,
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        quantize: Quantization = "none",
        offload_idle: bool = False,
    ) -> None:
        self.quantize, self.offload_idle = quantize, offload_idle
        self.path, self.revision, self.variant, self.vae_path = path, revision, variant, vae
        self.dtype, self.device = dtype, torch.device(device)
        self.folder = locate(
            path, self.pipeline_class, revision=revision, variant=variant, skip=self._not_downloaded(vae is not None)
        )
        self._vae_dtype = vae_io.safe_dtype(self._vae_config, dtype, vae_dtype)
        self._check_vae()
        self._denoiser: UNet2DConditionModel | None = None
        self._vae: AutoencoderKL | None = None
        self._text_encoders: dict[str, nn.Module] | None = None

    @classmethod
    def load(cls, path: str, **options: Any) -> Self:
        """Build the family of a checkpoint; the arguments are the constructor's. Loads no weights yet."""
        return cls(path, **options)

    # Parts -----------------------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """The network that predicts, frozen (``requires_grad`` False) until someone says otherwise."""
        if self._denoiser is None:
            options = quantized(self.quantize, self.dtype, self.device)
            self._denoiser = self._place(self._part(self.denoiser_class, self.denoiser_part, self.dtype, **options))
        return self._denoiser

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder, frozen, in a dtype in which it does not overflow."""
        if self._vae is None:
            if self.vae_path is None:
                loaded = self._part(AutoencoderKL, "vae", self._vae_dtype)
            else:
                loaded = load_part(AutoencoderKL, self.vae_path, self._vae_subfolder, dtype=self._vae_dtype)
            self._vae = vae_io.accept_any_dtype(self._place(loaded, idle=True))
        return self._vae

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """The text encoders by their names in the pipeline ("text_encoder", "text_encoder_2"), frozen."""
        if self._text_encoders is None:
            self._text_encoders = {
                name: self._place(self._part(kind, name, self.dtype), idle=True)
                for name, kind in self.encoder_classes.items()
            }
        return self._text_encoders

    @cached_property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """The tokenizer of each text encoder, by the encoder's name."""
        return {
            name: load_part(CLIPTokenizer, self.folder, name.replace("text_encoder", "tokenizer"))
            for name in self.encoder_classes
        }

    @property
    def loaded(self) -> frozenset[str]:
        """Which of "denoiser", "vae" and "text_encoders" are in memory."""
        return frozenset(part for part in PARTS if getattr(self, f"_{part}") is not None)

    def free(self, *parts: str) -> None:
        """Drop parts from memory; they load again, from the checkpoint, when next used.

        Whoever else holds a part (a pipeline built earlier) keeps it alive. LoRA on a dropped part is lost.
        """
        for part in parts:
            if part not in PARTS:
                raise ValueError(f"{part!r} is not a part; use {', '.join(PARTS)}." + did_you_mean(part, PARTS))
            setattr(self, f"_{part}", None)
        free_memory()

    def _part(self, kind: type, subfolder: str, dtype: torch.dtype, **options: Any) -> Any:
        return load_part(kind, self.folder, subfolder, dtype=dtype, variant=self.variant, **options)

    def _place(self, module: Any, *, idle: bool = False) -> Any:
        if idle and self.offload_idle:
            wait_on_cpu(module, self.device)
        else:
            module.to(self.device)
        return module.requires_grad_(False).eval()

    @classmethod
    def _not_downloaded(cls, vae_replaced: bool) -> tuple[str, ...]:
        return (*cls.unused_parts, "vae") if vae_replaced else cls.unused_parts

    # What the configs say, without weights ---------------------------------------------------------------------

    @cached_property
    def noise_process(self) -> NoiseProcess:
        """The process the checkpoint was trained with: betas, prediction type, terminal SNR."""
        return from_scheduler_config(self.scheduler_config)

    @property
    def resolution_multiple(self) -> int:
        """Width and height must be multiples of this. At least 8, because the diffusers pipelines demand it."""
        return max(8, self._vae_factor)

    @property
    def default_resolution(self) -> int:
        """The side, in pixels, that the checkpoint was made for."""
        size = self._denoiser_config["sample_size"]
        return int(size[0] if isinstance(size, list | tuple) else size) * self._vae_factor

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of an image of ``height`` x ``width`` pixels.

        Raises:
            UserError: a side is not a positive multiple of :attr:`resolution_multiple`.
        """
        step = self.resolution_multiple
        for side, value in (("height", height), ("width", width)):
            if value <= 0 or value % step:
                near = max(step, round(value / step) * step)
                raise UserError(f"{side} {value} is not a multiple of {step}; use {near}.")
        factor = self._vae_factor
        return int(self._vae_config.get("latent_channels", 4)), height // factor, width // factor

    def fingerprint(self, part: str) -> str:
        """An id of a frozen part's weights, config and dtype, for keys of caches: hex, equal on every machine.

        Args:
            part: "vae", or "text_encoders" (with their tokenizers). LoRA is not part of it.
        """
        if part == "vae" and self.vae_path is not None:
            return fingerprint_files(self.vae_path, [self._vae_subfolder or "."], str(self._vae_dtype))
        if part == "vae":
            return fingerprint_files(self.folder, ["vae"], f"{self._vae_dtype} {self.variant}")
        if part == "text_encoders":
            folders = [*self.encoder_classes, *(n.replace("text_encoder", "tokenizer") for n in self.encoder_classes)]
            return fingerprint_files(self.folder, folders, f"{self.dtype} {self.variant}")
        raise ValueError(f"fingerprint is for 'vae' or 'text_encoders', not {part!r}.")

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The checkpoint's ``scheduler_config.json``."""
        return load_config(DDPMScheduler, self.folder, "scheduler")

    @cached_property
    def _denoiser_config(self) -> dict[str, Any]:
        return load_config(self.denoiser_class, self.folder, self.denoiser_part)

    @cached_property
    def _vae_subfolder(self) -> str | None:
        """A replacement VAE lies at the root of its folder, or in ``vae`` of a whole pipeline's folder."""
        return "vae" if self.vae_path is not None and (Path(self.vae_path) / "vae").is_dir() else None

    @cached_property
    def _vae_config(self) -> dict[str, Any]:
        if self.vae_path is not None:
            return load_config(AutoencoderKL, self.vae_path, self._vae_subfolder)
        return load_config(AutoencoderKL, self.folder, "vae")

    @property
    def _vae_factor(self) -> int:
        return int(2 ** (len(self._vae_config["block_out_channels"]) - 1))

    def _check_vae(self) -> None:
        wanted, has = self._denoiser_config.get("in_channels", 4), self._vae_config.get("latent_channels", 4)
        if wanted != has:
            raise UserError(
                f"the VAE of {self.vae_path or self.path!r} has {has} latent channels, but the denoiser of "
                f"{self.path!r} takes {wanted}. Use a VAE made for this family of models."
            )

    # What a model does -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def kohya(self) -> KohyaNames:
        """What this model is called in LoRA files of the kohya layout."""

    @cached_property
    def text_length(self) -> int:
        """Tokens of a prompt that the text encoders see, padding included."""
        name, kind = next(iter(self.encoder_classes.items()))
        config: Any = kind.config_class.from_pretrained(self.folder, subfolder=name)
        return int(config.max_position_embeddings)

    @property
    @abstractmethod
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """What :meth:`encode_prompts` gives for one prompt, by its keys, without the first dimension."""

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str], *, grad: bool = False, warn: bool = True) -> dict[str, Tensor]:
        """Encode prompts as the pipeline encodes its (positive) prompt.

        Args:
            prompts: B prompts; "" is allowed and is encoded like any other.
            grad: keep the gradient with respect to the text encoders' parameters.
            warn: warn, once per call, how many prompts are too long for the encoders and were cut.

        Returns:
            Tensors whose first dimension is B, under the keys that :meth:`predict` expects, in :attr:`dtype`.
        """

    def encode_unconditional(self) -> dict[str, Tensor]:
        """What the pipeline puts in the place of a prompt for guidance where no negative prompt is given: one row."""
        return self.encode_prompts([""])

    @abstractmethod
    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        text: Mapping[str, Tensor],
        sizes: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """The denoiser's output, pure in ``denoiser``, which may be wrapped by DDP or torch.compile.

        Args:
            latents: noisy latents (B, C, h, w), any float dtype.
            timesteps: (B,).
            text: what :meth:`encode_prompts` gave for B prompts.
            sizes: int64 (B, 6): original height and width, crop top and left, target height and width, in pixels.
                None is an uncropped image of the latents' own size. Families without size conditioning ignore it.
            timestep_cond: embedded guidance (B, dim), for a denoiser that has :meth:`add_guidance_embedding`.

        Returns:
            (B, C, h, w), float32: epsilon, v or a velocity, as :attr:`noise_process` says.
        """

    def add_guidance_embedding(self, dim: int) -> None:
        """Let the denoiser be told its guidance scale, by ``timestep_cond``; diffusers calls it time_cond_proj_dim.

        The new weights are 0: until they are trained the denoiser predicts what it did before.

        Raises:
            UserError: the denoiser has one already.
        """
        if self.denoiser.config.time_cond_proj_dim is not None:
            raise UserError(
                f"the denoiser of {self.path!r} is told its guidance scale already (time_cond_proj_dim "
                f"{self.denoiser.config.time_cond_proj_dim}): it is a distilled model. Distil its teacher instead."
            )
        embedding = self.denoiser.time_embedding
        first = embedding.linear_1
        projection = nn.Linear(
            dim, first.in_features, bias=False, device=first.weight.device, dtype=first.weight.dtype
        )
        nn.init.zeros_(projection.weight)
        embedding.cond_proj = projection.requires_grad_(False)
        self.denoiser.register_to_config(time_cond_proj_dim=dim)

    def add_lora(
        self,
        spec: LoraSpec,
        *,
        text_encoders: bool = False,
        adapter_name: str = "default",
        seed: int | None = None,
    ) -> int:
        """Add a LoRA to the denoiser and, if asked, to the text encoders (there always to their attention).

        Returns:
            The number of trainable parameters; see :func:`diffalign.pipelines.lora.add_lora`.
        """
        count = add_lora(self.denoiser, spec, adapter_name, targets=self.lora_targets, seed=seed)
        if text_encoders:
            for encoder in self.text_encoders.values():
                text_spec = replace(spec, targets=self.text_lora_targets)
                count += add_lora(encoder, text_spec, adapter_name, seed=seed)
        return count

    def truncated(self, prompts: Sequence[str]) -> list[int]:
        """Indices of the prompts that are longer than an encoder can read."""
        return sorted({i for tokenizer in self.tokenizers.values() for i in tokenize(tokenizer, prompts)[1]})

    def encode_images(
        self,
        images: Tensor,
        *,
        posterior: Literal["mean", "sample"] = "mean",
        generators: Sequence[torch.Generator] | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] to scaled latents (B, C, h, w), float32, without gradient.

        Args:
            posterior: the posterior's mean, or a "sample" drawn with one CPU generator per image.
            chunk: how many images the VAE sees at once; None is all.
        """
        with at_work(self.vae, self.device, rest=self.offload_idle) as vae:
            return vae_io.encode(vae, images.to(self.device), posterior=posterior, generators=generators, chunk=chunk)

    def decode_latents(self, latents: Tensor, *, grad: bool = False, chunk: int | None = None) -> Tensor:
        """Scaled latents (B, C, h, w) to images (B, 3, H, W) in [0, 1], float32.

        Args:
            grad: keep the gradient with respect to ``latents``; see :func:`diffalign.pipelines.vae.decode`.
            chunk: how many latents the VAE sees at once; None is all.
        """
        with at_work(self.vae, self.device, rest=self.offload_idle and not grad) as vae:
            return vae_io.decode(vae, latents, grad=grad, chunk=chunk)

    def pipeline(self, *, scheduler: str | None = None) -> DiffusionPipeline:
        """The real diffusers pipeline around the live parts, with whatever LoRA they carry now.

        The safety checker is off. Train or eval mode of the denoiser is left as it is: with LoRA dropout, put it in
        eval mode before sampling.

        Args:
            scheduler: None for the checkpoint's own, or a name of :data:`diffalign.pipelines.schedulers.NAMES`.
        """
        index = load_config(DiffusionPipeline, self.folder, None)
        parts = {self.denoiser_part: self.denoiser, "vae": self.vae, **self.text_encoders}
        parts |= {name.replace("text_encoder", "tokenizer"): value for name, value in self.tokenizers.items()}
        parts |= dict.fromkeys(self.unused_parts)
        parts["scheduler"] = make_scheduler(scheduler or index["scheduler"][1], self.scheduler_config)
        known = inspect.signature(self.pipeline_class.__init__).parameters
        options = {key: value for key, value in index.items() if key in known and not isinstance(value, list)}
        pipe = self.pipeline_class(**{**options, **parts, **self._pipeline_options()})
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _pipeline_options(self) -> dict[str, Any]:
        """Arguments of the pipeline's constructor that are not the checkpoint's."""
        return {}

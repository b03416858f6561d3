"""The latent proxy reward model of RG-LCD: a CLIP that looks at latents and learns to score as an expert does.

Li, Feng, Chen, Wang 2024, "Reward Guided Latent Consistency Distillation", arXiv 2403.11027. The expert may be any
reward, with a gradient or without; what trains a student is the gradient of the proxy, which passes no VAE.

For three candidates of one prompt (the student's one-step prediction, the target's, the real image), expert logits e
and the proxy's logits l = exp(logit_scale) cos(latents, prompt):

    L = sum over pairs i < j of KL( softmax(e_i, e_j) || softmax(l_i, l_j) )

What differs from the authors' code: the patch embedding of latents starts as that of the CLIP on the small RGB image
that is the best linear function of the latents, not at random, so that the layers that stay frozen see what they know.
The proxy takes latents as the denoiser does, scaled to unit variance. It stays in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffalign.rewards.encoders import TransformersEncoder, clip_scores, embed_texts, unit, unwrap
from diffalign.rewards.objectives import bradley_terry_losses

CANDIDATES = ("student", "target", "real")
PAIRS = ((0, 1), (0, 2), (1, 2))
MAX_LOGIT_SCALE = math.log(100)
"""CLIP's own limit on what it learns as the scale of its cosines."""

ProxyLoss = Literal["kl", "cross_entropy"]


def proxy_loss(expert: Tensor, proxy: Tensor, kind: ProxyLoss = "kl", smooth_gt_label: bool = False) -> Tensor:
    """The proxy's loss on the candidates of B prompts, (B,), float32 (float64 stays); a sum over the three pairs.

    Args:
        expert: logits of (student, target, real), (B, 3), without gradient: a difference d is preferred with
            probability sigmoid(d).
        proxy: logits likewise, (B, 3).
        kind: "kl" as above. "cross_entropy" takes the expert's choice in each pair as certain (equal logits as a tie),
            and the real image for the better one whatever the expert says.
        smooth_gt_label: with "kl", where the expert prefers a generated image to the real one, it is taken to be
            undecided: the proxy is not taught that anything beats a real image.
    """
    expert = expert.detach()
    losses = []
    for i, j in PAIRS:
        difference = expert[:, i] - expert[:, j]
        real = CANDIDATES[j] == "real"
        if kind == "cross_entropy":
            # The authors' code takes the argmax over the batch; a label is of its own pair.
            label = torch.zeros_like(difference) if real else torch.heaviside(difference, difference.new_tensor(0.5))
        else:
            label = torch.sigmoid(difference)
            if smooth_gt_label and real:
                label = label.clamp(max=0.5)
        losses.append(bradley_terry_losses(proxy[:, i], proxy[:, j], label))
    return torch.stack(losses).sum(0)


def proxy_agreement(expert: Tensor, proxy: Tensor) -> tuple[Tensor, Tensor]:
    """Of the pairs of B prompts that the expert does not hold equal, how many the proxy ranks alike: (right, decided).

    Args:
        expert, proxy: logits (B, 3). A pair that the proxy holds equal counts half.
    """
    signs = [torch.sign(torch.stack([s[:, i] - s[:, j] for i, j in PAIRS])) for s in (expert, proxy.detach())]
    decided = signs[0] != 0
    right = torch.where(decided, 0.5 + 0.5 * signs[0] * signs[1], 0.0)
    return right.sum(), decided.sum()


@torch.no_grad()
def fit_colours(latents: Tensor, images: Tensor) -> Tensor:
    """The affine map from a latent to the colour beneath it, by least squares: (3, C + 1), float32; the last is added.

    Args:
        latents: (N, C, h, w).
        images: what they decode to, (N, 3, H, W) in [0, 1].
    """
    small = interpolate(images.double(), size=latents.shape[-2:], mode="area")
    inputs = latents.double().movedim(1, -1).flatten(0, -2)
    inputs = torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)
    # Few and flat pictures leave some direction open; the smallest of all solutions is then the one to take.
    solution = torch.linalg.pinv(inputs.T @ inputs) @ inputs.T @ small.movedim(1, -1).flatten(0, -2)
    return solution.T.float()


class LatentProxy(nn.Module):
    """``exp(logit_scale)`` times the cosine of latents and prompt.

    Args:
        encoder: the CLIP to start from; becomes part of this and is changed.
        latent_shape: (C, h, w) of the usual latents; others are taken too.
        colours: of :func:`fit_colours`.
        image_groups, text_groups: how many groups of each tower train, counted from the end: the projection, the last
            layer with the norm after it, each layer before, the embeddings. None trains the whole tower. The patch
            embedding, which is new, and the logit scale always train.
    """

    def __init__(
        self,
        encoder: TransformersEncoder,
        latent_shape: Sequence[int],
        colours: Tensor,
        image_groups: int | None = 2,
        text_groups: int | None = 5,
    ) -> None:
        super().__init__()
        self.clip: Any = encoder.model
        self.tokenizer, self.context = encoder.tokenizer, encoder.context
        self.requires_grad_(False)
        embeddings = self.clip.vision_model.embeddings
        grid = embeddings.image_size // embeddings.patch_size
        patch = patch_size(min(latent_shape[1:]), grid)
        mean, std = (torch.tensor(values) for values in (encoder.preprocess.mean, encoder.preprocess.std))
        colours = torch.cat([colours[:, :-1], colours[:, -1:] - mean[:, None]], 1) / std[:, None]
        embeddings.patch_embedding = latent_patches(embeddings.patch_embedding.weight, colours, patch)
        embeddings.patch_size = patch
        _unlock(_image_groups(self.clip), image_groups)
        _unlock(_text_groups(self.clip), text_groups)
        embeddings.patch_embedding.requires_grad_(True)
        self.clip.logit_scale.requires_grad_(True)

    def forward(self, latents: Tensor, prompts: list[str]) -> Tensor:
        """Logits (B,), float32, of latents (B, C, h, w) and their prompts."""
        device = latents.device
        options = {"padding": True, "truncation": True, "max_length": self.context, "return_tensors": "pt"}
        with torch.autocast(device.type, enabled=False):
            ids = self.tokenizer(prompts, **options).input_ids.to(device)
            # Positions of another grid than the CLIP's own are interpolated, as its library does for larger images.
            seen = self.clip.get_image_features(pixel_values=latents.float(), interpolate_pos_encoding=True)
            return clip_scores(self.clip, unit(unwrap(seen)), embed_texts(self.clip, ids))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No parameter gets a gradient of what is computed inside; inputs do."""
        trained = [p for p in self.parameters() if p.requires_grad]
        self.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)

    @torch.no_grad()
    def limit_scale(self) -> None:
        """Keep the logit scale within CLIP's limit."""
        self.clip.logit_scale.clamp_(max=MAX_LOGIT_SCALE)


def patch_size(side: int, grid: int) -> int:
    """Side of a patch of latents, a divisor of ``side`` that gives a grid nearest to ``grid`` patches a side."""
    divisors = [p for p in range(1, side + 1) if side % p == 0]
    return min(divisors, key=lambda p: (abs(math.log(side / p / grid)), p))


@torch.no_grad()
def latent_patches(weight: Tensor, colours: Tensor, patch: int) -> nn.Conv2d:
    """A patch embedding of latents that gives what that of pixels gives for the RGB image they stand for.

    Args:
        weight: of the embedding of pixels, (D, 3, P, P).
        colours: from latents to normalised pixels, (3, C + 1).
        patch: side of a patch of latents.
    """
    channels = colours.shape[1] - 1
    made = nn.Conv2d(channels, len(weight), patch, stride=patch)
    # A latent covers (P / patch)^2 pixels of one colour, so their weights add up.
    kernel = interpolate(weight.float(), size=(patch, patch), mode="area") * (weight.shape[-1] / patch) ** 2
    made.weight.copy_(torch.einsum("drij,rc->dcij", kernel, colours[:, :-1]))
    assert made.bias is not None
    made.bias.copy_(kernel.sum((2, 3)) @ colours[:, -1])
    return made


def _image_groups(clip: Any) -> list[list[nn.Module]]:
    tower = clip.vision_model
    layers = list(tower.encoder.layers)
    last = [layers[-1], tower.post_layernorm]
    return [
        [tower.embeddings, tower.pre_layrnorm],
        *([layer] for layer in layers[:-1]),
        last,
        [clip.visual_projection],
    ]


def _text_groups(clip: Any) -> list[list[nn.Module]]:
    tower = clip.text_model
    layers = list(tower.encoder.layers)
    last = [layers[-1], tower.final_layer_norm]
    return [[tower.embeddings], *([layer] for layer in layers[:-1]), last, [clip.text_projection]]


def _unlock(groups: list[list[nn.Module]], count: int | None) -> None:
    for group in groups if count is None else groups[len(groups) - min(count, len(groups)) :]:
        for module in group:
            module.requires_grad_(True)

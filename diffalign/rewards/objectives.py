"""Objectives that train reward models on preferences. Pure functions of tensors.

All take the scores of the two images of B pairs and the probability that the first is preferred: 1, 0, anything
between for a soft label, 0.5 for a tie. Each returns the losses of the pairs, (B,) float32 (float64 stays); weigh them
by :func:`prompt_weights` and sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from diffalign.errors import UserError

TIE_CONSTANT = 5.0
"""k of HPSv3's tie form."""


def bradley_terry_losses(scores_0: Tensor, scores_1: Tensor, label_0: Tensor) -> Tensor:
    """Divergence of the softmax of two scores from the label (Kirstain et al. 2023, "Pick-a-Pic", section 4).

    With ``p = softmax([scores_0, scores_1])`` and ``y = [label_0, 1 - label_0]``: ``sum_k y_k (log y_k - log p_k)``.
    For a choice this is Bradley-Terry's cross-entropy ``-log sigmoid(difference)``; for a tie cross-entropy plus
    log 0.5, so that its optimum is 0 and not log 2. The gradient is that of cross-entropy in every case.

    Args:
        scores_0, scores_1: (B,) logits, such as ``exp(logit_scale) * cosine``, of the first and the second image.
        label_0: (B,) in [0, 1].
    """
    difference, label = _ready(scores_0, scores_1, label_0)
    entropy = torch.special.xlogy(label, label) + torch.special.xlogy(1 - label, 1 - label)
    return entropy - label * logsigmoid(difference) - (1 - label) * logsigmoid(-difference)


def rao_kupper_losses(
    scores_0: Tensor, scores_1: Tensor, label_0: Tensor, tie_constant: float = TIE_CONSTANT
) -> Tensor:
    """Negative log-likelihood in which a tie is an outcome of its own (Rao and Kupper 1967; HPSv3, arXiv 2508.03789).

    With d the difference of the scores and k = ``tie_constant``::

        P(first) = 1 / (1 + k exp(-d))    P(second) = 1 / (1 + k exp(d))
        P(tie) = (k^2 - 1) / ((1 + k exp(-d)) (1 + k exp(d)))

    The three sum to 1; at d = 0 and k = 5 they are 1/6, 1/6 and 2/3. A label of exactly 0.5 is a tie; any other soft
    label mixes the two choices.

    Args:
        scores_0, scores_1: (B,) scores of the first and the second image.
        label_0: (B,) in [0, 1].
        tie_constant: k, above 1; 1 would be Bradley-Terry, in which ties are impossible.

    Raises:
        UserError: k is not above 1.
    """
    if not tie_constant > 1:
        raise UserError(f"tie_constant must be above 1 (at 1 a tie is impossible), got {tie_constant}")
    difference, label = _ready(scores_0, scores_1, label_0)
    log_k = math.log(tie_constant)
    lost_0, lost_1 = softplus(log_k - difference), softplus(log_k + difference)
    tie = lost_0 + lost_1 - math.log(tie_constant**2 - 1)
    return torch.where(label == 0.5, tie, label * lost_0 + (1 - label) * lost_1)


def prompt_weights(num_example_per_prompt: Tensor) -> Tensor:
    """Weights (B,) that sum to 1, proportional to 1 / how many examples share the prompt (PickScore's trainer).

    So prompts with many examples do not dominate. Give those of the whole step, over processes and accumulation.
    """
    weights = 1 / num_example_per_prompt.to(torch.promote_types(num_example_per_prompt.dtype, torch.float32))
    return weights / weights.sum()


def pickscore_loss(
    scores_0: Tensor, scores_1: Tensor, label_0: Tensor, num_example_per_prompt: Tensor | None = None
) -> Tensor:
    """PickScore's loss, a scalar: :func:`bradley_terry_losses` weighted by :func:`prompt_weights`.

    Without ``num_example_per_prompt`` all weigh the same.
    """
    losses = bradley_terry_losses(scores_0, scores_1, label_0)
    return losses.mean() if num_example_per_prompt is None else (losses * prompt_weights(num_example_per_prompt)).sum()


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, same: Tensor) -> Tensor:
    """CLIP's symmetric cross-entropy of images against texts, a scalar (Radford et al. 2021, arXiv 2103.00020).

    Args:
        images, texts: unit embeddings (B, P); row i of one belongs to row i of the other.
        scale: ``exp(logit_scale)``, a scalar.
        same: (B, B) bool, True where two rows have the same text: these are no negatives of each other.
    """
    own = torch.eye(len(images), dtype=torch.bool, device=images.device)
    logits = (scale * images @ texts.T).masked_fill(same & ~own, -torch.inf)
    rows = torch.arange(len(images), device=images.device)
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, rows) + cross_entropy(logits.T, rows)) / 2


def _ready(scores_0: Tensor, scores_1: Tensor, label_0: Tensor) -> tuple[Tensor, Tensor]:
    """Difference of the scores and label, float32 or more."""
    dtype = torch.promote_types(scores_0.dtype, torch.float32)
    return scores_0.to(dtype) - scores_1.to(dtype), label_0.to(dtype)

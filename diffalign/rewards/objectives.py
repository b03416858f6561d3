"""Objectives that train reward models. Pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def pickscore_loss(
    scores_0: Tensor, scores_1: Tensor, label_0: Tensor, num_example_per_prompt: Tensor | None = None
) -> Tensor:
    """PickScore's preference loss (Kirstain et al. 2023, "Pick-a-Pic", section 4).

    Per example, with ``p = softmax([scores_0, scores_1])`` and labels ``y = [label_0, 1 - label_0]``, the divergence
    ``KL(y || p) = sum_k y_k (log y_k - log p_k)``: cross-entropy for a choice, and for a tie cross-entropy plus
    log 0.5, so that the optimum of a tie is 0 and not log 2. Examples are weighted by 1 / ``num_example_per_prompt``,
    normalised over the batch, so that prompts with many examples do not dominate.

    Args:
        scores_0, scores_1: (B,) logits ``exp(logit_scale) * cosine`` of the first and second image. Gather them over
            processes first: the weights are normalised over all that is given.
        label_0: (B,) probability in [0, 1] that the first image is preferred; 0.5 is a tie.
        num_example_per_prompt: (B,) how many examples share the prompt, 1 or more. None: all weigh the same.

    Returns:
        The loss, a scalar of 0 or more, float32.
    """
    log_p = torch.log_softmax(torch.stack([scores_0.float(), scores_1.float()], dim=-1), dim=-1)
    labels = torch.stack([label_0.float(), 1 - label_0.float()], dim=-1)
    losses = (torch.special.xlogy(labels, labels) - labels * log_p).sum(-1)
    if num_example_per_prompt is None:
        return losses.mean()
    weights = 1 / num_example_per_prompt.float()
    return (losses * weights / weights.sum()).sum()

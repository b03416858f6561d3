"""The head of the LAION aesthetic predictor v2: a score of 1 to 10 from a CLIP image embedding, without a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from diffalign.errors import UserError

LAION_WIDTHS = (768, 1024, 128, 64, 16, 1)
_DROPOUT = (0.2, 0.2, 0.1)
_LINEARS = (0, 2, 4, 6, 7)


class AestheticHead(nn.Module):
    """Five linear layers without activations (christophschuhmann/improved-aesthetic-predictor).

    Its state dict has the published keys, ``layers.{0,2,4,6,7}.{weight,bias}``. ``widths`` are the sizes from the
    embedding to the score. Embeddings are normalised here, in float32: left out, scores are off by tens.
    """

    def __init__(self, widths: Sequence[int] = LAION_WIDTHS) -> None:
        super().__init__()
        if len(widths) != len(LAION_WIDTHS) or widths[-1] != 1:
            raise UserError(f"an aesthetic head has six widths, the last one 1, like {LAION_WIDTHS}; got {widths}.")
        self.widths = tuple(widths)
        modules: list[nn.Module] = []
        for index, (inputs, outputs) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            modules.append(nn.Linear(inputs, outputs))
            if index < len(_DROPOUT):
                modules.append(nn.Dropout(_DROPOUT[index]))
        self.layers = nn.Sequential(*modules)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> AestheticHead:
        """A head in eval mode with these weights, its widths read from their shapes. Raises ``UserError`` naming
        the keys where they are not those of this head."""
        expected = {f"layers.{index}.{part}" for index in _LINEARS for part in ("weight", "bias")}
        if set(state) != expected:
            raise UserError(
                f"not an aesthetic head of linear layers: expected keys {', '.join(sorted(expected))}; "
                f"found {', '.join(sorted(state)) or 'none'}."
            )
        first = state["layers.0.weight"]
        head = cls([first.shape[1], *(state[f"layers.{index}.weight"].shape[0] for index in _LINEARS)])
        head.load_state_dict({key: value.float() for key, value in state.items()})
        return head.eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Image embeddings (B, P), normalised or not, to scores (B,) of about 1 to 10."""
        unit = normalize(embeddings if embeddings.dtype == torch.float64 else embeddings.float(), dim=-1)
        scores: Tensor = self.layers(unit).squeeze(-1)
        return scores

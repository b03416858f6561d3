from __future__ import annotations

import pytest
import torch

from diffalign.rewards.aesthetic import AestheticHead


def filled(widths: list[int]) -> AestheticHead:
    """A head in float64 with weights from a cosine, as in the published layout's reference example."""
    head = AestheticHead(widths).double().eval()
    linears = [module for module in head.layers if isinstance(module, torch.nn.Linear)]
    for index, linear in enumerate(linears):
        for parameter, scale in ((linear.weight, 1.0), (linear.bias, 0.1)):
            k = torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)
            parameter.data = scale * torch.cos(0.7 * k + index)
    return head


def test_reference_numbers_of_a_tiny_head() -> None:
    inputs = torch.tensor([[1, 2, 3, 4, 5, 6], [6, -5, 4, -3, 2, -1]], dtype=torch.float64)
    assert filled([6, 8, 5, 4, 3, 1])(inputs).tolist() == pytest.approx([-0.29763731, -0.29015412], abs=1e-8)


def test_reference_numbers_of_the_full_layout() -> None:
    k = torch.arange(768, dtype=torch.float64)
    inputs = torch.stack([torch.sin(0.01 * (k + 1)), torch.cos(0.03 * k)])
    head = filled([768, 1024, 128, 64, 16, 1])
    assert head(inputs).tolist() == pytest.approx([-256.814033, -256.374926], abs=1e-5)


def test_state_dict_round_trip_keeps_widths_and_scores() -> None:
    torch.manual_seed(0)
    head = AestheticHead([6, 8, 5, 4, 3, 1]).eval()
    again = AestheticHead.from_state_dict(head.state_dict())
    x = torch.randn(4, 6)
    assert again.widths == (6, 8, 5, 4, 3, 1) and not again.training
    torch.testing.assert_close(again(x), head(x))


def test_keys_of_another_head_are_named() -> None:
    state = {f"layers.{index}.{part}": torch.zeros(1) for index in (0, 3, 6, 9, 11) for part in ("weight", "bias")}
    with pytest.raises(ValueError, match="layers.11.bias"):
        AestheticHead.from_state_dict(state)


def test_gradient_reaches_the_embedding() -> None:
    x = torch.randn(2, 6, requires_grad=True)
    AestheticHead([6, 8, 5, 4, 3, 1]).eval()(x).sum().backward()
    assert x.grad is not None and x.grad.abs().sum() > 0

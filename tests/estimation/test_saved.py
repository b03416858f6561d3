"""What a pass keeps for its backward pass, counted on the meta device, against what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffalign.diffusion.error import per_sample_mse
from diffalign.estimation.tracing import Networks, trace
from diffalign.estimation.work import Model, Pass

SAMPLES = 4


def kept_by_autograd(found: Networks) -> int:
    """Bytes that a real forward pass on random weights keeps, weights apart."""
    module = found.denoiser
    for parameter in module.parameters():
        parameter.grad = None
    torch.nn.Module.to_empty(module, device="cpu")
    for tensor in (*module.parameters(), *module.buffers()):
        torch.nn.init.normal_(tensor.data, std=0.02)
    module.train()
    given = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in given:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    side = found.family.default_resolution
    shape = found.family.latent_shape(side, side)
    text = {name: torch.randn(SAMPLES, *own) for name, own in found.family.text_shapes.items()}
    latents, target = torch.randn(2, SAMPLES, *shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pred = found.family.predict(module, latents, torch.full((SAMPLES,), 500), text)
        per_sample_mse(pred, target).mean()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_as_much_is_counted_as_autograd_keeps(full: bool) -> None:
    model = Model("shapes-sdxl", full=full)
    counted = trace(model, Pass("", "denoiser", SAMPLES, grad=True), "cpu").saved
    assert counted == pytest.approx(kept_by_autograd(Networks(model)), rel=0.02)

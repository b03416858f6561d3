"""LoRA: adding, switching off, and files that plain diffusers and we read back alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from diffalign.errors import UserError
from diffalign.pipelines import (
    LoraSpec,
    adapters_off,
    add_lora,
    load_family,
    load_lora_state,
    lora_parameters,
    save_lora,
)
from diffalign.pipelines.base import Family

WIDE = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out")


@pytest.fixture(params=["sd", "sdxl"])
def path(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(f"tiny_{request.param}_path")


def modules(family: Family) -> dict[str, nn.Module]:
    return {family.denoiser_part: family.denoiser, **family.text_encoders}


def trained(path: str, text: bool = True, targets: tuple[str, ...] | None = WIDE, **options: object) -> Family:
    """A family with a LoRA that does something, alpha unlike rank."""
    family = load_family(path, **options)
    family.add_lora(LoraSpec(rank=4, alpha=3.0, targets=targets), text_encoders=text, seed=1)
    generator = torch.Generator().manual_seed(2)
    for module in modules(family).values():
        for parameter in lora_parameters(module).values():
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return family


def sample(pipe: DiffusionPipeline) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipe("a red circle", num_inference_steps=3, generator=generator, output_type="pt").images


def merged(module: nn.Module, adapter: str = "default") -> dict[str, torch.Tensor]:
    """Weights with the LoRA added, by its definition W + alpha / rank B A."""
    from peft.tuners.lora import LoraLayer

    out = {}
    for name, layer in module.named_modules():
        if isinstance(layer, LoraLayer):
            a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            update = (b.flatten(1) @ a.flatten(1)).view_as(layer.base_layer.weight)
            out[name] = (layer.base_layer.weight + layer.lora_alpha[adapter] / layer.r[adapter] * update).detach()
    return out


# Adding


def test_lora_is_trainable_float32_and_starts_as_the_base(path):
    family = load_family(path, dtype=torch.bfloat16)
    latents, text = torch.randn(1, 4, 16, 16), family.encode_prompts(["a"])
    before = family.predict(family.denoiser, latents, torch.tensor([5]), text)
    count = family.add_lora(LoraSpec(rank=2), seed=0)
    live = lora_parameters(family.denoiser)
    assert count == sum(p.numel() for p in live.values()) == family.denoiser.num_parameters(only_trainable=True) > 0
    assert {p.dtype for p in live.values()} == {torch.float32} and all(p.requires_grad for p in live.values())
    assert {name.split(".lora_")[0].split("attn", 1)[1][2:] for name in live} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert torch.equal(family.predict(family.denoiser, latents, torch.tensor([5]), text), before)


def test_seed_decides_the_first_weights(tiny_sdxl_path):
    def weights(seed: int | None, **spec: object) -> torch.Tensor:
        family = load_family(tiny_sdxl_path)
        family.add_lora(LoraSpec(**spec), seed=seed)
        return torch.cat([p.flatten() for p in lora_parameters(family.denoiser).values()])

    state = torch.get_rng_state()
    first = weights(3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(9)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)
    assert not torch.equal(weights(3, init="default"), first)


def test_text_encoders_get_their_own_targets(path):
    family = load_family(path)
    family.add_lora(LoraSpec(rank=2, targets=("to_q",)), text_encoders=True)
    for encoder in family.text_encoders.values():
        assert {name.split(".lora_")[0].split(".")[-1] for name in lora_parameters(encoder)} == {
            "q_proj",
            "k_proj",
            "v_proj",
            "out_proj",
        }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, but is 0"),
        ({"rank": -4}, "is -4"),
        ({"rank": 2.5}, "is 2.5"),
        ({"rank": True}, "is True"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "is nan"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"targets": "to_q"}, "list of module names"),
        ({"targets": ()}, "list of module names"),
        ({"init": "pissa"}, "not one of gaussian, default"),
    ],
)
def test_bad_specs(values, words):
    with pytest.raises(UserError, match=words):
        LoraSpec(**values)


def test_unknown_target_names_a_near_one(tiny_sdxl_path):
    family = load_family(tiny_sdxl_path)
    with pytest.raises(UserError, match=r"'to_qq' matches no .*Did you mean 'to_q'\?.*conv1"):
        family.add_lora(LoraSpec(targets=("to_k", "to_qq")))
    with pytest.raises(UserError, match="'attn1' matches no linear"):
        family.add_lora(LoraSpec(targets=("attn1",)))
    assert lora_parameters(family.denoiser) == {}
    family.add_lora(LoraSpec())
    with pytest.raises(UserError, match="already has a LoRA named 'default'"):
        family.add_lora(LoraSpec())


# Switching off


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.module(*args, **kwargs)


def test_adapters_off_is_the_base_bit_for_bit_and_comes_back(path):
    base, family = load_family(path), trained(path)
    latents, t, text = torch.randn(1, 4, 16, 16), torch.tensor([5]), base.encode_prompts(["a red circle"])

    def predict(which: Family, module: nn.Module | None = None) -> torch.Tensor:
        with torch.no_grad():
            return which.predict(module or which.denoiser, latents, t, text)

    on = predict(family)
    wrapped = Wrapped(torch.compile(family.denoiser, backend="eager"))
    assert not torch.allclose(on, predict(base))
    with adapters_off(wrapped):
        assert torch.equal(predict(family), predict(base))
        with adapters_off(family.denoiser):
            assert torch.equal(predict(family), predict(base))
        assert torch.equal(predict(family), predict(base))
    assert torch.equal(predict(family), on)
    with pytest.raises(KeyError), adapters_off(wrapped):
        raise KeyError
    assert torch.equal(predict(family), on)


def test_adapters_off_restores_what_was_frozen(tiny_sdxl_path):
    family = trained(tiny_sdxl_path, text=False)
    add_lora(family.denoiser, LoraSpec(rank=2), "frozen")
    for parameter in lora_parameters(family.denoiser, "frozen").values():
        parameter.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in family.denoiser.named_parameters()}
    with adapters_off(family.denoiser):
        assert not any(p.requires_grad for p in family.denoiser.parameters())
    assert {name: p.requires_grad for name, p in family.denoiser.named_parameters()} == flags


def test_gradient_survives_a_reference_pass_in_between(tiny_sdxl_path):
    family = trained(tiny_sdxl_path, text=False)
    latents, t, text = torch.randn(1, 4, 16, 16), torch.tensor([5]), family.encode_prompts(["a"])

    def gradient(reference: bool) -> torch.Tensor:
        family.denoiser.zero_grad()
        loss = family.predict(family.denoiser, latents, t, text).square().mean()
        if reference:
            with torch.no_grad(), adapters_off(family.denoiser):
                family.predict(family.denoiser, latents, t, text)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in lora_parameters(family.denoiser).values()])

    assert torch.equal(gradient(True), gradient(False)) and gradient(True).abs().sum() > 0


def test_adapters_off_without_adapters_is_a_mistake(tiny_sdxl_path):
    with pytest.raises(ValueError, match="no adapters to switch off"), adapters_off(nn.Linear(2, 2)):
        pass


def test_parameter_names_do_not_depend_on_wrapping(tiny_sdxl_path):
    family = trained(tiny_sdxl_path, text=False)
    bare = lora_parameters(family.denoiser)
    compiled = lora_parameters(torch.compile(family.denoiser, backend="eager"))
    assert list(compiled) == list(bare) and all(compiled[name] is bare[name] for name in bare)


# Files


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_plain_diffusers_samples_the_saved_lora_bit_for_bit(path, layout, tmp_path):
    family = trained(path)
    file = save_lora(family, tmp_path / "run", layout=layout)
    assert file.name == ("pytorch_lora_weights.safetensors" if layout == "diffusers" else "run_comfyui.safetensors")
    plain = DiffusionPipeline.from_pretrained(path)
    base = sample(plain)
    plain.load_lora_weights(str(file.parent), weight_name=file.name)
    ours = sample(family.pipeline())
    assert torch.equal(sample(plain), ours) and not torch.equal(base, ours)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
def test_both_layouts_merge_to_the_same_weights(path, layout, tmp_path):
    family = trained(path)
    file = save_lora(family, tmp_path, layout=layout)
    plain = DiffusionPipeline.from_pretrained(path)
    plain.load_lora_weights(str(tmp_path), weight_name=file.name)
    plain.fuse_lora(components=[*modules(family)])
    plain.unload_lora_weights()
    for part, module in modules(family).items():
        want = merged(module)
        got = dict(getattr(plain, part).named_modules())
        assert want
        for name, weight in want.items():
            torch.testing.assert_close(got[name].weight, weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact_in_float32(path, layout, dtype, tmp_path):
    family = trained(path, dtype=dtype)
    file = save_lora(family, tmp_path, layout=layout)
    other = load_family(path, dtype=dtype)
    assert set(load_lora_state(other, file)) == set(modules(family))
    for part, module in modules(family).items():
        ours, theirs = lora_parameters(module), lora_parameters(modules(other)[part])
        assert ours.keys() == theirs.keys()
        for name, weight in ours.items():
            assert torch.equal(weight, theirs[name]) and theirs[name].dtype == torch.float32
            assert theirs[name].requires_grad
    if dtype == torch.float32:
        assert torch.equal(sample(other.pipeline()), sample(family.pipeline()))


def test_reading_into_an_adapter_that_exists_replaces_its_weights(tiny_sdxl_path, tmp_path):
    family = trained(tiny_sdxl_path, text=False)
    save_lora(family, tmp_path)
    other = load_family(tiny_sdxl_path)
    other.add_lora(LoraSpec(rank=4, alpha=3.0, targets=WIDE))
    live = lora_parameters(other.denoiser)
    assert load_lora_state(other, tmp_path) == ("unet",)
    after = lora_parameters(other.denoiser)
    for name, weight in lora_parameters(family.denoiser).items():
        assert torch.equal(after[name], weight) and after[name] is live[name] and after[name].requires_grad
    assert "text_encoders" not in other.loaded
    load_lora_state(other, tmp_path, adapter_name="reference", trainable=False)
    assert not any(p.requires_grad for p in lora_parameters(other.denoiser, "reference").values())


def test_adapter_that_does_not_fit_is_named(tiny_sdxl_path, tiny_sd_path, tmp_path):
    save_lora(trained(tiny_sdxl_path, text=False), tmp_path)
    narrow = load_family(tiny_sdxl_path)
    narrow.add_lora(LoraSpec(rank=2, targets=WIDE))
    with pytest.raises(UserError, match=r"is \(4, .* in the file and \(2, .* in the model"):
        load_lora_state(narrow, tmp_path)
    few = load_family(tiny_sdxl_path)
    few.add_lora(LoraSpec(rank=4))
    with pytest.raises(UserError, match="and nothing in the model"):
        load_lora_state(few, tmp_path)
    with pytest.raises(UserError, match="does not fit"):
        load_lora_state(load_family(tiny_sd_path), tmp_path)


def test_ema_weights_are_written_in_place_of_the_live_ones(tiny_sdxl_path, tmp_path):
    family = trained(tiny_sdxl_path, text=False)
    ema = {name: p.detach() * 2 for name, p in lora_parameters(family.denoiser).items()}
    for layout in ("diffusers", "kohya"):
        file = save_lora(family, tmp_path, layout=layout, state={"unet": ema})
        other = load_family(tiny_sdxl_path)
        load_lora_state(other, file)
        assert all(torch.equal(p, ema[name]) for name, p in lora_parameters(other.denoiser).items())
    with pytest.raises(ValueError, match="no LoRA parameter is named 'x'"):
        save_lora(family, tmp_path, state={"unet": {"x": torch.zeros(1)}})


def test_diffusers_file_carries_the_adapters_config(tiny_sdxl_path, tmp_path):
    save_lora(trained(tiny_sdxl_path), tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        header = json.loads(file.metadata()["lora_adapter_metadata"])
        keys = list(file.keys())
    assert header["unet.r"] == 4 and header["unet.lora_alpha"] == 3.0
    assert header["text_encoder.target_modules"] == sorted(["q_proj", "k_proj", "v_proj", "out_proj"])
    assert {key.split(".")[0] for key in keys} == {"unet", "text_encoder", "text_encoder_2"}
    assert all(key.split(".")[1] == "text_model" for key in keys if key.startswith("text_encoder"))
    assert tiny_sdxl_path not in json.dumps(header)


def test_saving_is_whole_or_not_at_all(tiny_sdxl_path, tmp_path, monkeypatch):
    family = trained(tiny_sdxl_path, text=False)
    file = save_lora(family, tmp_path)
    before = file.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        save_lora(family, tmp_path)
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [file.name]


def test_nothing_to_save(tiny_sdxl_path, tmp_path):
    with pytest.raises(UserError, match="no LoRA named 'default' to save"):
        save_lora(load_family(tiny_sdxl_path), tmp_path)
    family = trained(tiny_sdxl_path, text=False)
    with pytest.raises(UserError, match="no LoRA named 'default' to save"):
        save_lora(family, tmp_path, text_encoders=True)
    with pytest.raises(UserError, match="layout 'comfy'"):
        save_lora(family, tmp_path, layout="comfy")  # type: ignore[arg-type]


@pytest.mark.parametrize("targets", [None, WIDE])
def test_a_part_has_keys_of_one_kind(tiny_sdxl_path, tmp_path, targets):
    """diffusers' loader takes a part with names of both kinds for one with peft's names, and drops the others."""
    keys = list(load_file(save_lora(trained(tiny_sdxl_path, targets=targets), tmp_path)))
    unet = [key for key in keys if key.startswith("unet.")]
    assert all((".lora_A." in key or ".lora_B." in key) == (targets is WIDE) for key in unet)
    assert all(".lora_linear_layer." in key for key in set(keys) - set(unet))


def test_text_encoders_can_be_left_out(tiny_sdxl_path, tmp_path):
    file = save_lora(trained(tiny_sdxl_path), tmp_path, text_encoders=False)
    assert all(key.startswith("unet.") for key in load_file(file))


def test_unreadable_files(tiny_sdxl_path, tmp_path):
    family = load_family(tiny_sdxl_path)

    def refuses(path: Path | str, words: str) -> None:
        with pytest.raises(UserError, match=words):
            load_lora_state(family, path)

    refuses(tmp_path, "no .safetensors file")
    refuses(tmp_path / "nothing", "there is no LoRA at")
    (tmp_path / "a.bin").touch()
    refuses(tmp_path / "a.bin", "is not a .safetensors file")
    (tmp_path / "a.safetensors").write_bytes(b"no")
    refuses(tmp_path / "a.safetensors", "could not be read as a LoRA")
    (tmp_path / "b.safetensors").touch()
    refuses(tmp_path, r"several \(a.safetensors, b.safetensors\)")

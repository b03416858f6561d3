from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from diffalign.errors import UserError
from diffalign.evaluation import models
from diffalign.evaluation.draw import sample_images
from diffalign.evaluation.models import ModelSpec, applied, fingerprint, identity, part_kind, unique_names


@pytest.fixture(scope="module")
def pipe(tiny_sdxl_path: str) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(tiny_sdxl_path)


def draw(pipe: DiffusionPipeline) -> np.ndarray:
    return np.asarray(sample_images(pipe, ["a red circle"], [0], num_inference_steps=2)[0])


def test_words(lora_paths: list[str], tiny_sdxl_path: str) -> None:
    a, b = lora_paths
    assert ModelSpec.parse("base") == ModelSpec("base")
    assert ModelSpec.parse(a) == ModelSpec("lora-0", loras=((a, 1.0),))
    assert ModelSpec.parse(f"{a}@0.8") == ModelSpec("lora-0 @0.8", loras=((a, 0.8),))
    assert ModelSpec.parse(f"mine={a}@-.5") == ModelSpec("mine", loras=((a, -0.5),))
    assert ModelSpec.parse(f"{a}@0.5+{b}") == ModelSpec("lora-0 @0.5 + lora-1", loras=((a, 0.5), (b, 1.0)))
    assert ModelSpec.parse(f"base+{a}") == ModelSpec.parse(a)
    file = f"{a}/pytorch_lora_weights.safetensors"
    assert ModelSpec.parse(file) == ModelSpec("lora-0", loras=((file, 1.0),))
    assert ModelSpec.parse(f"other={tiny_sdxl_path}+{a}@2") == ModelSpec("other", tiny_sdxl_path, ((a, 2.0),))
    assert ModelSpec.parse(f"{tiny_sdxl_path}/unet").denoiser == f"{tiny_sdxl_path}/unet"


def test_odd_paths(lora_paths: list[str], scratch: Path) -> None:
    for name in ("a=b", "with+plus", "at@0.5"):
        shutil.copytree(lora_paths[0], scratch / name)
        assert ModelSpec.parse(name) == ModelSpec(name, loras=((name, 1.0),))
    assert ModelSpec.parse("at@0.5@2") == ModelSpec("at@0.5 @2", loras=(("at@0.5", 2.0),))
    shutil.copytree(lora_paths[0], scratch / "runs/dpo/checkpoint-10")
    assert ModelSpec.parse("runs/dpo/checkpoint-10").name == "dpo/checkpoint-10"
    (scratch / "full/unet").mkdir(parents=True)
    (scratch / "full/unet/config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert ModelSpec.parse("full") == ModelSpec("full", denoiser="full")


def test_hub_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_hub_has_pipeline", lambda path: path == "owner/pipeline")
    assert ModelSpec.parse("owner/pipeline+owner/style@0.5") == ModelSpec(
        "pipeline + style @0.5", "owner/pipeline", (("owner/style", 0.5),)
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no-such-thing", "nothing at 'no-such-thing'"),
        ("./nowhere/x", "nothing at './nowhere/x'"),
        ("name=", "NAME=PATH"),
        ("base+", "empty part"),
        ("base@0.5", "only a LoRA takes a scale"),
        ("empty", "neither a pipeline"),
        ("notes.txt", r"neither a folder nor a \.safetensors"),
    ],
)
def test_wrong_words(text: str, message: str, scratch: Path) -> None:
    (scratch / "empty").mkdir()
    (scratch / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=message):
        ModelSpec.parse(text)


def test_two_pipelines_are_one_too_many(tiny_sdxl_path: str, tiny_sd_path: str) -> None:
    with pytest.raises(UserError, match="two pipelines"):
        ModelSpec.from_parts([tiny_sdxl_path, tiny_sd_path])


def test_names_are_made_unique() -> None:
    specs = unique_names([ModelSpec("a"), ModelSpec("b"), ModelSpec("a")])
    assert [spec.name for spec in specs] == ["a", "b", "a (2)"]


def test_what_is_applied_is_what_plain_diffusers_gives_and_is_taken_off_again(
    pipe: DiffusionPipeline, lora_paths: list[str], tiny_sdxl_path: str
) -> None:
    before = draw(pipe)
    theirs = DiffusionPipeline.from_pretrained(tiny_sdxl_path)
    theirs.load_lora_weights(lora_paths[0], adapter_name="one")
    full = draw(theirs)
    theirs.load_lora_weights(lora_paths[1], adapter_name="two")
    theirs.set_adapters(["one", "two"], [0.5, 2.0])
    mixed = draw(theirs)
    with applied(pipe, ModelSpec.parse(lora_paths[0])):
        assert np.array_equal(draw(pipe), full)
    assert np.array_equal(draw(pipe), before)
    with applied(pipe, ModelSpec.parse(f"{lora_paths[0]}@0.5+{lora_paths[1]}@2")):
        assert np.array_equal(draw(pipe), mixed)
    assert np.array_equal(draw(pipe), before)
    assert not np.array_equal(full, before) and not np.array_equal(mixed, full)
    with pytest.raises(RuntimeError, match="inside"), applied(pipe, ModelSpec.parse(lora_paths[0])):
        raise RuntimeError("inside")
    assert np.array_equal(draw(pipe), before)


def test_fine_tuned_denoiser(pipe: DiffusionPipeline, tiny_sdxl_path: str, tmp_path: Path) -> None:
    before = draw(pipe)
    unet = UNet2DConditionModel.from_pretrained(tiny_sdxl_path, subfolder="unet")
    with torch.no_grad():
        unet.conv_out.bias += 0.3
    unet.save_pretrained(tmp_path / "run/unet")
    with applied(pipe, ModelSpec.parse(str(tmp_path / "run"))):
        assert not np.array_equal(draw(pipe), before)
    assert np.array_equal(draw(pipe), before)


def test_what_does_not_fit_is_refused(
    pipe: DiffusionPipeline, tiny_sd_path: str, lora_paths: list[str], tmp_path: Path
) -> None:
    before = draw(pipe)
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with (
        pytest.raises(UserError, match=r"broken\.safetensors"),
        applied(pipe, ModelSpec("x", loras=((str(tmp_path / "broken.safetensors"), 1.0),))),
    ):
        pass
    other = DiffusionPipeline.from_pretrained(tiny_sd_path)
    with (
        pytest.raises(UserError, match="Was it trained on this model"),
        applied(other, ModelSpec.parse(lora_paths[0])),
    ):
        pass
    config = json.loads((Path(tiny_sd_path) / "vae/config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="AutoencoderKL, which"), applied(pipe, ModelSpec("x", denoiser=str(tmp_path))):
        pass
    assert np.array_equal(draw(pipe), before)


def test_two_files_in_a_folder_are_ambiguous(lora_paths: list[str], tmp_path: Path) -> None:
    weights = Path(lora_paths[0]) / "pytorch_lora_weights.safetensors"
    for name in ("one.safetensors", "two.safetensors"):
        shutil.copy(weights, tmp_path / name)
    assert part_kind(str(tmp_path)) == "lora"
    with pytest.raises(UserError, match="one.safetensors, two.safetensors"):
        identity(ModelSpec.parse(str(tmp_path)), str(tmp_path))
    shutil.copy(weights, tmp_path)
    assert identity(ModelSpec.parse(str(tmp_path)), str(tmp_path))["loras"] == [[fingerprint(weights), 1.0]]


def test_identity_follows_the_weights_and_not_the_place(
    tiny_sdxl_path: str, lora_paths: list[str], tmp_path: Path
) -> None:
    copy = shutil.copytree(tiny_sdxl_path, tmp_path / "copy")
    spec = ModelSpec.parse(f"{lora_paths[0]}@0.5")
    first = identity(spec, tiny_sdxl_path)
    (copy / "samples").mkdir()
    (copy / "samples/settings.json").write_text("{}")
    assert identity(spec, str(copy)) == first
    assert identity(ModelSpec.parse(f"{lora_paths[1]}@0.5"), tiny_sdxl_path) != first
    weights = next((copy / "unet").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert identity(spec, str(copy)) != first


def test_large_files_are_told_apart_by_their_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_WHOLE_HASH", 100)
    monkeypatch.setattr(models, "_PARTIAL_HASH", 10)
    file = tmp_path / "w.safetensors"
    seen = set()
    for content in (b"a" * 200, b"b" + b"a" * 199, b"a" * 199 + b"b", b"a" * 201):
        file.write_bytes(content)
        seen.add(fingerprint(file))
    assert len(seen) == 4

"""Finding a checkpoint's family, and saying what is wrong where there is none."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffalign.errors import UserError
from diffalign.pipelines import load_family


def model(source: str, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def test_family_is_found_by_model_index(tiny_sd_path, tiny_sdxl_path):
    assert load_family(tiny_sd_path).name == "sd"
    assert load_family(tiny_sdxl_path).name == "sdxl"
    assert load_family(tiny_sdxl_path).path == tiny_sdxl_path


def test_unknown_family_lists_the_known_ones(tiny_sdxl_path, tmp_path):
    folder = model(tiny_sdxl_path, tmp_path / "m")
    index = folder / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionXLPipelin"}))
    with pytest.raises(UserError, match=r"knows StableDiffusionPipeline, .*mean 'StableDiffusionXLPipeline'"):
        load_family(str(folder))


def test_broken_index(tiny_sdxl_path, tmp_path):
    folder = model(tiny_sdxl_path, tmp_path / "m")
    (folder / "model_index.json").write_text("{")
    with pytest.raises(UserError, match=r"model_index.json cannot be read"):
        load_family(str(folder))


def test_folder_without_index_says_what_it_probably_is(tiny_sdxl_path, tmp_path):
    def refuses(folder: Path, words: str) -> None:
        with pytest.raises(UserError, match=f"(?s)has no model_index.json.*{words}"):
            load_family(str(folder))

    refuses(tmp_path, "save_pretrained")
    refuses(Path(tiny_sdxl_path) / "unet", "one part of a model")
    refuses(Path(tiny_sdxl_path).parent, f"Perhaps you mean .*{Path(tiny_sdxl_path).name}")
    (tmp_path / "sd_xl_base.safetensors").touch()
    refuses(tmp_path, "single-file checkpoint.*from_single_file")
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    refuses(tmp_path, "looks like a LoRA")


def test_single_file_and_missing_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(UserError, match=r"is a single file.*from_single_file"):
        load_family(str(file))
    with pytest.raises(UserError, match=r"there is no folder '.*nothing'"):
        load_family(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="there is no folder './here'"):
        load_family("./here")


def test_hub_id_that_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"(?s)'diffalign/no-such-model' is not a folder here.*hf auth login"):
        load_family("diffalign/no-such-model")


def test_missing_and_broken_parts_are_named(tiny_sdxl_path, tmp_path):
    folder = model(tiny_sdxl_path, tmp_path / "m")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="could not load 'unet'"):
        _ = load_family(str(folder)).denoiser
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(UserError, match="has no 'text_encoder_2' folder"):
        load_family(str(folder)).encode_prompts(["a"])
    shutil.rmtree(folder / "vae")
    with pytest.raises(UserError, match="vae' has no readable config.json"):
        load_family(str(folder))


def test_pickled_weights_are_not_read(tiny_sdxl_path, tmp_path):
    folder = model(tiny_sdxl_path, tmp_path / "m")
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="could not load 'unet'"):
        _ = load_family(str(folder)).denoiser


def test_missing_variant_is_an_error(tiny_sd_path):
    with pytest.raises(UserError, match="could not load 'unet'"):
        _ = load_family(tiny_sd_path, variant="fp16").denoiser


def test_package_imports_without_torch():
    code = "import sys, diffalign.pipelines as p; assert 'torch' not in sys.modules; assert 'load_family' in dir(p)"
    subprocess.run([sys.executable, "-c", code], check=True)
    import diffalign.pipelines

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = diffalign.pipelines.nothing


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_hub_ids_in_the_cache_load_without_a_network(kind, request, tmp_path, monkeypatch):
    source = request.getfixturevalue(f"tiny_{kind}_path")
    commit = "0123456789abcdef0123456789abcdef01234567"

    def cached(name: str, folder: str) -> Path:
        repo = tmp_path / f"models--owner--{name}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        return model(folder, repo / "snapshots" / commit)

    snapshot = cached("tiny", source)
    cached("vae", f"{source}/vae")
    for module in ("huggingface_hub.constants", "huggingface_hub.file_download", "huggingface_hub._snapshot_download"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(tmp_path), raising=False)
    family = load_family("owner/tiny")
    assert (family.name, family.path, Path(family.folder)) == (kind, "owner/tiny", snapshot)
    assert family.encode_prompts(["a"])["prompt_embeds"].shape[0] == 1
    replaced = load_family("owner/tiny", vae="owner/vae")
    assert all(torch.equal(a, b) for a, b in zip(replaced.vae.parameters(), family.vae.parameters(), strict=True))
    assert replaced.fingerprint("vae") != family.fingerprint("vae")
    with pytest.raises(UserError, match="'owner/absent' has no readable config.json"):
        load_family("owner/tiny", vae="owner/absent")

"""HPSv2 on a file with the published names, against open_clip itself and against its conversion to transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.rewards.checkpoints import read_weights
from diffalign.rewards.clip import PickScore
from diffalign.rewards.hps import HPSv2, HPSv21
from diffalign.rewards.open_clip_encoder import architecture, clip_config
from diffalign.rewards.pixels import OPENAI_MEAN, OPENAI_STD

PROMPTS = ["a red circle", "Two   dogs &amp; a cat, in the style of an oil painting!", "a small green diamond"]


def published_names(vision_layers: int, text_layers: int) -> set[str]:
    """Of the weights in HPS_v2_compressed.pt and HPS_v2.1_compressed.pt, which have 32 and 24 layers."""
    names = {"positional_embedding", "text_projection", "logit_scale", "token_embedding.weight"}
    names |= {f"ln_final.{part}" for part in ("weight", "bias")}
    names |= {f"visual.{name}" for name in ("class_embedding", "positional_embedding", "proj", "conv1.weight")}
    names |= {f"visual.{name}.{part}" for name in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    modules = ("ln_1", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    for tower, layers in (("visual.transformer", vision_layers), ("transformer", text_layers)):
        for n in range(layers):
            block = f"{tower}.resblocks.{n}"
            names |= {f"{block}.{module}.{part}" for module in modules for part in ("weight", "bias")}
            names |= {f"{block}.attn.in_proj_{part}" for part in ("weight", "bias")}
    return names


def converted(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of transformers for the weights of open_clip."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        new = name.replace("visual.transformer.resblocks", "vision_model.encoder.layers")
        new = re.sub(r"^transformer\.resblocks", "text_model.encoder.layers", new)
        for ours, theirs in (
            ("attn.out_proj", "self_attn.out_proj"),
            ("ln_1", "layer_norm1"),
            ("ln_2", "layer_norm2"),
        ):
            new = new.replace(ours, theirs)
        new = new.replace("mlp.c_fc", "mlp.fc1").replace("mlp.c_proj", "mlp.fc2")
        if "attn.in_proj_" in new:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                result[new.replace("attn.in_proj_", f"self_attn.{letter}_proj.")] = part.clone()
            continue
        renamed = {
            "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
            "positional_embedding": "text_model.embeddings.position_embedding.weight",
            "visual.class_embedding": "vision_model.embeddings.class_embedding",
            "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
            "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
            "text_projection": "text_projection.weight",
            "visual.proj": "visual_projection.weight",
        }
        new = renamed.get(new, new).replace("visual.ln_pre", "vision_model.pre_layrnorm")
        new = new.replace("visual.ln_post", "vision_model.post_layernorm").replace(
            "ln_final", "text_model.final_layer_norm"
        )
        result[new] = value.T.contiguous() if new in ("text_projection.weight", "visual_projection.weight") else value
    return result


def pictures(*size: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in PROMPTS]


def hps(folder: Path, kind: type[HPSv2] = HPSv21, **options: object) -> HPSv2:
    return kind(str(options.pop("checkpoint", folder)), str(folder / "tiny.json"), device="cpu", **options)  # type: ignore[arg-type]


def test_names_are_those_of_the_published_files(hps_path: Path) -> None:
    assert set(read_weights(hps_path / HPSv21.file_name)) == published_names(2, 2)
    assert len(published_names(32, 24)) == 686
    with init_empty_weights(include_buffers=False):
        whole = open_clip.CLIP(**architecture("ViT-H-14"))
    shapes = {name: tuple(value.shape) for name, value in whole.state_dict().items()}
    assert set(shapes) == published_names(32, 24)
    assert shapes["visual.transformer.resblocks.31.attn.in_proj_weight"] == (3840, 1280)
    assert shapes["visual.positional_embedding"] == (257, 1280) and shapes["visual.proj"] == (1280, 1024)
    assert sum(value.numel() for value in whole.parameters()) == pytest.approx(986.1e6, rel=1e-4)


@pytest.mark.parametrize("size", [(28, 28), (40, 52), (60, 33), (20, 14)])
def test_score_is_the_cosine_of_open_clip_on_a_letterboxed_picture(hps_path: Path, size: tuple[int, int]) -> None:
    config = json.loads((hps_path / "tiny.json").read_text())
    model = open_clip.CLIP(**config).eval()
    model.load_state_dict(torch.load(hps_path / HPSv21.file_name, weights_only=True)["state_dict"])
    rows = []
    for picture in pictures(*size):
        pixels = vision.to_tensor(picture)
        scale = 28 / max(size)
        height, width = round(size[0] * scale), round(size[1] * scale)
        pixels = vision.resize(pixels, [height, width], InterpolationMode.BICUBIC, antialias=True)
        left, top = (28 - width) // 2, (28 - height) // 2
        pixels = vision.pad(pixels, [left, top, 28 - width - left, 28 - height - top])
        rows.append(vision.normalize(pixels, OPENAI_MEAN, OPENAI_STD))
    with torch.no_grad():
        images = model.encode_image(torch.stack(rows), normalize=True)
        texts = model.encode_text(open_clip.SimpleTokenizer()(PROMPTS), normalize=True)
    expected = (images * texts).sum(-1)
    output = hps(hps_path)(pictures(*size), PROMPTS)
    torch.testing.assert_close(output.rewards, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(output.details["cosine"], output.rewards) and output.rewards.std() > 0.01


def test_converted_weights_score_alike(hps_path: Path, tmp_path: Path) -> None:
    state = converted(read_weights(hps_path / HPSv21.file_name))
    images = pictures(40, 52)
    expected = hps(hps_path)(images, PROMPTS).rewards
    save_file(state, tmp_path / "file.safetensors")
    file = hps(hps_path, checkpoint=tmp_path / "file.safetensors")
    torch.testing.assert_close(file(images, PROMPTS).rewards, expected, atol=1e-5, rtol=1e-5)
    model = CLIPModel(clip_config(architecture(str(hps_path / "tiny.json"))))
    model.load_state_dict(state)
    model.save_pretrained(tmp_path / "folder")
    folder = hps(hps_path, checkpoint=tmp_path / "folder")
    torch.testing.assert_close(folder(images, PROMPTS).rewards, expected, atol=1e-5, rtol=1e-5)
    assert folder.encoder.context == 77


def test_it_is_pickscore_without_scale_on_a_square(hps_path: Path, tmp_path: Path) -> None:
    model = CLIPModel(clip_config(architecture(str(hps_path / "tiny.json"))))
    model.load_state_dict(converted(read_weights(hps_path / HPSv21.file_name)))
    model.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28).save_pretrained(tmp_path)
    words = open_clip.SimpleTokenizer()
    start, end = (name.replace("<", "<|").replace(">", "|>") for name in ("<startoftext>", "<endoftext>"))
    vocab = {
        token.replace("<start_of_text>", start).replace("<end_of_text>", end): i for token, i in words.encoder.items()
    }
    CLIPTokenizer(vocab=vocab, merges=list(words.bpe_ranks)).save_pretrained(tmp_path)
    images = pictures(28, 28)
    prompts = [PROMPTS[0], "two dogs, in the style of an oil painting!", PROMPTS[2]]
    logits = PickScore(str(tmp_path), device="cpu")(images, prompts).rewards
    cosines = hps(hps_path)(images, prompts).rewards
    torch.testing.assert_close(logits, model.logit_scale.exp().item() * cosines, atol=1e-4, rtol=1e-4)


def test_both_versions_find_their_file(hps_path: Path) -> None:
    old, new = hps(hps_path, HPSv2), hps(hps_path)
    assert (old.name, new.name, old.scale) == ("hpsv2", "hpsv2.1", "cosine")
    images = pictures(28, 28)
    assert not torch.allclose(old(images, PROMPTS).rewards, new(images, PROMPTS).rewards, atol=1e-3)
    single = hps(hps_path, HPSv2, checkpoint=hps_path / "HPS_v2.1_compressed.pt")
    assert torch.equal(single(images, PROMPTS).rewards, new(images, PROMPTS).rewards)
    named = load_reward(f"hpsv2.1:{hps_path}", architecture=str(hps_path / "tiny.json"))
    assert torch.equal(named(images, PROMPTS).rewards, new(images, PROMPTS).rewards)
    assert old.identity != new.identity


def test_antialias_is_a_choice_that_changes_scores(hps_path: Path) -> None:
    images = pictures(80, 80)
    with_it, without = hps(hps_path), hps(hps_path, antialias=False)
    assert (with_it(images, PROMPTS).rewards - without(images, PROMPTS).rewards).abs().max() > 1e-3
    assert with_it.identity != without.identity


@pytest.mark.parametrize("form", ["bare", "module", "safetensors"])
def test_forms_of_the_file(hps_path: Path, tmp_path: Path, form: str) -> None:
    state = read_weights(hps_path / HPSv21.file_name)
    file = tmp_path / "weights.pt"
    if form == "bare":
        torch.save(state, file)
    elif form == "module":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, file)
    else:
        file = tmp_path / "HPS_v2.1_compressed.safetensors"
        save_file(state, file)
    place = tmp_path if form == "safetensors" else file
    expected = hps(hps_path)(pictures(28, 28), PROMPTS).rewards
    assert torch.equal(hps(hps_path, checkpoint=place)(pictures(28, 28), PROMPTS).rewards, expected)


def test_wrong_files_are_named(hps_path: Path, head_path: Path, clip_path: str, tmp_path: Path) -> None:
    def wrong(change: object, message: str) -> None:
        file = tmp_path / "wrong.pt"
        torch.save({"state_dict": change}, file)
        with pytest.raises(UserError, match=message):
            hps(hps_path, checkpoint=file)(pictures(28, 28), PROMPTS)

    state = read_weights(hps_path / HPSv21.file_name)
    wrong({k: v for k, v in state.items() if k != "visual.proj"}, r"wrong.pt' is not .*lacks: 1 \(visual.proj\)$")
    wrong({**state, "head.weight": torch.ones(2)}, r"have no place: 1 \(head.weight\)$")
    wrong({**state, "visual.proj": torch.ones(40, 8)}, r"another shape: 1 \(visual.proj \(40, 8\) for \(40, 16\)\)$")
    wrong({}, "lacks: 62 ")
    with pytest.raises(UserError, match=r"is not a checkpoint of a ViT-H-14 of open_clip: weights it lacks: 624 "):
        HPSv21(str(hps_path), device="cpu")(pictures(28, 28), PROMPTS)
    with pytest.raises(UserError, match=r"weights it lacks: 62 .*no place: 10 \(layers.0.bias"):
        hps(hps_path, checkpoint=head_path)(pictures(28, 28), PROMPTS)
    with pytest.raises(UserError, match="has [0-9]+ tokens, but CLIP's tokenizer"):
        hps(hps_path, checkpoint=clip_path)(pictures(28, 28), PROMPTS)
    with pytest.raises(UserError, match=r"expected HPS_v2.1_compressed.pt or .*, found other.txt\. Or give the file"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty/other.txt").touch()
        hps(hps_path, checkpoint=tmp_path / "empty")(pictures(28, 28), PROMPTS)
    with pytest.raises(UserError, match="no weights of hpsv2.1: there is no weight file /nowhere.pt"):
        hps(hps_path, checkpoint="/nowhere.pt")(pictures(28, 28), PROMPTS)
    with pytest.raises(UserError, match="the reward hpsv2.1 has no option 'processor'"):
        load_reward("hpsv2.1", processor="somewhere")


def test_wrong_architectures_are_named(hps_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"open_clip has no model 'ViT-H-15'\. Did you mean .*ViT-H-1"):
        HPSv21(str(hps_path), "ViT-H-15", device="cpu")(pictures(28, 28), PROMPTS)
    with pytest.raises(UserError, match="xlm-roberta-base-ViT-B-32 of open_clip is not a plain CLIP"):
        HPSv21(str(hps_path), "xlm-roberta-base-ViT-B-32", device="cpu")(pictures(28, 28), PROMPTS)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="it lacks embed_dim"):
        HPSv21(str(hps_path), str(tmp_path / "a.json"), device="cpu")(pictures(28, 28), PROMPTS)
    shutil.copy(hps_path / "tiny.json", tmp_path / "b.json")
    again = HPSv21(str(hps_path), str(tmp_path / "b.json"), device="cpu")
    assert torch.equal(again(pictures(28, 28), PROMPTS).rewards, hps(hps_path)(pictures(28, 28), PROMPTS).rewards)

"""CLIPScore by models of transformers and open_clip, against the libraries' own processors and models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import AutoTokenizer, BertConfig, CLIPModel, CLIPProcessor, SiglipImageProcessor, SiglipModel

from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.rewards.clipscore import CLIPScore
from diffalign.rewards.open_clip_encoder import is_open_clip

PROMPTS = ["a red circle", "a blue square on a gray background", "a cross"]


def pictures(*size: int) -> list[Image.Image]:
    """Smooth blots of colour."""
    rng = np.random.default_rng(0)
    blots = [Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8)) for _ in PROMPTS]
    return [blot.resize((size[1], size[0]), Image.Resampling.BICUBIC) for blot in blots]


def cosine(checkpoint: str, images: list[Image.Image], **options: object) -> Tensor:
    return CLIPScore(checkpoint, form="cosine", device="cpu", **options)(images, PROMPTS).rewards  # type: ignore[arg-type]


def test_forms(clip_path: str) -> None:
    images = pictures(28, 28)
    bare = cosine(clip_path, images)
    assert bare.min() < 0 < bare.max()
    x100 = CLIPScore(clip_path, device="cpu")(images, PROMPTS)
    torch.testing.assert_close(x100.rewards, 100 * bare.clamp(min=0))
    torch.testing.assert_close(x100.details["cosine"], bare)
    paper = CLIPScore(clip_path, form="w2.5", device="cpu")
    texts = [f"A photo depicts {prompt}" for prompt in PROMPTS]
    with_prefix = CLIPScore(clip_path, form="cosine", device="cpu")(images, texts).rewards
    assert not torch.allclose(with_prefix, bare, atol=1e-3)
    torch.testing.assert_close(paper(images, PROMPTS).rewards, 2.5 * with_prefix.clamp(min=0))
    plain = CLIPScore(clip_path, form="w2.5", prompt_prefix="", device="cpu")
    torch.testing.assert_close(plain(images, PROMPTS).rewards, 2.5 * bare.clamp(min=0))
    assert paper.typical == pytest.approx((0.25, 1.125)) and x100.rewards.max() <= 100


@pytest.mark.parametrize("size", [(28, 28), (40, 60), (33, 25)])
def test_clip_of_transformers(clip_path: str, size: tuple[int, int]) -> None:
    inputs = CLIPProcessor.from_pretrained(clip_path)(
        images=pictures(*size), text=PROMPTS, padding=True, return_tensors="pt"
    )
    model = CLIPModel.from_pretrained(clip_path).eval()
    with torch.no_grad():
        output = model(**inputs)
    expected = cosine_similarity(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(cosine(clip_path, pictures(*size)), expected, atol=2e-3, rtol=0)


@pytest.mark.parametrize("size", [(28, 28), (40, 60), (33, 25)])
def test_siglip_of_transformers(siglip_path: str, size: tuple[int, int]) -> None:
    pixels = SiglipImageProcessor.from_pretrained(siglip_path)(images=pictures(*size), return_tensors="pt")
    tokenizer = AutoTokenizer.from_pretrained(siglip_path)
    ids = tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt").input_ids
    model = SiglipModel.from_pretrained(siglip_path).eval()
    with torch.no_grad():
        output = model(pixel_values=pixels.pixel_values, input_ids=ids)
    expected = cosine_similarity(output.image_embeds, output.text_embeds)
    torch.testing.assert_close(cosine(siglip_path, pictures(*size)), expected, atol=2e-3, rtol=0)
    reward = CLIPScore(siglip_path, device="cpu")
    reward.prepare()
    assert reward.typical is None


@pytest.mark.parametrize("size", [(28, 28), (40, 60), (33, 25)])
def test_folder_of_open_clip(open_clip_path: str, size: tuple[int, int]) -> None:
    model, transform = open_clip.create_model_from_pretrained(f"local-dir:{open_clip_path}")
    pixels = torch.stack([transform(picture) for picture in pictures(*size)])
    with torch.no_grad():
        images = model.eval().encode_image(pixels)
        texts = model.encode_text(open_clip.get_tokenizer(f"local-dir:{open_clip_path}")(PROMPTS))
    expected = cosine_similarity(images, texts)
    torch.testing.assert_close(cosine(open_clip_path, pictures(*size)), expected, atol=2e-3, rtol=0)


def test_file_for_a_model_that_open_clip_lists(
    open_clip_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small model in its list, and as if a tag of it had this file."""
    config = json.loads((Path(open_clip_path) / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    name = "tiny"
    torch.manual_seed(0)
    model = open_clip.create_model(name).eval()
    file = tmp_path / "weights.pt"
    torch.save({"state_dict": model.state_dict()}, file)
    images = pictures(50, 40)
    with torch.no_grad():
        transform = image_transform_v2(PreprocessCfg(size=28), is_train=False)
        pixels = torch.stack([transform(picture) for picture in images])
        texts = model.encode_text(open_clip.get_tokenizer(name)(PROMPTS))
        expected = cosine_similarity(model.encode_image(pixels), texts)
    torch.testing.assert_close(cosine(f"{name}:{file}", images), expected, atol=2e-3, rtol=0)
    tag = {"hf_hub": "owner/name/weights.pt", "mean": (0.5,) * 3, "quick_gelu": True, "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda model, given: tag if given == "tag" else {})
    monkeypatch.setattr("diffalign.rewards.checkpoints.hf_hub_download", lambda repo, name, **kw: str(tmp_path / name))
    tagged = CLIPScore(f"{name}:tag", device="cpu", local_files_only=True)
    tagged.prepare()
    preprocess, block = tagged.encoder.preprocess, tagged.encoder.model.visual.transformer.resblocks[0]
    assert (preprocess.mean, preprocess.mode) == ((0.5,) * 3, "squash")
    assert type(block.mlp.gelu).__name__ == "QuickGELU"


def test_how_models_of_open_clip_are_named(open_clip_path: str, clip_path: str) -> None:
    assert is_open_clip(open_clip_path) and is_open_clip("hf-hub:owner/name") and is_open_clip("ViT-B-32:openai")
    assert not is_open_clip(clip_path) and not is_open_clip("openai/clip-vit-large-patch14")


def test_the_model_is_part_of_the_name(clip_path: str, siglip_path: str) -> None:
    assert CLIPScore().name == "clipscore:clip-vit-large-patch14"
    named = load_reward(f"clipscore:{siglip_path}", form="cosine")
    assert isinstance(named, CLIPScore) and named.checkpoint == siglip_path
    assert torch.equal(named.to("cpu")(pictures(28, 28), PROMPTS).rewards, cosine(siglip_path, pictures(28, 28)))
    assert named.identity != load_reward(f"clipscore:{clip_path}", form="cosine").identity


def test_wrong_models_are_named(clip_path: str, siglip_path: str, open_clip_path: str, tmp_path: Path) -> None:
    images = pictures(28, 28)
    with pytest.raises(UserError, match=r"form of clipscore is 'x10'\. Did you mean 'x100'"):
        CLIPScore(clip_path, form="x10")  # type: ignore[arg-type]
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="is a bert, not a clip or siglip"):
        cosine(str(tmp_path / "bert"), images)
    with pytest.raises(UserError, match="ViT-B-32's|'nothing' is neither a file nor a tag of open_clip's ViT-B-32"):
        cosine("ViT-B-32:nothing", images)
    with pytest.raises(UserError, match=r"open_clip has no model 'ViT-B-33'\. Did you mean"):
        cosine("ViT-B-33:openai", images)
    with pytest.raises(UserError, match=r"weights_of_nobody|could not load the config from 'nobody/nothing'"):
        cosine("hf-hub:nobody/nothing", images, local_files_only=True)
    shutil.copytree(open_clip_path, tmp_path / "half")
    state = torch.load(tmp_path / "half/open_clip_pytorch_model.bin", weights_only=True)
    del state["visual.proj"]
    torch.save(state, tmp_path / "half/open_clip_pytorch_model.bin")
    with pytest.raises(UserError, match=r"(?s)could not load the model from .*visual.proj"):
        cosine(str(tmp_path / "half"), images)
    (tmp_path / "half/open_clip_pytorch_model.bin").unlink()
    with pytest.raises(UserError, match="could not load the model from"):
        cosine(str(tmp_path / "half"), images)


def test_processors_of_other_models_are_named(clip_path: str, siglip_path: str, tmp_path: Path) -> None:
    images = pictures(28, 28)
    with pytest.raises(UserError, match=r"the tokenizer in .* tokens, but the model has .* as processor="):
        cosine(clip_path, images, processor=siglip_path)
    shutil.copytree(clip_path, tmp_path / "large")
    config = json.loads((tmp_path / "large/processor_config.json").read_text())
    config["image_processor"] |= {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    (tmp_path / "large/processor_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="makes pictures of 56 pixels, but .* takes 28: it is of another model"):
        cosine(clip_path, images, processor=str(tmp_path / "large"))


def test_weights_without_a_place_are_named(clip_path: str, tmp_path: Path) -> None:
    shutil.copytree(clip_path, tmp_path / "more")
    state = load_file(tmp_path / "more/model.safetensors")
    save_file({**state, "adapter.weight": torch.ones(2)}, tmp_path / "more/model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"not a checkpoint of a CLIPModel: weights that have no place: 1 \(adapter"):
        cosine(str(tmp_path / "more"), pictures(28, 28))
    config = json.loads((tmp_path / "more/config.json").read_text())
    (tmp_path / "more/config.json").write_text(json.dumps({**config, "projection_dim": 8}))
    save_file(state, tmp_path / "more/model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"weights of another shape: 2 \(text_projection.weight \(16, 32\) for \(8, 32\)"
    ):
        cosine(str(tmp_path / "more"), pictures(28, 28))

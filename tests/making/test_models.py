"""Captioners and paraphrasers of transformers, as tiny random models with the classes of the real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from diffalign.errors import UserError
from diffalign.making.captioners import ModelCaptioner, load_captioner
from diffalign.making.paraphrasers import ModelParaphraser, load_paraphraser

WORDS = [
    *("<pad>", "<s>", "</s>", "<unk>", "<image>"),
    *("describe", "a", "red", "blue", "circle", "square", "lexical", "order", "=", "100"),
]


def tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = PreTrainedTokenizerFast(tokenizer_object=raw, **special)
    made.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return made


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a LLaVA that answers at random, with a chat template."""
    folder = tmp_path_factory.mktemp("llava")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=16, patch_size=8, **sizes),
        text_config=LlamaConfig(vocab_size=len(WORDS), num_key_value_heads=2, bos_token_id=1, eos_token_id=2, **sizes),
        image_token_index=WORDS.index("<image>"),
        image_token_id=WORDS.index("<image>"),
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template="{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image> {% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}",
    ).save_pretrained(folder)
    return str(folder)


def test_a_vision_language_model_sees_image_and_prompt(llava: str) -> None:
    images = [Image.new("RGB", (20, 24), color) for color in ("red", "blue", "white")]
    captioner = load_captioner(llava, instruction="describe {prompt}", max_new_tokens=5)
    assert isinstance(captioner, ModelCaptioner)
    prompts = ["a red circle", "square", "a"]
    found = captioner(images, prompts)
    # Prompts of other lengths in the batch change nothing; neither image nor instruction is in the answer.
    assert [captioner([i], [p])[0] for i, p in zip(images, prompts, strict=True)] == found
    for caption in found:
        assert caption is None or len(caption.split()) <= 5
    asked = captioner._processor(
        images=[[images[0]]], text=[captioner._turn("describe a red circle")], return_tensors="pt"
    )
    words = captioner._processor.tokenizer.convert_ids_to_tokens(asked["input_ids"][0])
    assert words.count("<image>") == 4 and words[-4:] == ["describe", "a", "red", "circle"]
    captioner.instruction = "{prompt} {prompt} blue"
    assert captioner(images, prompts) != found


def test_a_text_to_text_model_is_sampled_with_its_seed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=len(WORDS),
        d_model=16,
        d_ff=32,
        d_kv=8,
        num_layers=1,
        num_heads=2,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "my-dipper")
    tokenizer().save_pretrained(tmp_path / "words")
    own = load_paraphraser(str(tmp_path / "my-dipper"), "weak", tokenizer=str(tmp_path / "words"))
    assert isinstance(own, ModelParaphraser) and own.dipper and own.diversity == 40
    before = torch.random.get_rng_state()
    results = [own.change("a red circle", seed) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]
    assert torch.equal(torch.random.get_rng_state(), before)
    plain = load_paraphraser(str(tmp_path / "my-dipper"), tokenizer=str(tmp_path / "words"), style="plain")
    assert plain.identity != own.identity and plain.change("a red circle", 1) == plain.change("a red circle", 1)


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded as a captioner"):
        load_captioner(str(tmp_path))([Image.new("RGB", (16, 16))], ["a"])
    with pytest.raises(UserError, match="cannot be loaded as a"):
        load_paraphraser(str(tmp_path / "nothing")).change("a", 0)
    with pytest.raises(UserError, match="no 'missing'"):
        load_captioner("diffalign.making.captioners:missing")

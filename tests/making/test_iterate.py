from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffalign.data.readers import open_pairs
from diffalign.errors import UserError
from diffalign.making import iterate
from diffalign.making.iterate import IterateConfig, run_iterate

REWARD = "def brightness(images, prompts, metadata):\n    return [float(image.mean()) for image in images]\n"


def config(model: str, folder: Path, name: str = "out", **settings: Any) -> IterateConfig:
    (folder / "mine.py").write_text(REWARD)
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    pairs = {"num_images_per_prompt": 2, "num_inference_steps": 1, "guidance_scale": 1.0, "device": "cpu"}
    train = {"resolution": 32, "rank": 2, "max_train_steps": 1, "report_to": ["none"], "learning_rate": 1e-2}
    values: dict[str, Any] = {"rounds": 2, "prompts_per_round": 2, "prompts_file": str(folder / "prompts.txt")}
    values |= {
        "pairs": pairs | {"rewards": [f"{folder / 'mine.py'}:brightness"]},
        "train": train | {"cache_dir": str(folder / "cache"), "train_batch_size": 2},
    }
    return IterateConfig(pretrained_model_name_or_path=model, output_dir=str(folder / name), **(values | settings))


def test_rounds_go_on_from_each_other_and_a_killed_one_resumes(
    tiny_sd_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = run_iterate(config(tiny_sd_path, tmp_path))
    rounds = [json.loads((root / f"round-{r}" / "round.json").read_text()) for r in (0, 1)]
    assert [r["started_from"] for r in rounds] == [tiny_sd_path, str(root / "round-0" / "train")]
    assert [r["reference"] for r in rounds] == ["base", str(root / "round-0" / "train")]
    # Each round has the next prompts, around the end, and seeds of its own.
    assert [p.prompt for p in open_pairs(root / "round-0" / "pairs")] == ["one", "two"]
    assert [p.prompt for p in open_pairs(root / "round-1" / "pairs")] == ["three", "one"]
    ids = [{p.id for p in open_pairs(root / f"round-{r}" / "pairs")} for r in (0, 1)]
    assert not ids[0] & ids[1]
    weights = [load_file(root / f"round-{r}" / "train" / "pytorch_lora_weights.safetensors") for r in (0, 1)]
    final = load_file(root / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(final[k], weights[1][k]) for k in final)
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in final)

    calls: list[str] = []
    original = iterate.run_pairs

    def dies_in_the_second(own: Any) -> Path:
        calls.append(own.output_dir)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(own)

    monkeypatch.setattr(iterate, "run_pairs", dies_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        run_iterate(config(tiny_sd_path, tmp_path, "killed"))
    killed = run_iterate(config(tiny_sd_path, tmp_path, "killed"))
    assert [Path(call).parent.name for call in calls] == ["round-0", "round-1", "round-1"]
    resumed = load_file(killed / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(final[k], resumed[k]) for k in final)
    with pytest.raises(UserError, match="reference is 'start' there"):
        run_iterate(config(tiny_sd_path, tmp_path, "killed", reference="base"))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"rounds": 0}, "rounds"),
        ({"method": "sft"}, "does not learn from pairs"),
        ({"pairs": {"rewards": ["shapes-checker"], "lora": ["x"]}}, "pairs.lora is set by the rounds"),
        ({"train": {"initial_lora": "x"}}, "train.initial_lora is set by the rounds"),
        ({"train": {"train_mode": "full"}}, "train_mode must be lora"),
        ({"train": {"betta": 3}}, "unknown key 'betta'"),
        ({"pairs": {"rewards": ["shapes-checker"], "selekt": "all"}}, "Did you mean 'select'"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], part: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=part):
        config("model", tmp_path, **settings)

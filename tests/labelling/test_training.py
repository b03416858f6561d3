"""What the page is for: draw, choose, train on the choices, and see them recognised as pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffalign.app import label
from diffalign.cli import main
from diffalign.labelling import server
from diffalign.labelling.session import Session


@pytest.mark.slow
def test_a_sitting_becomes_pairs_that_dpo_trains_on(
    tiny_sdxl_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIFFALIGN_CACHE", str(tmp_path / "cache"))
    model = ["--pretrained_model_name_or_path", tiny_sdxl_path]
    drawn, votes, run = (str(tmp_path / name) for name in ("drawn", "votes", "run"))
    few = ["--num_inference_steps", "1", "--num_images_per_prompt", "2", "--device", "cpu"]
    assert main(["sample", *model, "--prompts", "a", "b", "c", *few, "--output_dir", drawn]) == 0

    def sitting(session: Session, listening: object) -> None:
        """Two annotators at the served session, as the page would send it."""
        for name, choices in (("annotator-1", ("left", "right", "tie")), ("annotator-2", ("right", "skip", "left"))):
            for choice in choices:
                item = session.state(name)["item"]["id"]
                session.vote(name, item, choice)

    monkeypatch.setattr(server, "serve", sitting)
    assert label.main([drawn, "--out", votes, "--port", "0"]) == 0
    assert "5 pairs in" in capsys.readouterr().out
    assert json.loads((tmp_path / "votes" / "results.json").read_text())["counts"]["annotator-2"]["skip"] == 1

    settings = ["--max_train_steps", "2", "--train_batch_size", "2", "--rank", "2", "--resolution", "32"]
    settings += ["--mixed_precision", "no", "--validation_prompts", "none"]
    assert main(["train", "dpo", *model, "--dataset_name", votes, "--output_dir", run, *settings]) == 0
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in steps] == [1, 2] and steps[0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()

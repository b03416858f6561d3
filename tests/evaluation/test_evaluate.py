from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.evaluation import draw, sampling
from diffalign.evaluation.eval_config import EvalConfig
from diffalign.evaluation.evaluate import run_eval
from diffalign.evaluation.folder import read_rows
from diffalign.rewards import register, registry
from diffalign.rewards.lpips import LPIPSDiversity

SCORED: list[str] = []
KILL_AFTER: list[int] = []


def red(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
    SCORED.extend(prompts)
    if KILL_AFTER and len(SCORED) > KILL_AFTER[0]:
        raise KeyboardInterrupt
    return images[:, 0].mean((1, 2))


def blue(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
    return images[:, 2].mean((1, 2))


@pytest.fixture(autouse=True)
def rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", {})
    SCORED.clear()
    KILL_AFTER.clear()
    register("red", red)
    register("blue", blue)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(prompt, seed) of every image that a pipeline drew."""
    log: list[tuple[str, int]] = []
    real = draw.iterate_images

    def logged(pipe: Any, prompts: Any, seeds: Any, **settings: Any) -> Any:
        for image, *key in zip(real(pipe, prompts, seeds, **settings), prompts, seeds, strict=True):
            log.append((str(key[0]), int(key[1])))
            yield image

    monkeypatch.setattr(sampling, "iterate_images", logged)
    return log


def config(base: str, out: Path, lora: str, **more: Any) -> EvalConfig:
    settings: dict[str, Any] = {
        "pretrained_model_name_or_path": base,
        "output_dir": str(out),
        "models": [f"tuned={lora}"],
        "rewards": ["red", "blue"],
        "prompts": ["a", "b", "c"],
        "num_images_per_prompt": 2,
        "num_inference_steps": 1,
        "batch_size": 2,
        "score_batch_size": 2,
        "diversity": None,
        "device": "cpu",
        "bootstrap_draws": 200,
        "plots": False,
    }
    return EvalConfig(**{**settings, **more})


def test_a_folder_with_everything_and_a_sweep_of_guidance(
    tiny_sdxl_path: str, lora_paths: list[str], scratch: Path
) -> None:
    file = scratch / "prompts.jsonl"
    rows = [{"prompt": f"prompt {k}", "category": "even" if k % 2 == 0 else "odd"} for k in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = config(
        tiny_sdxl_path,
        scratch / "out",
        lora_paths[0],
        prompts=None,
        prompts_file=str(file),
        guidance_scales=[1.0, 3.0],
        trained_on=["red"],
        plots=True,
    )
    result = run_eval(asked)
    assert result is not None
    scores = read_rows(scratch / "out" / "scores.jsonl")
    assert len(scores) == 2 * 2 * 3 * 2
    assert {row["category"] for row in scores} == {"even", "odd"}
    assert all((scratch / "out" / row["file"]).is_file() and set(row["scores"]) == {"red", "blue"} for row in scores)
    page = (scratch / "out" / "images.html").read_text(encoding="utf-8")
    assert all(f'"src": "{row["file"]}"' in page for row in scores) and '"category": "odd"' in page
    summary = json.loads((scratch / "out" / "summary.json").read_text())
    assert [model["name"] for model in summary["models"]][:2] == [
        "base (guidance 1, 1 steps)",
        "base (guidance 3, 1 steps)",
    ]
    assert [(r["name"], r["role"]) for r in summary["rewards"]] == [("red", "trained on"), ("blue", "held out")]
    # Two rewards: at each of two guidances, and each at its best.
    assert len(summary["comparisons"]["equal"]) == 4
    assert len(summary["comparisons"]["best"]) == 2
    assert {row["setting"] for row in summary["comparisons"]["equal"]} == {"guidance 1", "guidance 3"}
    report = result.report.read_text()
    for text in (
        "Each model at its best guidance",
        "diffalign eval --pretrained",
        "red (trained on)",
        "plots/guidance",
    ):
        assert text in report
    for name in ("win-rates", "guidance", "scores", "pareto"):
        assert (scratch / "out" / "plots" / f"{name}.png").stat().st_size > 2000


def test_killed_while_drawing_and_while_scoring_it_makes_nothing_twice_and_the_same_report(
    tiny_sdxl_path: str,
    lora_paths: list[str],
    scratch: Path,
    drawn: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = scratch / "out"
    asked = config(tiny_sdxl_path, out, lora_paths[0])
    assert run_eval(asked) is not None
    whole = {name: (out / name).read_bytes() for name in ("report.md", "summary.json", "scores.jsonl")}
    assert len(drawn) == 12 and len(SCORED) == 12
    out.rename(scratch / "whole")
    drawn.clear()
    SCORED.clear()

    real = sampling.SampleFolder.add

    def dies(self: Any, case: Any, image: Any, extra: Any) -> None:
        real(self, case, image, extra)
        if len(drawn) == 8:
            raise KeyboardInterrupt

    monkeypatch.setattr(sampling.SampleFolder, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        run_eval(asked)
    monkeypatch.setattr(sampling.SampleFolder, "add", real)
    KILL_AFTER.append(4)
    with pytest.raises(KeyboardInterrupt):
        run_eval(asked)
    assert len(drawn) == len(set(drawn)) * 2 == 12  # every image once of each of two models
    KILL_AFTER.clear()
    before = len(SCORED)
    assert run_eval(asked) is not None
    # The batch that was cut off is scored again, and nothing else.
    assert before == 6 and len(SCORED) == before + 8
    assert len(drawn) == 12
    assert {name: (out / name).read_bytes() for name in whole} == whole


def test_equal_models_are_not_told_apart(tiny_sdxl_path: str, scratch: Path) -> None:
    same = {"model": tiny_sdxl_path, "name": "twin"}
    result = run_eval(config(tiny_sdxl_path, scratch / "out", "", models=[same]))
    assert result is not None
    for row in result.summary["comparisons"]["equal"]:
        assert row["win"]["rate"] == 0.5 and row["p_adjusted"] == 1 and row["difference"]["mean"] == 0
    assert all("not told apart" in line for line in result.summary["conclusions"])
    assert any("--guidance_scales" in line for line in result.summary["warnings"])


def test_what_is_wrong_is_said_before_anything_is_drawn(
    tiny_sdxl_path: str, lora_paths: list[str], scratch: Path, drawn: list[tuple[str, int]]
) -> None:
    with pytest.raises(UserError, match="nothing to score by"):
        config(tiny_sdxl_path, scratch / "out", lora_paths[0], rewards=[])
    with pytest.raises(UserError, match="different numbers"):
        config(tiny_sdxl_path, scratch / "out", lora_paths[0], guidance_scales=[2.0, 2.0])
    with pytest.raises(UserError, match="prompt 0"):
        run_eval(config(tiny_sdxl_path, scratch / "out", lora_paths[0], rewards=["shapes-checker"]))
    assert drawn == []


def test_models_with_settings_of_their_own_and_scales(tiny_sdxl_path: str, lora_paths: list[str]) -> None:
    fast = {"model": lora_paths[0], "name": "fast", "steps": 4, "guidance": 1.0}
    asked = config(
        tiny_sdxl_path,
        Path("out"),
        "",
        models=[fast, f"soft={lora_paths[1]}@0.5"],
        guidance_scales=[2.0, 5.0],
        lora_scales=[0.5, 1.0],
    )
    found = {(v.model, v.guidance, v.steps): [s for _, s in spec.loras] for v, spec in asked.variants().items()}
    assert found == {
        ("base", 2.0, 1): [],
        ("base", 5.0, 1): [],
        ("fast at 0.5", 1.0, 4): [0.5],
        ("fast at 1", 1.0, 4): [1.0],
        ("soft at 0.5", 2.0, 1): [0.25],
        ("soft at 0.5", 5.0, 1): [0.25],
        ("soft at 1", 2.0, 1): [0.5],
        ("soft at 1", 5.0, 1): [0.5],
    }


def test_rewards_of_a_run_are_known_to_be_trained_on(
    tiny_sdxl_path: str, lora_paths: list[str], scratch: Path
) -> None:
    run = scratch / "run"
    run.mkdir()
    (run / "pytorch_lora_weights.safetensors").write_bytes(
        (Path(lora_paths[0]) / "pytorch_lora_weights.safetensors").read_bytes()
    )
    (run / "config.yaml").write_text("rewards: [red, {reward: blue, eval_only: true}]\n")
    asked = config(tiny_sdxl_path, scratch / "out", str(run))
    assert asked.roles(list(asked.variants().values())) == {"red": "trained on", "blue": "held out"}


def test_diversity_by_lpips_too_and_realism_by_a_clip(
    tiny_sdxl_path: str, lora_paths: list[str], scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchmetrics")
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setenv("TORCH_HOME", str(scratch / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    weights = LPIPSDiversity("squeeze").weights_file()[1]
    weights.parent.mkdir(parents=True)
    torch.save(torchvision.models.squeezenet1_1().state_dict(), weights)
    (scratch / "real").mkdir()
    for shade in (0, 90, 200):
        Image.new("RGB", (32, 32), (shade, 40, 80)).save(scratch / "real" / f"{shade}.png")
    more = {"lpips": "squeeze", "diversity": "shapes-clip", "reference_features": "shapes-clip"}
    asked = config(tiny_sdxl_path, scratch / "out", lora_paths[0], reference_images=str(scratch / "real"), **more)
    result = run_eval(asked)
    assert result is not None
    for row in read_rows(scratch / "out" / "diversity.jsonl"):
        assert row["distance"] >= 0 and 1 <= row["vendi"] <= 2.001 and row["lpips"] > 0
    assert all(model["fid"] > 0 and "kid" in model for model in result.summary["models"])
    assert set(result.summary["diversity"][0]["changes"]) == {"distance", "lpips"}
    assert {(f["x"], f["y"]) for f in result.summary["fronts"]} > {("diversity", "realism (-KID)")}
    weights.unlink()
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no"))
    )
    asked.output_dir = str(scratch / "never")
    with pytest.raises(UserError, match="put it at"):
        run_eval(asked)
    assert not (scratch / "never").exists(), "it is said before anything is drawn"


def test_checkpoints_of_a_run_are_known_as_such(tiny_sdxl_path: str, lora_paths: list[str], scratch: Path) -> None:
    folders = [scratch / "run" / f"checkpoint-{step}" for step in (20, 100)]
    for folder in folders:
        shutil.copytree(lora_paths[0], folder)
    asked = config(tiny_sdxl_path, Path("out"), "", models=[*map(str, folders), f"both={folders[0]}+{folders[1]}"])
    found = {v.model: (v.run, v.trained) for v in asked.variants()}
    run = str(scratch / "run")
    assert found == {
        "base": ("", None),
        "run/checkpoint-20": (run, 20),
        "run/checkpoint-100": (run, 100),
        "both": ("", None),
    }

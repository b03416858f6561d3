from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation import sampling
from diffalign.evaluation.folder import read_rows
from diffalign.evaluation.models import ModelSpec
from diffalign.evaluation.sampling import DrawConfig, Drawer, SampleConfig, cases_of, plan, run_sample, slug

PROMPTS = ["a red circle", "a blue square", "a cross"]


@pytest.fixture
def config(tiny_sdxl_path: str, tmp_path: Path) -> SampleConfig:
    return SampleConfig(
        pretrained_model_name_or_path=tiny_sdxl_path,
        output_dir=str(tmp_path / "out"),
        prompts=PROMPTS,
        num_inference_steps=2,
        batch_size=2,
        device="cpu",
    )


def changed(config: SampleConfig, **values: Any) -> SampleConfig:
    return SampleConfig(**{**vars(config), **values})


def pixels(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).glob("images/*.png"))}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The seeds of each batch that is drawn."""
    batches: list[list[int]] = []
    real = sampling.iterate_images

    def spy(pipe: DiffusionPipeline, prompts: list[str], seeds: list[int], **options: Any) -> Any:
        batches.append(list(seeds))
        return real(pipe, prompts, seeds, **options)

    monkeypatch.setattr(sampling, "iterate_images", spy)
    return batches


def test_plan() -> None:
    assert [case.seed for case in plan(["a", "b"], seed=5)] == [5, 6]
    several = plan(["a", "b"], seed=5, num_images_per_prompt=2)
    assert [(case.index, case.prompt, case.seed) for case in several] == [
        (0, "a", 5),
        (0, "a", 100_008),
        (1, "b", 6),
        (1, "b", 100_009),
    ]
    assert several[1].file == "images/00000-100008.png"
    assert [case.seed for case in plan(["a", "b"], seeds=[3, 1], seed=9)] == [3, 1, 3, 1]
    with pytest.raises(UserError, match="twice"):
        plan(["a"], seeds=[1, 1])


def test_images_are_those_of_plain_diffusers(
    config: SampleConfig, tiny_sdxl_path: str, lora_paths: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    [folder] = run_sample(changed(config, lora=[f"{lora_paths[0]}@0.5"], seeds=[3], batch_size=1, scheduler="ddim"))
    assert f"3 images in {config.output_dir}" in capsys.readouterr().out
    pipe = DiffusionPipeline.from_pretrained(tiny_sdxl_path)
    from diffusers import DDIMScheduler

    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.load_lora_weights(lora_paths[0], adapter_name="lora")
    pipe.set_adapters(["lora"], [0.5])
    theirs = pipe(
        PROMPTS[1], generator=torch.Generator("cpu").manual_seed(3), num_inference_steps=2, guidance_scale=5.0
    ).images[0]
    with Image.open(folder.path / "images/00001-3.png") as ours:
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))
    row = read_rows(folder.path / "samples.jsonl")[1]
    assert row["prompt"] == PROMPTS[1] and row["seed"] == 3 and row["model"] == "lora-0 @0.5"
    assert row["loras"] == [[lora_paths[0], 0.5]] and row["scheduler"] == "DDIMScheduler"
    assert (row["height"], row["width"], row["dtype"], row["flat"]) == (32, 32, "float32", False)
    assert row["versions"]["diffusers"] and row["num_inference_steps"] == 2 and row["guidance_scale"] == 5.0


def test_nothing_is_drawn_twice(config: SampleConfig, drawn: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    [first] = run_sample(config)
    assert drawn == [[0, 1], [2]]
    before = pixels(first.path)
    monkeypatch.setattr(Drawer, "_pipeline", None)  # a finished folder needs no model
    assert len(run_sample(config)[0].rows) == 3
    assert len(drawn) == 2 and pixels(first.path) == before


def test_an_interrupted_run_ends_with_the_same_images(
    config: SampleConfig, drawn: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sample(changed(config, output_dir=str(tmp_path / "whole")))
    real = sampling.SampleFolder.add

    def killed(self: Any, case: Any, image: Any, extra: Any) -> None:
        if case.index == 1:
            raise KeyboardInterrupt
        real(self, case, image, extra)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sampling.SampleFolder, "add", killed)
        run_sample(config)
    assert len(pixels(config.output_dir)) == 1
    drawn.clear()
    run_sample(config)
    assert drawn == [[0, 1], [2]], "the batch that was cut is drawn as it was, so that its bits are the same"
    assert pixels(config.output_dir) == pixels(tmp_path / "whole")
    rows = read_rows(Path(config.output_dir) / "samples.jsonl")
    assert rows == read_rows(tmp_path / "whole/samples.jsonl")


def test_more_prompts_are_added(config: SampleConfig, drawn: list[list[int]]) -> None:
    run_sample(changed(config, prompts=PROMPTS[:2]))
    run_sample(config)
    assert drawn == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": 1.0}, "guidance_scale is 5.0 there, 1.0 here"),
        ({"prompts": ["another"]}, "not for 'another'"),
        ({"scheduler": "ddim"}, "scheduler is None there, 'ddim' here"),
    ],
)
def test_a_folder_of_other_images_is_refused(config: SampleConfig, change: dict[str, Any], message: str) -> None:
    run_sample(config)
    before = pixels(config.output_dir)
    with pytest.raises(UserError, match=message):
        run_sample(changed(config, **change))
    assert pixels(config.output_dir) == before
    run_sample(changed(config, **change, overwrite_output_dir=True))
    assert pixels(config.output_dir) != before


def test_a_retrained_lora_is_another_model(config: SampleConfig, lora_paths: list[str], tmp_path: Path) -> None:
    lora = tmp_path / "lora"
    lora.mkdir()
    weights = lora / "pytorch_lora_weights.safetensors"
    weights.write_bytes((Path(lora_paths[0]) / weights.name).read_bytes())
    run_sample(changed(config, lora=[str(lora)]))
    weights.write_bytes((Path(lora_paths[1]) / weights.name).read_bytes())
    with pytest.raises(UserError, match=r"model \(loras\) has other weights"):
        run_sample(changed(config, lora=[str(lora)]))


def test_flat_images_are_counted(
    config: SampleConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def black(pipe: Any, prompts: list[str], seeds: list[int], **options: Any) -> list[Image.Image]:
        return [Image.new("RGB", (8, 8), (seed % 2, 0, 0) if seed else None or 0) for seed in seeds]

    monkeypatch.setattr(sampling, "iterate_images", black)
    with caplog.at_level(logging.WARNING):
        [folder] = run_sample(config)
    assert all(row["flat"] for row in folder.rows.values())
    assert "3 of 3 images are one flat colour" in caplog.text


def test_models_that_share_a_pipeline_load_it_once(
    config: SampleConfig, lora_paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    real = sampling.load_family
    monkeypatch.setattr(sampling, "load_family", lambda path, **options: loads.append(path) or real(path, **options))
    drawer, cases = Drawer(config), plan(PROMPTS[:1], seeds=[0])
    images = []
    for number, text in enumerate(["base", lora_paths[0], f"{lora_paths[0]}@0", "base"]):
        folder = drawer.draw(ModelSpec.parse(text), cases, tmp_path / str(number))
        images.append(np.asarray(folder.image(cases[0])).astype(int))
    assert len(loads) == 1
    assert not np.array_equal(images[0], images[1])
    assert np.abs(images[0] - images[2]).max() <= 1, "a LoRA of scale 0 changes nothing"
    assert np.array_equal(images[0], images[3]), "a LoRA was left on the pipeline"
    drawer.release()
    few = ModelSpec("few", steps=1, guidance=1.0, scheduler="lcm")
    drawer.draw(few, cases, tmp_path / "few")
    assert len(loads) == 2
    drawer.draw(ModelSpec("base"), cases, tmp_path / "after")
    assert pixels(tmp_path / "after") == pixels(tmp_path / "0"), "its sampler was left on the pipeline"
    row = read_rows(tmp_path / "few/samples.jsonl")[0]
    assert (row["num_inference_steps"], row["guidance_scale"], row["scheduler"]) == (1, 1.0, "LCMScheduler")


def test_several_numbers_of_steps_have_a_folder_each(config: SampleConfig, tmp_path: Path) -> None:
    folders = run_sample(changed(config, steps=[1, 2], scheduler="lcm", guidance_scale=1.0))
    assert [folder.path.name for folder in folders] == ["steps-1", "steps-2"]
    [alone] = run_sample(changed(config, scheduler="lcm", guidance_scale=1.0, output_dir=str(tmp_path / "alone")))
    assert pixels(tmp_path / "out/steps-2") == pixels(alone.path) != pixels(tmp_path / "out/steps-1")
    assert read_rows(tmp_path / "out/steps-1/samples.jsonl")[0]["num_inference_steps"] == 1
    with pytest.raises(UserError, match="different numbers of at least 1"):
        changed(config, steps=[4, 4])


def test_prompt_files(config: SampleConfig, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\ntwo\nthree\n")
    from_file = changed(config, prompts=None, prompts_file=str(tmp_path / "p.txt"), max_prompts=2)
    assert [case.prompt for case in cases_of(from_file)] == ["one", "two"]
    heldout = cases_of(changed(config, prompts=None, prompts_file="shapes-heldout", max_prompts=3))
    assert len({case.prompt for case in heldout}) == 3
    # Training's prompts take a file: here its name must not be drawn in its place.
    with pytest.raises(UserError, match="use --prompts_file .*p.txt"):
        cases_of(changed(config, prompts=[str(tmp_path / "p.txt")]))
    named = cases_of(changed(config, prompts=["no such file.txt"]))
    assert {case.prompt for case in named} == {"no such file.txt"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": None}, "nothing to draw"),
        ({"prompts_file": "x"}, "not both"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "0 or more"),
        ({"height": 33}, "height 33 is not a multiple"),
        ({"scheduler": "dimm"}, "scheduler 'dimm' is unknown"),
        ({"lora": ["nowhere"]}, "nothing at 'nowhere'"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "nowhere"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    config: SampleConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_sample(changed(config, **change))
    assert not Path(config.output_dir).exists()


def test_slugs() -> None:
    assert [slug(name) for name in ("base", "dpo/checkpoint-10 @0.5", "a + b", "..", "猫")] == [
        "base",
        "dpo_checkpoint-10_@0.5",
        "a_+_b",
        "model",
        "猫",
    ]


def test_default_types_follow_the_device() -> None:
    assert sampling._dtype("auto", torch.device("cpu")) == torch.float32
    assert sampling._dtype("bf16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.slow
def test_two_processes_share_the_work(config: SampleConfig, tmp_path: Path) -> None:
    run_sample(changed(config, output_dir=str(tmp_path / "one")))
    words = ["--pretrained_model_name_or_path", config.pretrained_model_name_or_path, "--device", "cpu"]
    words += ["--num_inference_steps", "2", "--batch_size", "2", "--output_dir", str(tmp_path / "two")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launch, "-m", "diffalign", "sample", *words, "--prompts", *PROMPTS], check=True, timeout=600)
    assert pixels(tmp_path / "two") == pixels(tmp_path / "one")
    assert read_rows(tmp_path / "two/samples.jsonl") == read_rows(tmp_path / "one/samples.jsonl")


def test_fields_have_help() -> None:
    assert isinstance(DrawConfig.__dataclass_fields__["seed"].metadata["help"], str)

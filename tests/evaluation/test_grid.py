from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from diffalign.config import parse_args
from diffalign.errors import UserError
from diffalign.evaluation import grid as module
from diffalign.evaluation.comparisons import column_names
from diffalign.evaluation.folder import read_rows
from diffalign.evaluation.grid import GridConfig, make_grid, run_grid
from diffalign.evaluation.sampling import Drawer
from diffalign.evaluation.stats import win_rate
from diffalign.evaluation.sweep import folder_names
from diffalign.rewards import register, registry

PROMPTS = ["a red circle", "a blue square on a gray background", "a cross"]


@pytest.fixture
def config(tiny_sdxl_path: str, lora_paths: list[str], tmp_path: Path) -> GridConfig:
    return GridConfig(
        pretrained_model_name_or_path=tiny_sdxl_path,
        output_dir=str(tmp_path / "out"),
        models=[lora_paths[0], f"mine={lora_paths[1]}@0.5"],
        prompts=PROMPTS,
        num_inference_steps=2,
        device="cpu",
        scorer=["red"],
    )


@pytest.fixture(autouse=True)
def red(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scorer: mean of the red channel."""
    monkeypatch.setattr(registry, "_registered", {})

    def mean_of_red(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        return images[:, 0].mean((1, 2))

    register("red", mean_of_red)


def changed(config: GridConfig, **values: Any) -> GridConfig:
    return GridConfig(**{**vars(config), **values})


def test_grid_from_prompts_to_picture(
    config: GridConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages: list[dict[str, Any]] = []

    def spy(*args: Any, **kwargs: Any) -> Image.Image:
        pages.append({"images": args[0], "rows": args[1], "columns": args[2], **kwargs})
        return make_grid(*args, **kwargs)

    monkeypatch.setattr(module, "make_grid", spy)
    result = run_grid(config)
    assert result is not None
    out = Path(config.output_dir)
    with Image.open(result.path) as page:
        assert page.size[0] > 3 * 160
    assert sorted(path.name for path in out.iterdir()) == [
        *("base", "cache", "grid.html", "grid.png", "lora-0", "mine", "scores.jsonl"),
    ]

    files = {name: sorted((out / name / "images").glob("*.png")) for name in ("base", "lora-0", "mine")}
    assert [path.name for path in files["base"]] == [f"0000{i}-{i}.png" for i in range(3)]
    expected = {
        name: np.array([np.asarray(Image.open(path))[..., 0].mean() / 255 for path in paths])
        for name, paths in files.items()
    }
    rates = {name: win_rate(expected[name], expected["base"]) for name in ("lora-0", "mine")}
    for name, scores in expected.items():
        assert result.scores["red"][name] == pytest.approx(scores, abs=1e-6)
    assert result.win_rates == {"red": rates}

    rows = read_rows(out / "scores.jsonl")
    assert len(rows) == 9
    assert rows[4]["model"] == "lora-0" and rows[4]["file"] == "lora-0/images/00001-1.png"
    assert rows[4]["scores"]["red"] == pytest.approx(expected["lora-0"][1], abs=1e-6)

    (page_given,) = pages
    assert page_given["columns"] == ["base", "lora-0", "mine"] and page_given["rows"] == PROMPTS
    assert page_given["scores"][2] == pytest.approx([expected[n][2] for n in ("base", "lora-0", "mine")], abs=1e-6)
    assert page_given["column_notes"][0] == f"mean {expected['base'].mean():.2f}"
    assert page_given["column_notes"][1].endswith(
        f"wins {rates['lora-0'].rate:.2f} [{rates['lora-0'].low:.2f}, {rates['lora-0'].high:.2f}]"
    )
    assert "EulerDiscreteScheduler, 2 steps; guidance 5, 32x32, seeds from 0" in page_given["footer"]
    assert "scores by red" in page_given["footer"]
    printed = capsys.readouterr().out
    assert f"red: lora-0: mean {expected['lora-0'].mean():.3f}, against base: {rates['lora-0']}" in printed
    assert str(result.path) in printed


def test_the_page_shows_all_images_and_the_command_that_gives_it_again(config: GridConfig) -> None:
    config = changed(config, rows=1, html="beside", title="Mine & others")
    result = run_grid(config)
    assert result is not None and result.page is not None
    text = result.page.read_text(encoding="utf-8")
    data = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
    assert [row["prompt"] for row in data["rows"]] == PROMPTS
    assert [row["note"] for row in data["rows"]] == ["seed 0", "seed 1", "seed 2"]
    assert data["rows"][1]["cells"][2]["src"] == "mine/images/00001-1.png"
    assert data["rows"][1]["cells"][2]["scores"] == [result.scores["red"]["mine"][1]]
    assert [model["name"] for model in data["models"]] == ["base", "lora-0", "mine"]
    assert "Mine &amp; others" in text and "all 3 images of each model" in text
    command, name, *words = shlex.split(data["command"])
    assert (command, name) == ("diffalign", "grid") and parse_args(GridConfig, words) == config

    few = run_grid(changed(config, html_rows=2))
    assert few is not None and few.page == result.page
    assert result.page.read_text(encoding="utf-8").count('"note": "seed ') == 2
    none = run_grid(changed(config, html="none"))
    assert none is not None and none.page is None
    with pytest.raises(UserError, match="html_rows"):
        changed(config, html_rows=0)


def test_a_second_run_draws_nothing_and_another_model_only_itself(
    config: GridConfig, monkeypatch: pytest.MonkeyPatch, lora_paths: list[str]
) -> None:
    drawn: list[str] = []
    real = Drawer._draw_missing

    def spy(self: Drawer, spec: Any, cases: Any, folder: Any, bar: Any) -> None:
        before = len(folder.rows)
        real(self, spec, cases, folder, bar)
        drawn.extend([spec.name] * (len(folder.rows) - before))

    monkeypatch.setattr(Drawer, "_draw_missing", spy)
    first = changed(config, models=config.models[:1])
    run_grid(first)
    assert drawn == ["base"] * 3 + ["lora-0"] * 3
    run_grid(first)
    assert len(drawn) == 6
    run_grid(config)
    assert drawn[6:] == ["mine"] * 3


def test_rows_shown_are_the_first_and_scores_are_of_all(config: GridConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        module,
        "make_grid",
        lambda images, rows, columns, **kw: given.update(rows=rows, **kw) or Image.new("RGB", (9, 9)),
    )
    result = run_grid(changed(config, models=config.models[:1], rows=2, seeds=[4, 7]))
    assert result is not None
    assert given["rows"] == [f"{PROMPTS[0]} (seed 4)", f"{PROMPTS[0]} (seed 7)"]
    assert "the first 2 of 6 images" in given["footer"] and "seeds 4, 7" in given["footer"]
    rate = result.win_rates["red"]["lora-0"]
    assert (rate.n, rate.prompts) == (6, 3), "images of one prompt are not independent"


def test_which_rows_are_shown_is_said(config: GridConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(
        module,
        "make_grid",
        lambda images, rows, columns, **kw: given.update(rows=rows, **kw) or Image.new("RGB", (9, 9)),
    )
    result = run_grid(changed(config, models=config.models[:1], rows=2, pick="spread"))
    assert result is not None
    gains = result.scores["red"]["lora-0"] - result.scores["red"]["base"]
    assert given["rows"] == [PROMPTS[int(np.argmax(gains))], PROMPTS[int(np.argmin(gains))]]
    assert "2 of 3 images of each model, evenly from the last column's largest gain" in given["footer"]
    assert [row[1] - row[0] for row in given["scores"]] == pytest.approx([gains.max(), gains.min()])
    run_grid(changed(config, models=config.models[:1], rows=2, pick="random", seed=0))
    assert len(set(given["rows"])) == 2 and "drawn at random with seed 0" in given["footer"]
    with pytest.raises(UserError, match="--scorer"):
        changed(config, scorer=[], pick="spread")


def test_without_a_scorer(config: GridConfig) -> None:
    result = run_grid(changed(config, scorer=[], models=[], base=True))
    assert result is not None and result.scores == {} and result.path.exists()
    assert list(result.lines()) == []


def test_several_scorers_each_get_their_line(config: GridConfig) -> None:
    def twice(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        return 2 * images[:, 0].mean((1, 2))

    register("twice", twice)
    result = run_grid(changed(config, scorer=["red", "twice"], models=config.models[:1]))
    assert result is not None
    assert result.scores["twice"]["base"] == pytest.approx(2 * result.scores["red"]["base"], rel=1e-5)
    assert len(list(result.lines())) == 4
    assert read_rows(Path(config.output_dir) / "scores.jsonl")[0]["scores"].keys() == {"red", "twice"}


def test_columns(config: GridConfig, lora_paths: list[str], tiny_sd_path: str) -> None:
    def names(**values: Any) -> list[str]:
        return column_names(list(changed(config, **values).variants()))

    a = lora_paths[0]
    assert names(models=[a, "base"]) == ["lora-0", "base"]
    assert names(models=[a], base=False) == ["lora-0"]
    assert names(models=[a, a]) == ["base", "lora-0", "lora-0 (2)"]
    assert names(models=[a], lora_scales=[0.5, 1.0]) == ["base", "lora-0 at 0.5", "lora-0 at 1"]
    assert names(models=[], guidance_scales=[1.0, 5.0]) == ["guidance 1", "guidance 5"]
    fast = {"model": a, "name": "fast", "steps": 3, "guidance": 1.0}
    assert names(models=[fast], steps=[1, 2]) == [
        *("base, guidance 5, 1 step", "base, guidance 5, 2 steps", "fast, guidance 1, 3 steps"),
    ]
    assert folder_names(["base", "x/y", "x y", "X y"]) == ["base", "x_y", "x_y-2", "X_y-3"]
    assert [spec.path for spec in changed(config, models=[tiny_sd_path]).variants().values()] == [None, tiny_sd_path]


def test_seeds_by_steps_of_one_prompt(config: GridConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []

    def spy(images: Any, rows: Any, columns: Any, **more: Any) -> Image.Image:
        given.append({"rows": rows, "columns": columns, **more})
        return make_grid(images, rows, columns, **more)

    monkeypatch.setattr(module, "make_grid", spy)
    asked = changed(config, models=config.models[:1], prompts=PROMPTS[:1], seeds=[4, 7], steps=[1, 2], theme="both")
    result = run_grid(asked)
    assert result is not None and [one["theme"] for one in given] == ["light", "dark"]
    assert given[0]["rows"] == ["seed 4", "seed 7"] and given[0]["title"] == PROMPTS[0]
    assert given[0]["columns"] == ["base, 1 step", "base, 2 steps", "lora-0, 1 step", "lora-0, 2 steps"]
    assert given[0]["against"] == [0, 0, 0, 1] and "against base at the same settings" in given[0]["footer"]
    scores = result.scores["red"]
    assert result.win_rates["red"]["lora-0, 2 steps"] == win_rate(
        scores["lora-0, 2 steps"], scores["base, 2 steps"], groups=[0, 0]
    )
    assert any("lora-0, 2 steps: mean" in line and "against base, 2 steps" in line for line in result.lines())
    row = read_rows(Path(config.output_dir) / "lora-0_2_steps" / "samples.jsonl")[0]
    assert row["num_inference_steps"] == 2 and row["model"] == "lora-0, 2 steps"
    with Image.open(result.path) as light, Image.open(result.path.with_name("grid-dark.png")) as dark:
        assert light.size == dark.size and light.getpixel((0, 0)) == (255, 255, 255) != dark.getpixel((0, 0))


SCORED: list[str] = []


def counted(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
    SCORED.extend(prompts)
    return images[:, 0].mean((1, 2))


def test_scores_are_kept_when_a_grid_is_made_again(config: GridConfig) -> None:
    SCORED.clear()
    register("counted", counted)
    first = run_grid(changed(config, scorer=["counted"]))
    assert len(SCORED) == 9
    second = run_grid(changed(config, scorer=["counted"], rows=1))
    assert len(SCORED) == 9 and first is not None and second is not None
    assert {k: v.tolist() for k, v in first.scores["counted"].items()} == {
        k: v.tolist() for k, v in second.scores["counted"].items()
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scorer": ["shapes-cheker"]}, "shapes-checker"),
        ({"scorer": ["shapes-checker"], "prompts": ["a dog"]}, "shapes-checker cannot judge prompt 0.*'a dog'"),
        ({"models": ["nowhere"]}, "nothing at 'nowhere'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_drawn(
    config: GridConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run_grid(changed(config, **change))
    assert not Path(config.output_dir).exists()


def test_wrong_configs() -> None:
    with pytest.raises(UserError, match="rows must be at least 1"):
        GridConfig(pretrained_model_name_or_path="x", output_dir="y", rows=0)
    with pytest.raises(UserError, match="nothing to compare"):
        GridConfig(pretrained_model_name_or_path="x", output_dir="y", base=False)

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor, ImageFont

from diffalign.errors import UserError
from diffalign.evaluation import page as grid
from diffalign.evaluation.page import make_grid, wrap

LIGHT = grid.THEMES["light"]


def picture(seed: int, size: tuple[int, int] = (16, 16)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def find(page: Image.Image, part: Image.Image) -> tuple[int, int] | None:
    """Where an image stands on the page, pixel for pixel."""
    a, b = np.asarray(page), np.asarray(part)
    height, width = b.shape[:2]
    for y, x in np.argwhere((a[: -height + 1, : -width + 1] == b[0, 0]).all(-1)):
        if np.array_equal(a[y : y + height, x : x + width], b):
            return int(x), int(y)
    return None


def has_colour(page: Image.Image, colour: str) -> bool:
    return bool((np.asarray(page) == ImageColor.getrgb(colour)).all(-1).any())


def test_small_images_are_enlarged_by_a_whole_number_and_stand_in_order() -> None:
    images = [[picture(0), picture(1)], [picture(2), picture(3)]]
    page = make_grid(images, ["first prompt", "second prompt"], ["base", "dpo"])
    places = [[find(page, image.resize((160, 160), Image.Resampling.NEAREST)) for image in row] for row in images]
    (a, b), (c, d) = places
    assert a and b and c and d
    assert a[0] == c[0] < b[0] == d[0] and a[1] == b[1] < c[1] == d[1]
    assert b[0] >= a[0] + 160 and c[1] >= a[1] + 160
    assert a[0] > 60, "no room for the prompts"


@pytest.mark.parametrize(
    ("size", "shown"), [((256, 256), (256, 256)), ((64, 32), (192, 96)), ((512, 256), (384, 192))]
)
def test_images_keep_their_shape(size: tuple[int, int], shown: tuple[int, int]) -> None:
    image = picture(0, size)
    page = make_grid([[image]], ["p"], ["m"])
    method = Image.Resampling.NEAREST if max(size) < 160 else Image.Resampling.LANCZOS
    assert find(page, image.resize(shown, method)) is not None


def test_cell_sets_the_size_and_mixed_sizes_fit() -> None:
    page = make_grid([[picture(0, (64, 64)), picture(1, (64, 48))]], ["p"], ["a", "b"], cell=100)
    assert find(page, picture(0, (64, 64)).resize((100, 100), Image.Resampling.LANCZOS))
    assert find(page, picture(1, (64, 48)).resize((100, 75), Image.Resampling.LANCZOS))


def test_best_of_a_row_is_framed() -> None:
    images = [[picture(0), picture(1), picture(2)]]
    page = make_grid(images, ["p"], ["a", "b", "c"], scores=[[0.1, 0.9, None]])
    x, y = find(page, picture(1).resize((160, 160), Image.Resampling.NEAREST)) or (0, 0)
    assert page.getpixel((x - 2, y + 80)) == ImageColor.getrgb(LIGHT.frame)
    x, y = find(page, picture(0).resize((160, 160), Image.Resampling.NEAREST)) or (0, 0)
    assert page.getpixel((x - 1, y + 80)) == ImageColor.getrgb(LIGHT.line)
    for scores, highlight in (
        ([[0.5, 0.5, 0.5]], True),
        ([[None, 0.5, float("nan")]], True),
        ([[0.1, 0.9, 0.2]], False),
    ):
        page = make_grid(images, ["p"], ["a", "b", "c"], scores=scores, highlight=highlight)
        assert not has_colour(page, LIGHT.frame)


def test_best() -> None:
    assert grid._best([0.2, 0.7, 0.7 + 1e-9]) == {1, 2}
    assert grid._best([0.2, None, float("nan")]) == set()
    assert grid._best([]) == set()


def test_every_label_leaves_its_mark() -> None:
    images = [[picture(0), picture(1)]]
    plain = np.asarray(make_grid(images, ["p"], ["a", "b"], scores=[[0.1, 0.2]]))
    for change in (
        {"row_labels": ["q"]},
        {"column_labels": ["a", "c"]},
        {"scores": [[0.1, 0.3]]},
        {"decimals": 4},
        {"against": [0, 1]},
        {"theme": "dark"},
        {"scores": {"red": [[0.1, 0.2]]}},
        {"title": "t"},
        {"footer": "f"},
        {"column_notes": [None, "mean 0.2"]},
    ):
        arguments = {"row_labels": ["p"], "column_labels": ["a", "b"], "scores": [[0.1, 0.2]], **change}
        page = np.asarray(make_grid(images, **arguments))
        assert page.shape != plain.shape or (page != plain).any(), change


def test_each_scorer_has_a_line_and_the_first_one_frames() -> None:
    images = [[picture(0), picture(1)], [picture(2), picture(3)]]
    labels = ["p", "q"], ["a", "b"]
    one = make_grid(images, *labels, scores={"red": [[0.1, 0.9], [0.8, 0.2]]})
    tables = {"red": [[0.1, 0.9], [0.8, 0.2]], "blue": [[5.0, 1.0], [float("nan"), None]]}
    two = make_grid(images, *labels, scores=tables)
    step = (two.height - one.height) / 2
    assert two.width == one.width and 14 <= step <= 30, "a line more under each row"
    x, y = find(two, picture(1).resize((160, 160), Image.Resampling.NEAREST)) or (0, 0)
    assert two.getpixel((x - 2, y + 80)) == ImageColor.getrgb(LIGHT.frame)
    x, y = find(two, picture(0).resize((160, 160), Image.Resampling.NEAREST)) or (0, 0)
    assert two.getpixel((x - 1, y + 80)) == ImageColor.getrgb(LIGHT.line)
    # In the second line of the first row the left one is best: its green is there, and nowhere to its right.
    below = two.crop((x, y + 160 + int(step) + 6, x + 160, y + 160 + 2 * int(step) + 6))
    assert has_colour(below, LIGHT.better)


def test_differences_are_to_the_column_that_is_named() -> None:
    images, labels = [[picture(k) for k in range(3)]], (["p"], ["a", "b", "c"])
    first, second = (
        np.asarray(make_grid(images, *labels, scores=[[0.1, 0.2, 0.3]], against=against, highlight=False))
        for against in ([0, 0, 0], [0, 0, 1])
    )
    changed = np.flatnonzero((first != second).any((0, 2)))
    assert changed.min() > first.shape[1] * 0.6, "only the third column's differs"


def test_a_dark_page_is_dark_all_over() -> None:
    images, scores = [[picture(0), None]], [[0.1, 0.2]]
    page = make_grid(images, ["prompt"], ["a", "b"], scores=scores, theme="dark", title="t", footer="f")
    dark = grid.THEMES["dark"]
    assert page.getpixel((0, 0)) == page.getpixel((page.width - 1, page.height - 1)) == ImageColor.getrgb(dark.paper)
    assert not has_colour(page, LIGHT.ink) and has_colour(page, dark.ink) and has_colour(page, dark.better)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[20.1, 22.4], [21.0, 19.7]], 2),
        ([[0.271, 0.284], [0.279, 0.268]], 4),
        ([[0.0, 1.0]], 2),
        ([[1e-9, 2e-9]], 4),
        ([[3.0, 3.0]], 2),
        ([[None, float("nan")]], 2),
    ],
)
def test_decimals_tell_scores_apart(scores: grid.Scores, expected: int) -> None:
    assert grid.decimals_for(scores) == expected


def test_missing_images_leave_their_place_empty() -> None:
    page = make_grid([[picture(0), None]], ["p"], ["a", "b"])
    assert page.size == make_grid([[picture(0), picture(1)]], ["p"], ["a", "b"]).size


def test_text_is_wrapped_to_its_width() -> None:
    font = ImageFont.load_default(14)
    assert isinstance(font, ImageFont.FreeTypeFont)
    text = "a small red circle left of a large blue square " * 3 + "x" * 80
    for width in (60, 150, 400):
        for count in (1, 2, 4, 99):
            lines = wrap(text, font, width, count)
            assert len(lines) <= count
            assert all(font.getlength(line) <= width for line in lines)
            assert (lines[-1].endswith("...")) == (count != 99)
    assert "".join("".join(wrap(text, font, 60, 99)).split()) == "".join(text.split())
    assert wrap("runs/a-long-name/checkpoint-100", font, 110, 3)[0].endswith(("/", "-"))
    assert wrap("", font, 100, 3) == []
    assert wrap("short", font, 100, 1) == ["short"]


def test_letters_that_the_font_lacks(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grid, "_FALLBACKS", ("no-such-font.ttf",))
    with caplog.at_level(logging.WARNING):
        make_grid([[picture(0)]], ["a “plain” text, ~20 % of it: [x] (y) {z} #1 @0.5 a_b-c"], ["a"])
        assert not caplog.records
        make_grid([[picture(0)]], ["猫が好き"], ["a"])
    assert "'好'" in caplog.text
    monkeypatch.setattr(grid, "_missing", lambda letters, path: set() if path == "good.ttf" else {"é"})
    monkeypatch.setattr(grid, "_FALLBACKS", ("bad.ttf", "good.ttf"))
    assert grid._font_with("é") == "good.ttf"


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    one = [[picture(0)]]
    for arguments, message in (
        ((one, ["p", "q"], ["a"]), "1 rows of images but 2 row labels"),
        ((one, ["p"], ["a", "b"]), "row 0 has 1 images for 2 columns"),
        (([], [], ["a"]), "at least one row"),
    ):
        with pytest.raises(UserError, match=message):
            make_grid(*arguments)
    with pytest.raises(UserError, match="against"):
        make_grid(one, ["p"], ["a"], against=[1])
    with pytest.raises(UserError, match="row 0 has 2 scores for 1"):
        make_grid(one, ["p"], ["a"], scores=[[1.0, 2.0]])
    with pytest.raises(UserError, match="2 rows of scores"):
        make_grid(one, ["p"], ["a"], scores=[[1.0], [2.0]])
    with pytest.raises(UserError, match="2 column notes"):
        make_grid(one, ["p"], ["a"], column_notes=["x", "y"])
    (tmp_path / "no.ttf").write_text("not a font")
    with pytest.raises(UserError, match=r"no\.ttf"):
        make_grid(one, ["p"], ["a"], font=tmp_path / "no.ttf")

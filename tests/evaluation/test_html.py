from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation import html as module
from diffalign.evaluation.html import Page, PageCell, PageRow, page_of_rows, write_page

NASTY = '</script><script>document.title = "owned"</script><img src=x onerror="document.title=1">&amp; {{data}}'
COMMAND = "diffalign grid --prompts " + shlex.quote("a <b> & 'c'")
# Gains of mine over base: 0.1, 0.5, -0.3, none (no score), 0.
SCORES = [(0.5, 0.6, 0.2), (0.1, 0.6, 0.2), (0.8, 0.5, 0.2), (0.5, None, 0.2), (0.4, 0.4, 0.2)]
PROMPTS = ["a red circle", "a blue square", "a red square and a cross", NASTY, "a cross"]


@pytest.fixture
def page(tmp_path: Path) -> Page:
    def cell(row: int, model: int) -> PageCell:
        path = tmp_path / f"model #{model}" / f"{row}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (32, 24), (40 * row, 80 * model, 99)).save(path)
        score = SCORES[row][model]
        return PageCell(path, {"red": score, "other": None if score is None else -score})

    rows = [
        PageRow(prompt, [cell(i, m) for m in range(3)], f"seed {i}", "many" if "and" in prompt else "one")
        for i, prompt in enumerate(PROMPTS)
    ]
    notes = ["mean 0.46", "mean 0.53\nwins 0.5", "mean 0.2"]
    return Page(
        ["base", "mine", "<i>third</i>"], rows, {"red": 2, "other": 1}, notes, "Títle <b>", "foot & note", COMMAND
    )


def data_of(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8")
    found = re.search(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_texts_of_users_cannot_leave_their_place(page: Page, tmp_path: Path) -> None:
    write_page(tmp_path / "grid.html", page)
    text = (tmp_path / "grid.html").read_text(encoding="utf-8")
    assert "owned</script>" not in text and "<img src=x" not in text and "<i>third" not in text
    assert text.count("<script") == 2 and text.count("</script>") == 2
    assert "<title>Títle &lt;b&gt;</title>" in text and "foot &amp; note" in text
    data = data_of(tmp_path / "grid.html")
    assert data["rows"][3]["prompt"] == NASTY and data["command"] == COMMAND


def test_scores_that_are_none_or_not_finite_are_left_out(page: Page, tmp_path: Path) -> None:
    first = page.rows[0].cells[0]
    assert first is not None
    cell = PageCell(first.image, {"red": float("nan"), "other": float("inf")})
    rows = [PageRow("p", [cell]), PageRow("q", [None])]
    write_page(tmp_path / "grid.html", Page(["base"], rows, page.scorers))
    there = data_of(tmp_path / "grid.html")["rows"]
    assert there[0]["cells"][0]["scores"] == [None, None] and there[1]["cells"] == [None]


def test_small_images_go_inside_as_they_are_and_large_ones_smaller(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (320, 320, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "odd.bmp")
    cells = [PageCell(tmp_path / name, {}) for name in ("small.png", "large.png", "odd.bmp")]
    size = write_page(tmp_path / "grid.html", Page(["a", "b", "c"], [PageRow("p", cells)], {}))
    sources = [cell["src"] for cell in data_of(tmp_path / "grid.html")["rows"][0]["cells"]]
    assert [source.partition(";")[0] for source in sources] == ["data:image/png", "data:image/webp", "data:image/webp"]
    assert (tmp_path / "large.png").stat().st_size > module.UNCHANGED_BYTES
    assert size == (tmp_path / "grid.html").stat().st_size < (tmp_path / "large.png").stat().st_size * 4 / 3


def test_links_are_relative_and_quoted(page: Page, tmp_path: Path) -> None:
    write_page(tmp_path / "grid.html", page, "beside")
    assert data_of(tmp_path / "grid.html")["rows"][0]["cells"][1]["src"] == "model%20%231/0.png"


def test_what_does_not_fit_is_refused(page: Page, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="row 0 has 3 images for 2 models"):
        Page(["a", "b"], page.rows, {})
    with pytest.raises(UserError, match="1 notes for 3 models"):
        Page(page.models, page.rows, {}, ["only"])
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken\.png"):
        write_page(tmp_path / "grid.html", Page(["a"], [PageRow("p", [PageCell(tmp_path / "broken.png", {})])], {}))
    assert not (tmp_path / "grid.html").exists()


@pytest.fixture
def opened(page: Page, tmp_path: Path, browser: Any) -> Any:
    write_page(tmp_path / "grid.html", page)
    browser.open((tmp_path / "grid.html").as_uri())
    yield browser
    assert browser.complaints() == []
    assert [url for url in browser.requests() if not url.endswith("/grid.html")] == []


def prompts(browser: Any) -> list[int]:
    return [PROMPTS.index(text) for text in browser.texts(".row .prompt")]


def models(browser: Any, selector: str) -> list[int]:
    return [int(figure.get_attribute("data-model")) for figure in browser.all(selector)]


@pytest.mark.browser
def test_the_page_shows_scores_and_winners(opened: Any) -> None:
    assert opened.texts(".row .prompt") == PROMPTS and opened.driver.title == "Títle <b>"
    assert opened.texts("#models strong") == ["base", "mine", "<i>third</i>"]
    shown = [text.split() for text in opened.texts(".row:nth-child(1) figcaption")]
    assert [words[:-2] for words in shown] == [["0.50"], ["0.60", "+0.10"], ["0.20", "−0.30"]]
    assert [words[-2:] for words in shown] == [["other", "-0.5"], ["other", "-0.6"], ["other", "-0.2"]]
    assert models(opened, ".row:nth-child(1) .winner") == [1]
    assert models(opened, ".row:nth-child(5) .winner") == [0, 1]
    opened.wait(lambda: opened.run("return [...document.images].every((i) => i.complete && i.naturalWidth === 32)"))
    opened.choose("#scorer", "other")
    assert models(opened, ".row:nth-child(1) .winner") == [2]
    assert opened.texts(".row:nth-child(1) .others") == ["red 0.50", "red 0.60", "red 0.20"]


@pytest.mark.browser
def test_columns_are_compared_with_the_one_that_they_name(page: Page, tmp_path: Path, browser: Any) -> None:
    write_page(tmp_path / "grid.html", replace(page, against=[0, 0, 1]))
    browser.open((tmp_path / "grid.html").as_uri())
    shown = [text.split()[:2] for text in browser.texts(".row:nth-child(1) figcaption")]
    assert shown[1:] == [["0.60", "+0.10"], ["0.20", "−0.40"]]
    browser.all(".row:nth-child(1) .open")[2].click()
    assert models(browser, "#sides figure") == [1, 2] and browser.complaints() == []
    with pytest.raises(UserError, match="2 places"):
        replace(page, against=[0, 0])


@pytest.mark.browser
def test_sorting_and_filtering(opened: Any) -> None:
    opened.choose("#sort", "Largest gain first")
    assert prompts(opened) == [1, 0, 4, 2, 3]
    opened.choose("#sort", "Largest loss first")
    assert prompts(opened) == [2, 4, 0, 1, 3]
    opened.choose("#model", "of <i>third</i>")
    assert prompts(opened) == [2, 0, 3, 4, 1]
    opened.choose("#model", "of mine")
    opened.choose("#sort", "Closest first")
    assert prompts(opened) == [4, 0, 2, 1, 3]
    opened.choose("#sort", "In the given order")
    opened.one("#search").send_keys("RED squ")
    assert prompts(opened) == [2] and opened.texts("#count") == ["1 of 5 rows"]
    opened.choose("#category", "one")
    assert prompts(opened) == [] and "No prompt fits" in opened.one("#none").text


@pytest.mark.browser
def test_an_image_in_large_beside_its_rival(opened: Any) -> None:
    opened.all(".row:nth-child(2) .open")[2].click()
    assert models(opened, "#sides figure") == [0, 2] and opened.texts("#large-prompt") == [PROMPTS[1]]
    assert opened.one("#sides img").rect["width"] > 500
    opened.press("down")
    assert models(opened, "#sides figure") == [1, 2]
    opened.press("right", "right")
    assert opened.texts("#large-prompt") == [PROMPTS[3]] and models(opened, "#sides figure") == [1, 2]
    opened.press("right", "right")
    assert opened.texts("#large-prompt") == [PROMPTS[4]] and not opened.one("#next").is_enabled()
    opened.press("left")
    assert opened.texts("#large-prompt") == [PROMPTS[3]]
    opened.press("escape")
    assert not opened.one("#large").is_displayed()
    opened.all(".row:nth-child(1) .open")[0].click()
    assert models(opened, "#sides figure") == [0, 1], "the base is shown beside the best of the others"
    opened.one("#close").click()
    assert not opened.one("#large").is_displayed()


@pytest.mark.browser
def test_blind_mode_hides_names_and_scores_and_shuffles(opened: Any) -> None:
    opened.one("#blind").click()
    text = opened.one("main").text
    assert not any(word in text for word in ("base", "mine", "third", "0.60", "best", "+0.10"))
    assert not opened.one("#sort").is_enabled()
    orders = {tuple(models(opened, f".row:nth-child({row}) figure")) for row in range(1, 6)}
    assert all(sorted(order) == [0, 1, 2] for order in orders)
    shuffled = set()
    for _ in range(4):
        opened.driver.refresh()
        opened.one("#blind").click()
        shuffled |= {tuple(models(opened, f".row:nth-child({row}) figure")) for row in range(1, 6)}
    assert len(shuffled) > 2
    opened.all(".row:nth-child(1) .open")[1].click()
    assert set(opened.texts("#sides figcaption")) < {"A", "B", "C"} and not opened.all("#sides .winner")
    opened.press("escape")
    opened.one("#blind").click()
    assert models(opened, ".row:nth-child(1) figure") == [0, 1, 2]


@pytest.mark.browser
def test_the_command_is_copied(opened: Any) -> None:
    opened.one("#copy").click()
    opened.wait(lambda: opened.one("#copy").text in ("Copied", "Selected below"))
    assert opened.one("#copy").text == "Copied"
    opened.run("document.getElementById('search').focus()")
    opened.one("#search").send_keys("\ue009", "v")
    assert opened.one("#search").get_attribute("value") == COMMAND


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_in_either_colour(opened: Any, scheme: str) -> None:
    opened.look(375, 812, scheme)
    assert opened.run("return document.documentElement.scrollWidth") == 375
    assert opened.texts(".row:nth-child(1) .name") == ["base", "mine", "<i>third</i>"]
    opened.all(".row:nth-child(1) .open")[1].click()
    first, second = (image.rect for image in opened.all("#sides img"))
    assert second["y"] > first["y"] + 50 and opened.run("return document.documentElement.scrollWidth") == 375
    opened.press("escape")
    dark = "rgb(19, 21, 24)"
    paper = "return getComputedStyle(document.body).backgroundColor"
    assert (opened.run(paper) == dark) == (scheme == "dark")
    opened.one("#theme").click()
    assert (opened.run(paper) == dark) == (scheme == "light")
    opened.one("#theme").click()


@pytest.mark.browser
def test_images_beside_the_page_are_found_from_a_file(page: Page, tmp_path: Path, browser: Any) -> None:
    write_page(tmp_path / "grid.html", page, "beside")
    browser.open((tmp_path / "grid.html").as_uri())
    browser.wait(lambda: browser.run("return [...document.images].every((i) => i.complete && i.naturalWidth === 32)"))
    assert browser.complaints() == [] and all(url.startswith(tmp_path.as_uri()) for url in browser.requests())


def test_a_page_of_the_rows_that_grids_and_evaluations_keep(page: Page, tmp_path: Path) -> None:
    rows = [
        {
            "prompt_index": index,
            "prompt": f"p{index}",
            "seed": 3,
            "model": model,
            "category": "x",
            "file": f"model #{number}/{index}.png",
            "scores": {"red": None if index else 0.5},
        }
        for number, model in enumerate(("base", "mine"))
        for index in range(3)
        if (index, model) != (1, "mine")
    ]
    made = page_of_rows(rows, tmp_path, 2, title="T")
    assert (made.models, made.scorers, made.title) == (["base", "mine"], {"red": 2}, "T")
    assert [(row.prompt, row.note, row.category) for row in made.rows] == [
        ("p0", "seed 3", "x"),
        ("p1", "seed 3", "x"),
    ]
    assert made.rows[0].cells[1] == PageCell(tmp_path / "model #1" / "0.png", {"red": 0.5})
    assert made.rows[1].cells[1] is None

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.folder import Case, SampleFolder
from diffalign.evaluation.listing import ListedImage, list_images, with_prompts

PICTURE = Image.new("RGB", (9, 9))


def put(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(name)


def rows(path: str, *rows: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def names(*sources: str) -> list[str]:
    return [image.file for image in list_images(sources)]


def test_folders_files_and_patterns(scratch: Path) -> None:
    put("a/2.png", "a/1.JPG", "a/deeper/0.webp", "b/3.png", "b/4.png")
    Path("a/notes.md").write_text("x")
    assert names("a") == ["a/1.JPG", "a/2.png", "a/deeper/0.webp"]
    assert names("b/4.png", "b") == ["b/4.png", "b/3.png"]
    assert names("*/[234].png") == ["a/2.png", "b/3.png", "b/4.png"]
    assert names("**/*.*", str(scratch / "b/3.png"))[-1] == str(scratch / "b/3.png")
    assert names("[ab]") == [*names("a"), *names("b")]


def test_prompts_that_images_bring_along(scratch: Path) -> None:
    folder = SampleFolder(Path("drawn"), {"steps": 2})
    folder.prepare()
    folder.add(Case(0, "a cross", 7), PICTURE, {"flat": True})
    (image,) = list_images(["drawn"])
    assert (image.file, image.prompt, image.metadata["seed"]) == ("drawn/images/00000-7.png", "a cross", 7)

    put("c/x.png", "c/y.png")
    Path("c/x.txt").write_text(" a circle\n")
    assert [image.prompt for image in list_images(["c"])] == ["a circle", None]

    rows("c/metadata.jsonl", {"file_name": "y.png", "text": "a square", "ocr_text": "hi"})
    listed = [ListedImage(Path("c/y.png"), "a square", {"ocr_text": "hi"})]
    assert list_images(["c"]) == list_images(["c/metadata.jsonl"]) == listed


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["empty"], "empty: no images there"),
        (["a/*.gif"], "no images there"),
        (["a/notes.md"], "no image that is known"),
        (["one.jsonl", "two.jsonl"], "a/1.png is listed with two prompts, 'x' and 'y'"),
        (["bad.jsonl"], "bad.jsonl row 1 names no file"),
    ],
)
def test_sources_that_are_wrong(scratch: Path, sources: list[str], message: str) -> None:
    put("a/1.png")
    Path("a/notes.md").write_text("x")
    Path("empty").mkdir()
    rows("one.jsonl", {"file": "a/1.png", "prompt": "x"})
    rows("two.jsonl", {"file": "a/1.png", "prompt": "y"})
    rows("bad.jsonl", {"prompt": "y"})
    with pytest.raises(UserError, match=message):
        list_images(sources)


def test_other_prompts(scratch: Path) -> None:
    put("a/1.png", "a/2.png", "b/2.png")
    images = list_images(["a"])
    assert with_prompts(images) == images

    def prompts(*given: Any) -> list[str | None]:
        return [image.prompt for image in with_prompts(images, *given)]

    assert prompts(["one"]) == ["one", "one"] and prompts(["one", "two"]) == ["one", "two"]
    Path("p.txt").write_text("first\nsecond\n")
    assert prompts(None, "p.txt") == ["first", "second"]
    rows("p.jsonl", {"file": "a/2.png", "prompt": "two", "n": 2}, {"file": "a/1.png", "prompt": "one"})
    assert prompts(None, "p.jsonl") == ["one", "two"]
    assert with_prompts(images, None, "p.jsonl")[1].metadata == {"n": 2}
    rows("elsewhere/p.jsonl", {"file": "old/1.png", "prompt": "one"}, {"file": "old/2.png", "prompt": "two"})
    assert prompts(None, "elsewhere/p.jsonl") == ["one", "two"], "by the name alone where there is one of it"

    rows("twice.jsonl", *({"file": f"{folder}/2.png", "prompt": "x"} for folder in "cd"))
    for given, message in (
        ((["one", "two", "three"],), "3 prompts for 2 images"),
        ((["one"], "p.txt"), "not both"),
        ((None, "twice.jsonl"), "no prompt for a/1.png: no row names it"),
    ):
        with pytest.raises(UserError, match=message):
            prompts(*given)
    with pytest.raises(UserError, match=r"no prompt for b/2.png: 2 rows have its name"):
        with_prompts(list_images(["b"]), None, "twice.jsonl")

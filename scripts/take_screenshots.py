"""Make the pictures of the documentation anew from a LoRA of the bundled model. Needs chromium and chromedriver.

    diffalign demo
    python scripts/take_screenshots.py runs/demo/run

Into docs/images: the grid, its page, and the page that asks for votes. Into --work also both pages dark, on a phone,
in large, and what votes say: to be looked at after a change.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DESK, PHONE = (1200, 760), (390, 844)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lora", type=Path, help="folder of a run on shapes-sdxl")
    parser.add_argument("--work", type=Path, default=Path("runs/screenshots"))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    asked = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from browser import chromium

    grid = draw(asked.lora, asked.work)
    shutil.copy(grid / "grid.png", asked.out / "shapes-grid.png")
    with chromium() as browser:
        pictures = [*of_the_grid(browser, grid, asked.work), *of_labelling(browser, grid, asked.work)]
    for picture in pictures:
        if (asked.out / picture.name).exists():
            shutil.copy(picture, asked.out / picture.name)
    print("\n".join(map(str, pictures)))


def draw(lora: Path, work: Path) -> Path:
    """The grid that everything is shown on; the folder."""
    from diffalign.evaluation.grid import GridConfig, run_grid

    run_grid(
        GridConfig(
            pretrained_model_name_or_path="shapes-sdxl",
            models=[f"dpo-half={lora}@0.5", f"dpo={lora}"],
            prompts_file="shapes-heldout",
            max_prompts=24,
            num_inference_steps=25,
            batch_size=24,
            scorer=["shapes-annotator", "shapes-checker"],
            rows=4,
            pick="spread",
            theme="both",
            title="Held-out prompts, same seeds",
            output_dir=str(work / "grid"),
        )
    )
    return work / "grid"


def of_the_grid(browser: Any, grid: Path, work: Path) -> Iterator[Path]:
    browser.open((grid / "grid.html").resolve().as_uri())
    for name, size, scheme in (
        ("grid-page", DESK, "light"),
        ("grid-page-dark", DESK, "dark"),
        ("grid-page-phone", PHONE, "light"),
    ):
        browser.look(*size, scheme)
        browser.choose("#sort", "Largest gain first")
        yield shot(browser, work / f"{name}.png")
    browser.look(*DESK, "dark")
    browser.all(".row:nth-child(1) .open")[2].click()
    yield shot(browser, work / "grid-page-large.png")


def of_labelling(browser: Any, grid: Path, work: Path) -> Iterator[Path]:
    with served(grid, work / "votes") as place:
        browser.look(1200, 700)
        browser.open(place)
        time.sleep(1)
        yield shot(browser, work / "label-start.png")
        for name, votes in (("annotator-2", 20), ("annotator-1", 13)):
            browser.open(f"{place}/label/{name}")
            for done in range(votes):
                ready = f"{done} of "
                browser.wait(
                    lambda text=ready: browser.one("#count").text.startswith(text) and not browser.run("return busy")
                )
                browser.press("123"[done % 3] if done % 5 else "1")
            browser.wait(lambda text=f"{votes} of ": browser.one("#count").text.startswith(text))
        for name, size, scheme in (
            ("label-page", (1200, 700), "light"),
            ("label-page-dark", (1200, 700), "dark"),
            ("label-page-phone", PHONE, "dark"),
        ):
            browser.look(*size, scheme)
            yield shot(browser, work / f"{name}.png")
        browser.driver.get(f"{place}/results")
        for name, size in (("label-results", (1200, 900)), ("label-results-phone", PHONE)):
            browser.look(*size)
            yield shot(browser, work / f"{name}.png")


@contextmanager
def served(grid: Path, votes: Path) -> Iterator[str]:
    """The page of `diffalign label` on two columns of the grid, with no votes yet; its address."""
    import uvicorn

    from diffalign.labelling.items import find_items
    from diffalign.labelling.journal import Journal
    from diffalign.labelling.server import listen, make_app
    from diffalign.labelling.session import Session

    shutil.rmtree(votes, ignore_errors=True)
    journal = Journal(votes)
    session = Session(find_items([str(grid / "base"), str(grid / "dpo")]), journal)
    with listen(0) as listening:
        server = uvicorn.Server(uvicorn.Config(make_app(session), log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            journal.close()


def shot(browser: Any, path: Path) -> Path:
    """A screenshot of the window, when the pictures that are seen are there; those below load when they are."""
    seen = "[...document.images].filter((i) => i.getBoundingClientRect().top < innerHeight)"
    browser.wait(lambda: browser.run(f"return {seen}.every((i) => i.complete)"))
    time.sleep(0.5)
    path.parent.mkdir(parents=True, exist_ok=True)
    browser.driver.save_screenshot(str(path))
    return path


if __name__ == "__main__":
    main()

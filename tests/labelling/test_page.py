"""The labelling page in a browser."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffalign.data.readers import open_pairs
from diffalign.labelling.items import find_items
from diffalign.labelling.journal import Journal
from diffalign.labelling.session import Session

pytestmark = pytest.mark.browser


@pytest.fixture
def session(two_models: list[str], tmp_path: Path) -> Iterator[Session]:
    journal = Journal(tmp_path / "votes")
    yield Session(find_items(two_models), journal)
    journal.close()


def votes(folder: Path) -> list[tuple[str, str]]:
    file = folder / "votes.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    return [(row["annotator"], row["vote"]) for row in rows]


def ready(browser: Any, done: int, total: int = 5) -> None:
    """Wait until so many votes are counted and the next images are there."""
    browser.wait(
        lambda: browser.one("#count").text.startswith(f"{done} of {total}") and not browser.run("return busy")
    )


def test_keys_buttons_and_images_vote_and_undo_takes_back(
    browser: Any, session: Session, served: Callable[[Any], str], tmp_path: Path
) -> None:
    place = served(session)
    browser.open(place)
    browser.wait(lambda: browser.one("#start").is_displayed())
    browser.one("#name").send_keys("annotator-1\n")
    ready(browser, 0)
    assert browser.driver.current_url == f"{place}/label/annotator-1"
    shown = browser.one("#prompt").text
    assert shown in {item.prompt for item in session.items.values()}, "HTML in a prompt is text"
    browser.press("1")
    ready(browser, 1)
    browser.press("t")
    ready(browser, 2)
    browser.press("u")
    ready(browser, 1)
    browser.press("u")
    ready(browser, 0)
    assert browser.one("#prompt").text == shown and not browser.one("#undo").is_enabled()
    browser.all(".side")[1].click()
    ready(browser, 1)
    browser.press("s")
    ready(browser, 2)
    browser.one(".choices [data-choice=tie]").click()
    ready(browser, 3)
    assert [vote for _, vote in votes(tmp_path / "votes")][1:4] == ["tie", "undo", "undo"]
    kinds = list(session.journal.votes["annotator-1"].values())
    assert kinds[0] in ("first", "second") and kinds[1:] == ["skip", "tie"]
    left = [json.loads(line)["left"] for line in (tmp_path / "votes" / "votes.jsonl").open() if "undo" not in line]
    assert kinds[0] != left[-3], "the right image was chosen"
    browser.driver.refresh()
    ready(browser, 3)
    browser.press("2")
    ready(browser, 4)
    browser.press("2")
    browser.wait(lambda: browser.one("#done").is_displayed())
    browser.press("u")
    ready(browser, 4)
    assert browser.complaints() == []
    assert all(url.startswith(place) for url in browser.requests())


def test_two_annotators_do_not_collide(browser: Any, session: Session, served: Callable[[Any], str]) -> None:
    place = served(session)
    browser.open(f"{place}/label/annotator-1")
    ready(browser, 0)
    first = browser.driver.current_window_handle
    browser.driver.switch_to.new_window("tab")
    browser.look()
    try:
        browser.driver.get(f"{place}/label/annotator-2")
        ready(browser, 0)
        for done, key in enumerate(("3", "3", "3"), 1):
            browser.press(key)
            ready(browser, done)
        browser.driver.switch_to.window(first)
        browser.press("s")
        ready(browser, 1)
    finally:
        for handle in browser.driver.window_handles:
            if handle != first:
                browser.driver.switch_to.window(handle)
                browser.driver.close()
        browser.driver.switch_to.window(first)
    assert list(session.journal.votes["annotator-2"].values()) == ["tie"] * 3
    assert list(session.journal.votes["annotator-1"].values()) == ["skip"]


def test_results_and_a_phone(browser: Any, session: Session, served: Callable[[Any], str]) -> None:
    place = served(session)
    for item in session.items:
        session.vote("annotator-1", item, "left")
        session.vote("annotator-2", item, "tie")
    session.undo("annotator-2", item)
    browser.open(f"{place}/results")
    browser.wait(lambda: "People prefer" in browser.one("#results").text)
    assert (
        "mine to base" in browser.one("#results").text
        and "annotator-1 and annotator-2" in browser.one("#results").text
    )
    assert "annotator-1: mine to base" in browser.one("#results").text
    browser.look(375, 812, "dark")
    assert browser.run("return document.documentElement.scrollWidth") == 375
    browser.driver.get(f"{place}/label/annotator-2")
    ready(browser, 4)
    first, second = (image.rect for image in browser.all(".side img"))
    assert second["y"] >= first["y"] + first["height"] > first["y"] + 100
    assert browser.run("return [document.documentElement.scrollWidth, document.documentElement.scrollHeight]") == [
        375,
        812,
    ]
    assert browser.texts(".choices [data-choice=left]") == ["Upper"]


def test_a_killed_server_loses_no_vote(browser: Any, two_models: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "diffalign", "label", *two_models, "--out", str(out)]

    def start(port: str) -> tuple[subprocess.Popen[str], str]:
        server = subprocess.Popen([*command, "--port", port], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        return server, server.stdout.readline().split()[-1]

    server, place = start("0")
    port = place.rstrip("/").rpartition(":")[2]
    try:
        browser.open(f"{place}label/annotator-1")
        ready(browser, 0)
        for done, key in enumerate("12", 1):
            browser.press(key)
            ready(browser, done)
        server.kill()
        server.wait()
        assert len(votes(out)) == 2
        # A vote while the server is away waits in the page.
        browser.press("3")
        browser.wait(lambda: browser.one("#trouble").is_displayed())
        assert "sent again" in browser.one("#trouble").text and len(votes(out)) == 2
        server, _ = start(port)
        ready(browser, 3)
        assert not browser.one("#trouble").is_displayed()
        assert [vote for _, vote in votes(out)][2:] == ["tie"]
        # The same where the page is left meanwhile.
        server.kill()
        server.wait()
        browser.press("s")
        browser.wait(lambda: browser.one("#trouble").is_displayed())
        browser.driver.get("about:blank")
        server, _ = start(port)
        browser.open(f"{place}label/annotator-1")
        ready(browser, 4)
        assert [vote for _, vote in votes(out)][2:] == ["tie", "skip"]
        server.send_signal(signal.SIGTERM)
        assert server.stdout is not None and "3 pairs in" in server.stdout.read()
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.wait()
    assert len(open_pairs(out, ties="keep")) == 3 and len(open_pairs(out)) == 2
    done = subprocess.run([*command, "--no_serve"], capture_output=True, text=True, check=True)
    assert "people prefer mine to base" in done.stdout

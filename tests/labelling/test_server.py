from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from diffalign.labelling.items import Item, find_items
from diffalign.labelling.journal import Journal
from diffalign.labelling.session import Session


@pytest.fixture
def items(two_models: list[str]) -> list[Item]:
    return find_items(two_models)


@pytest.fixture
def session(items: list[Item], tmp_path: Path) -> Iterator[Session]:
    journal = Journal(tmp_path / "votes")
    yield Session(items, journal)
    journal.close()


Ask = Callable[..., tuple[int, Any, Any]]


@pytest.fixture
def ask(session: Session, served: Callable[[Any], str]) -> Ask:
    """``ask(path, body, **headers)``: status, headers and body."""
    place = served(session).removeprefix("http://")

    def request(path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        connection = http.client.HTTPConnection(place, timeout=20)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            given = {"Content-Type": "application/json"} | given
        content = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", path, content, given)
        answer = connection.getresponse()
        text = answer.read()
        connection.close()
        kind = answer.headers.get_content_type()
        return answer.status, answer.headers, json.loads(text) if kind == "application/json" else text

    return request


def test_votes_are_in_the_pairs_own_order(ask: Ask, session: Session, items: list[Item]) -> None:
    by_id = {item.id: item for item in items}
    lefts = []
    while (state := ask("/api/label/annotator-1")[2])["item"]:
        shown = state["item"]
        picture = ask(shown["left"])[2]
        lefts.append([image.read() for image in by_id[shown["id"]].images].index(picture))
        status, _, answer = ask("/api/label/annotator-1/vote", {"item": shown["id"], "choice": "left"})
        assert status == 200 and answer["undo"] == shown["id"]
        assert session.journal.votes["annotator-1"][shown["id"]] == ("first", "second")[lefts[-1]]
    assert len(lefts) == 5 and state["done"] == state["total"] == 5


def test_every_annotator_has_an_order_and_sides_of_their_own(items: list[Item], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "x")
    sessions = [Session(items, journal, seed) for seed in (0, 0, 1)]
    names = [f"annotator {n}" for n in range(12)]
    orders = [[tuple(session._order(name)) for name in names] for session in sessions]
    sides = [[tuple(session._left(name, item.id) for item in items) for name in names] for session in sessions]
    assert orders[0] == orders[1] != orders[2] and sides[0] == sides[1] != sides[2]
    assert len(set(orders[0])) > 8 and len(set(sides[0])) > 5
    assert 15 < sum(map(sum, sides[0])) < 45
    journal.close()


def test_undo_shows_the_pair_again(ask: Ask, session: Session) -> None:
    first = ask("/api/label/annotator-1")[2]["item"]
    second = ask("/api/label/annotator-1/vote", {"item": first["id"], "choice": "tie"})[2]["item"]
    assert second["id"] != first["id"]
    back = ask("/api/label/annotator-1/undo", {"item": first["id"]})[2]
    assert back["item"] == first and back["next"] == second and back["done"] == 0 and back["undo"] is None
    assert ask("/api/label/annotator-1/undo", {"item": first["id"]})[2] == back, (
        "an answer that got lost is asked for again"
    )
    assert session.journal.votes["annotator-1"] == {}


def test_what_is_wrong_is_said_and_nothing_is_written(ask: Ask, session: Session) -> None:
    item = ask("/api/label/annotator-1")[2]["item"]["id"]
    for path, body, words in (
        ("/api/label/annotator-1/vote", {"item": item, "choice": "both"}, "no choice"),
        ("/api/label/annotator-1/vote", {"item": "gone", "choice": "left"}, "load the page again"),
        ("/api/label/annotator-1/vote", {"item": item}, "lacks 'choice'"),
        ("/api/label/%3Cb%3E/vote", {"item": item, "choice": "left"}, "a name has"),
        ("/api/label/annotator-1/undo", [], "must be an object"),
    ):
        status, _, answer = ask(path, body)
        assert status == 400 and words in answer["error"]
    assert ask("/api/label/annotator-1/vote", {"item": "x" * 20_000, "choice": "left"})[0] == 413
    assert ask("/image/nothing")[0] == 404 and ask("/static/..%2Fserver.py")[0] == 404
    assert session.journal.votes == {}


def test_other_pages_and_other_names_of_this_machine_are_refused(ask: Ask, session: Session) -> None:
    item = ask("/api/label/annotator-1")[2]["item"]["id"]
    vote = {"item": item, "choice": "left"}
    assert ask("/api/label/annotator-1/vote", vote, Origin="http://evil.example")[0] == 403
    assert ask("/api/label/annotator-1/vote", vote, Origin="null")[0] == 403
    assert ask("/api/label/annotator-1/vote", vote, Content_Type="text/plain")[0] == 415
    assert ask("/api/start", None, Host="evil.example:80")[0] == 403
    assert ask("/api/start", None, Host="127.0.0.1.evil.example")[0] == 403
    assert session.journal.votes == {}
    assert ask("/api/start", None, Host="localhost:9999")[0] == 200, "a tunnel has another port"
    assert ask("/api/label/annotator-1/vote", vote, Host="localhost:9999", Origin="http://localhost:9999")[0] == 200
    _, headers, _ = ask("/")
    assert (
        "default-src 'none'" in headers["Content-Security-Policy"] and headers["X-Content-Type-Options"] == "nosniff"
    )


def test_results_are_served(ask: Ask) -> None:
    item = ask("/api/label/annotator-1")[2]["item"]["id"]
    ask("/api/label/annotator-1/vote", {"item": item, "choice": "right"})
    results = ask("/api/results")[2]
    assert results["win_rates"][0]["n"] == 1 and sum(results["counts"]["annotator-1"].values()) == 1
    assert ask("/api/start")[2]["annotators"] == [{"name": "annotator-1", "done": 1, "total": 5}]

from __future__ import annotations

import http.client
import json
import logging
import socket
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import Reward, load_reward
from diffalign.rewards.remote.protocol import Limits, encode_image
from diffalign.rewards.remote.server import RewardServer

from .conftest import Serve, pictures, red


class Picky(Reward):
    """Raises for any batch with a dark image in it; says itself that it cannot score a black one."""

    name = "picky"
    takes = "pil"

    def score(self, images: list[Image.Image], prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
        values = torch.tensor([image.getpixel((0, 0))[0] for image in images])  # type: ignore[index]
        if (values < 10).any():
            raise RuntimeError(f"{int(values.min())} is too dark")
        return values


class Best(Reward):
    """1 for the reddest image of its group, else 0."""

    name = "best"
    mode = "groupwise"
    uses_prompt = False

    def score(
        self, images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]], group_ids: list[int]
    ) -> Tensor:
        reds, groups = images[:, 0].mean((1, 2)), torch.tensor(group_ids)
        if (groups == 13).any():
            raise RuntimeError("an unlucky group")
        return torch.stack(
            [(red == reds[groups == group].max()).float() for red, group in zip(reds, groups, strict=True)]
        )


def flat(value: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (value, 0, 0))


def ask(server: RewardServer, method: str, route: str, body: Any = None, **headers: str) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=10)  # type: ignore[arg-type]
    content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    connection.request(method, route, content, {"Content-Type": "application/json", **headers})
    answer = connection.getresponse()
    status, said = answer.status, json.loads(answer.read())
    connection.close()
    return status, said


def request(*images: Image.Image, rewards: tuple[str, ...] = ("red",), **more: list[Any]) -> dict[str, Any]:
    items = [
        {"id": str(i), "prompt": "x", "image": encode_image(image), **{key: values[i] for key, values in more.items()}}
        for i, image in enumerate(images)
    ]
    return {"version": 1, "rewards": list(rewards), "items": items}


def test_scores_are_those_of_the_reward(serve: Serve) -> None:
    server, images = serve(), pictures(3)
    status, said = ask(server, "POST", "/score", request(*images))
    local = load_reward(red)(images, "x")
    assert status == 200 and [item["id"] for item in said["items"]] == ["0", "1", "2"]
    assert [item["scores"]["red"]["reward"] for item in said["items"]] == local.rewards.tolist()
    assert said["items"][1]["scores"]["red"]["all"] == local.details["all"][1].tolist()
    assert said["identities"] == {"red": server.rewards["red"].reward.identity}


def test_several_rewards_in_one_request(serve: Serve) -> None:
    server = serve({"red": red, "best": Best()})
    _, said = ask(server, "POST", "/score", request(flat(9), flat(90), rewards=("best", "red"), group=[1, 1]))
    assert [item["scores"]["best"]["reward"] for item in said["items"]] == [0, 1]
    assert said["items"][0]["scores"]["red"]["reward"] == pytest.approx(9 / 255)
    assert said["identities"].keys() == {"best", "red"}


def test_what_it_says_of_itself(serve: Serve) -> None:
    server = serve({"red": red, "best": Best()})
    _, health = ask(server, "GET", "/health")
    assert (health["status"], health["loaded"], health["queue"]) == ("ok", [], 0)
    server.load()
    assert ask(server, "GET", "/health")[1]["loaded"] == ["red", "best"]
    _, said = ask(server, "GET", "/rewards")
    assert said["limits"] == vars(Limits())
    best = said["rewards"][1]
    assert (best["name"], best["mode"], best["uses_prompt"]) == ("best", "groupwise", False)
    assert best["identity"] == server.rewards["best"].reward.identity


def test_it_is_reached_from_this_machine_only_unless_asked(caplog: pytest.LogCaptureFixture) -> None:
    for options, address, warned in (
        ({}, "127.0.0.1", False),
        ({"host": "0.0.0.0"}, "0.0.0.0", True),
        ({"host": "0.0.0.0", "token": "secret"}, "0.0.0.0", False),
    ):
        caplog.clear()
        with RewardServer({"red": load_reward(red)}, **options) as server:
            assert server.server_address[0] == address
        assert ("there is no token" in caplog.text) == warned


def test_a_bad_image_fails_alone(serve: Serve) -> None:
    server = serve({"picky": Picky()})
    asked = request(flat(20), flat(3), flat(30), rewards=("picky",))
    asked["items"].append({"id": "broken", "prompt": "x", "image": "zzz"})
    asked["items"].append({"id": "mute", "image": encode_image(flat(50))})
    _, said = ask(server, "POST", "/score", asked)
    rows = {item["id"]: item for item in said["items"]}
    assert [rows[key]["scores"]["picky"]["reward"] for key in ("0", "2")] == [20, 30]
    assert rows["1"]["errors"] == {"picky": "RuntimeError: 3 is too dark"} and rows["1"]["scores"] == {}
    assert "not base64" in rows["broken"]["errors"]["picky"]
    assert "needs a prompt" in rows["mute"]["errors"]["picky"]


def test_a_group_is_scored_together_and_fails_alone(serve: Serve) -> None:
    server = serve({"best": Best(batch_size=2)})
    asked = request(*map(flat, (10, 99, 50, 70, 60)), rewards=("best",), group=[1, 13, 1, 2, 1])
    asked["items"].append({"id": "alone", "image": encode_image(flat(1))})
    _, said = ask(server, "POST", "/score", asked)
    scores = [item["scores"].get("best", {}).get("reward") for item in said["items"]]
    assert scores == [0, None, 0, 1, 1, None]
    assert "an unlucky group" in said["items"][1]["errors"]["best"]
    assert "needs a 'group'" in said["items"][5]["errors"]["best"]


def test_a_model_that_cannot_be_loaded_is_an_error_of_the_server(serve: Serve) -> None:
    class Absent(Picky):
        def load(self) -> None:
            raise OSError("no weights")

    status, said = ask(serve({"picky": Absent()}), "POST", "/score", request(flat(50), rewards=("picky",)))
    assert (status, said["error"]) == (500, "OSError: no weights")


@pytest.mark.parametrize(
    ("method", "route", "body", "headers", "status", "message"),
    [
        ("GET", "/nowhere", None, {}, 404, "POST /score"),
        ("POST", "/health", b"{}", {}, 404, "POST /score"),
        ("POST", "/score", b"{}", {"Content-Type": "text/plain"}, 415, "application/json"),
        ("POST", "/score", b"{}", {"Content-Length": "many"}, 411, "Content-Length"),
        ("POST", "/score", b" " * 5000, {}, 413, "5000 bytes are over the limit of 4096"),
        ("POST", "/score", b"pickle", {}, 400, "not JSON"),
    ],
)
def test_requests_that_are_refused(
    serve: Serve, method: str, route: str, body: Any, headers: dict[str, str], status: int, message: str
) -> None:
    code, said = ask(serve(limits=Limits(body_bytes=4096)), method, route, body, **headers)
    assert code == status and message in said["error"]


def test_a_body_far_over_the_limit_is_not_read(serve: Serve) -> None:
    server = serve(limits=Limits(body_bytes=4096))
    with socket.create_connection(server.server_address[:2], timeout=10) as link:  # type: ignore[arg-type]
        head = "POST /score HTTP/1.1\r\nContent-Type: application/json\r\nContent-Length: 99999999999\r\n\r\n"
        link.sendall(head.encode())
        assert b" 413 " in link.recv(100)


def test_the_token_is_needed_everywhere_and_never_logged(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(token="open-sesame")
    for method, route, body in (("GET", "/health", None), ("GET", "/rewards", None), ("POST", "/score", request())):
        assert ask(server, method, route, body)[0] == 401
        assert ask(server, method, route, body, Authorization="Bearer open-barley")[0] == 401
        assert ask(server, method, route, body, Authorization="Bearer open-sesame")[0] == 200
    assert "open-sesame" not in caplog.text and "open-barley" not in caplog.text and "/health" in caplog.text


def test_what_is_under_way_is_answered_before_it_stops() -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(images: Tensor, prompts: list[str], metadata: Any) -> Tensor:
        entered.set()
        assert go_on.wait(10)
        return torch.ones(len(images))

    server = RewardServer({"slow": load_reward(slow)})
    serving = threading.Thread(target=server.serve)
    serving.start()
    answers: list[Any] = []
    body = request(flat(9), rewards=("slow",))
    asking = threading.Thread(target=lambda: answers.append(ask(server, "POST", "/score", body)))
    asking.start()
    assert entered.wait(10)
    assert ask(server, "GET", "/health")[1]["queue"] == 1
    server.stop()
    serving.join(10)
    threading.Timer(0.1, go_on.set).start()
    server.close()
    asking.join(10)
    assert answers[0][1]["items"][0]["scores"]["slow"]["reward"] == 1
    with pytest.raises(ConnectionRefusedError):
        ask(server, "GET", "/health")


def test_too_many_requests_are_told_to_come_again(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setattr("diffalign.rewards.remote.server.WAITING_AT_MOST", 0)
    assert ask(server, "POST", "/score", request())[0] == 503


def test_a_port_that_is_taken(serve: Serve) -> None:
    taken = serve().server_port
    with pytest.raises(UserError, match=f"cannot listen on 127.0.0.1, port {taken}.*--port"):
        RewardServer({"red": load_reward(red)}, port=taken)
    with pytest.raises(UserError, match="no reward to serve"):
        RewardServer({})

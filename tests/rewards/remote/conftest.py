"""Reward servers on a free loopback port: real ones, and one that says whatever a test wants it to say."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from diffalign.rewards import Reward, load_reward
from diffalign.rewards.remote.protocol import Limits
from diffalign.rewards.remote.server import RewardServer

Serve = Callable[..., RewardServer]
Say = Callable[["Scripted", dict[str, Any]], None]


def red(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean of the red channel, and details of both forms."""
    return images[:, 0].mean((1, 2)), {"green": images[:, 1].mean((1, 2)), "all": images.mean((2, 3))}


def pictures(count: int, size: tuple[int, int] = (6, 5)) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start a server of rewards; all are stopped at the end of the test."""
    started: list[RewardServer] = []

    def start(rewards: Mapping[str, Any] | None = None, **options: Any) -> RewardServer:
        made = {name: reward if isinstance(reward, Reward) else load_reward(reward) for name, reward in
                (rewards or {"red": red}).items()}  # fmt: skip
        server = RewardServer(made, **options)
        threading.Thread(target=server.serve).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()
        server.close()


class Scripted(BaseHTTPRequestHandler):
    """Lists one reward, "red", and answers each POST with the next thing to say; the last one again and again."""

    server: ScriptedServer

    def do_GET(self) -> None:
        row = {"name": "red", "identity": "red/1/a"}
        self.say(200, {"version": 1, "rewards": [row], "limits": vars(Limits())})

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.append(json.loads(content))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self, self.server.asked[-1])

    def say(self, status: int, payload: Any) -> None:
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        pass


class ScriptedServer(ThreadingHTTPServer):
    script: list[Say]
    asked: list[dict[str, Any]]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/red"


@pytest.fixture
def scripted() -> Iterator[Callable[..., ScriptedServer]]:
    """Start a server that says what it is told to."""
    started: list[ScriptedServer] = []

    def start(*script: Say) -> ScriptedServer:
        server = ScriptedServer(("127.0.0.1", 0), Scripted)
        server.script, server.asked = list(script), []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        started.append(server)
        return server

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def well(handler: Scripted, asked: dict[str, Any]) -> None:
    """A right answer: every image scores 0.5."""
    handler.say(200, right(asked))


def right(asked: dict[str, Any]) -> dict[str, Any]:
    items = [{"id": item["id"], "scores": {"red": {"reward": 0.5}}, "errors": {}} for item in asked["items"]]
    return {"version": 1, "identities": {"red": "red/1/a"}, "items": items}

"""Folders of drawn images as `diffalign sample` leaves them, and a served session."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

PROMPTS = ["a red circle", "a blue <b>square</b>", "a cross", "two crosses", "a disc"]


def draw(folder: Path, shade: int, prompts: list[str], seeds: tuple[int, ...] = (7,)) -> str:
    (folder / "images").mkdir(parents=True)
    rows = []
    for index, prompt in enumerate(prompts):
        for seed in seeds:
            file = f"images/{index:05d}-{seed}.png"
            Image.new("RGB", (16, 16), (shade, 40 * index, seed)).save(folder / file)
            rows.append({"file": file, "prompt_index": index, "prompt": prompt, "seed": seed})
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(folder)


@pytest.fixture
def drawn(tmp_path: Path) -> Callable[..., str]:
    """``drawn(name, shade, prompts, seeds)``: a folder of drawn images, its path."""

    def make(name: str, shade: int, prompts: list[str] = PROMPTS, seeds: tuple[int, ...] = (7,)) -> str:
        return draw(tmp_path / name, shade, prompts, seeds)

    return make


@pytest.fixture
def two_models(drawn: Callable[..., str]) -> list[str]:
    """Folders of two models, called base and mine."""
    return [drawn("base", 0), drawn("mine", 200)]


@pytest.fixture
def served() -> Iterator[Callable[[Any], str]]:
    """``served(session)``: its address."""
    uvicorn = pytest.importorskip("uvicorn")
    from diffalign.labelling.server import listen, make_app

    with contextlib.ExitStack() as stack:

        def start(session: Any) -> str:
            listening = stack.enter_context(listen(0))
            server = uvicorn.Server(uvicorn.Config(make_app(session), log_level="warning"))
            thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
            thread.start()
            stack.callback(thread.join, 20)
            stack.callback(setattr, server, "should_exit", True)
            while not server.started:
                time.sleep(0.01)
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start

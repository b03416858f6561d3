from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from diffalign.app import serve_reward
from diffalign.app.serve_reward import ServeConfig, load_served, make_server, run
from diffalign.config import parse_args
from diffalign.errors import UserError
from diffalign.rewards import load_reward
from diffalign.rewards.remote.protocol import TOKEN_VARIABLE

MINE = "def bright(images, prompts, metadata):\n    return images.mean((1, 2, 3))\n"


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py:bright"


@pytest.fixture
def signals() -> Iterator[None]:
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


def test_names_of_what_is_served(mine: str) -> None:
    spec = {"reward": "shapes-checker", "name": "truth", "options": {"batch_size": 3}}
    served = load_served(ServeConfig(rewards=["shapes-checker", mine, f"light={mine}", spec]))
    assert list(served) == ["shapes-checker", "bright", "light", "truth"]
    assert served["truth"].batch_size == 3 and served["light"].batch_size == 32
    with pytest.raises(UserError, match="two rewards are called 'bright': rename one, as in OTHER="):
        load_served(ServeConfig(rewards=[mine, mine]))
    with pytest.raises(UserError, match="Did you mean 'shapes-clip'"):
        load_served(ServeConfig(rewards=["shapes-clop"]))


def test_the_server_is_as_the_config_says(mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_server(ServeConfig(rewards=[mine], port=0)) as server:
        assert server.server_address[0] == "127.0.0.1" and server.token is None
    (tmp_path / "token").write_text("open-sesame\n")
    monkeypatch.setenv(TOKEN_VARIABLE, "open-barley")
    options = ["--token_file", str(tmp_path / "token"), "--max_body_mb", "2", "--max_items", "5"]
    config = parse_args(ServeConfig, ["--rewards", mine, "--port", "0", *options, "--max_image_megapixels", "0.5"])
    with make_server(config) as server:
        assert server.token == "open-sesame"
        limits = server.limits
        assert (limits.body_bytes, limits.items, limits.pixels) == (2 * 2**20, 5, 500_000)
    with make_server(ServeConfig(rewards=[mine], port=0)) as server:
        assert server.token == "open-barley"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rewards": []}, "which rewards"),
        ({"port": 70000}, "0 to 65535"),
        ({"max_items": 0}, "max_items must"),
    ],
)
def test_wrong_configs(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ServeConfig(**{"rewards": ["shapes-clip"], **changes})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop(
    mine: str, number: int, signals: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: list[float] = []
    made = make_server(ServeConfig(rewards=[mine], port=0))
    monkeypatch.setattr(serve_reward, "make_server", lambda config: made)

    def ask() -> None:
        reward = load_reward(f"remote:{made.address}/bright")
        scores.extend(reward([Image.new("RGB", (8, 8), "white")], "x").rewards.tolist())
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    run(ServeConfig(rewards=[mine]))
    asking.join(10)
    assert scores == [1.0] and signal.getsignal(number) == signal.SIG_DFL
    shown = capsys.readouterr()
    assert f"serving bright on {made.address}" in shown.out and "stopping" in shown.err

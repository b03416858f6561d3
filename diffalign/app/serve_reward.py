"""``diffalign serve-reward``: rewards over HTTP, for training that runs elsewhere or cannot load them itself."""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from diffalign.app import console
from diffalign.config import field, parse_args
from diffalign.errors import UserError

if TYPE_CHECKING:
    from diffalign.rewards import Reward
    from diffalign.rewards.remote.server import RewardServer

_NAME = re.compile(r"[\w.-]+")


@dataclass(kw_only=True)
class ServeConfig:
    """Serve rewards over HTTP: JSON and PNG, on this machine only unless told otherwise.

    A training run or `diffalign score` uses one as remote:http://127.0.0.1:8000/NAME.
    """

    rewards: list[Any] = field(
        [], help="Rewards to serve: names, checkpoints as NAME:CHECKPOINT, or path/to/file.py:Class; each may be "
        "renamed, NAME=REWARD."
    )  # fmt: skip
    host: str = field("127.0.0.1", help="Address to listen on; 0.0.0.0 for all of this machine's.")
    port: int = field(8000, help="Port to listen on; 0 for any free one.")
    token_file: str | None = field(
        None,
        help="File with a token that clients must know. Default: the environment variable DIFFALIGN_REWARD_TOKEN, if "
        "it is set.",
    )
    device: str | None = field(None, help="Device of the models. Default: a GPU if there is one.")
    dtype: Literal["fp32", "fp16", "bf16"] = field("fp32", help="Type of the models' weights.")
    batch_size: int = field(32, help="Images that a model is given at once.")
    lazy: bool = field(False, help="Load each model with its first request, not at the start.")
    max_body_mb: int = field(64, help="Largest request, in MiB.")
    max_items: int = field(256, help="Most images of a request.")
    max_image_megapixels: float = field(32.0, help="Largest image, in millions of pixels.")
    until_stdin_closes: bool = field(False, help="Stop when standard input closes: a server that a program started.")

    def __post_init__(self) -> None:
        if not self.rewards:
            raise UserError(
                "which rewards? diffalign serve-reward --rewards NAME ...; `diffalign rewards` lists them."
            )
        if not 0 <= self.port <= 65535:
            raise UserError(f"port must be in 0 to 65535, got {self.port}")
        for name in ("batch_size", "max_body_mb", "max_items", "max_image_megapixels"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be above 0, got {getattr(self, name)}")


def main(argv: Sequence[str]) -> int:
    """Serve until interrupted or terminated."""
    config = parse_args(ServeConfig, argv, prog="diffalign serve-reward")
    console.set_up()
    run(config)
    return 0


def run(config: ServeConfig) -> None:
    """Serve until a signal; requests under way are answered first, a second signal does not wait for them.

    Raises:
        UserError: a reward, the port or the token file is wrong.
    """
    server = make_server(config)
    with server:
        if not config.lazy:
            server.load()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: _stop(server))
        if config.until_stdin_closes:
            threading.Thread(target=_wait_for_stdin, args=(server,), daemon=True).start()
        print(f"serving {', '.join(server.rewards)} on {server.address}", flush=True)
        server.serve()


def make_server(config: ServeConfig) -> RewardServer:
    """A server as the config says, listening, with nothing loaded."""
    from diffalign.rewards.remote.protocol import Limits
    from diffalign.rewards.remote.server import RewardServer
    from diffalign.rewards.remote.transport import read_token

    pixels = int(config.max_image_megapixels * 1e6)
    limits = Limits(config.max_body_mb * 2**20, config.max_items, pixels, max(pixels, Limits().request_pixels))
    token = read_token(Path(config.token_file) if config.token_file else None)
    return RewardServer(load_served(config), host=config.host, port=config.port, token=token, limits=limits)


def load_served(config: ServeConfig) -> dict[str, Reward]:
    """The rewards by the names they are served under.

    Raises:
        UserError: no such reward, or two of one name.
    """
    from diffalign.rewards import load_reward
    from diffalign.rewards.combine import RewardSpec

    served: dict[str, Reward] = {}
    for index, item in enumerate(config.rewards):
        spec = RewardSpec.of(item, f"rewards[{index}]")
        given, equals, rest = spec.reward.partition("=")
        renamed = bool(equals) and _NAME.fullmatch(given) is not None
        options = {"device": config.device, "dtype": config.dtype, "batch_size": config.batch_size, **spec.options}
        reward = load_reward(rest if renamed else spec.reward, **options)
        name = spec.name or (given if renamed else reward.name)
        if name in served:
            raise UserError(f"two rewards are called {name!r}: rename one, as in OTHER={spec.reward}")
        served[name] = reward
    return served


def _wait_for_stdin(server: RewardServer) -> None:
    sys.stdin.read()
    server.stop()


def _stop(server: RewardServer) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    print("stopping when requests under way are answered", file=sys.stderr, flush=True)
    threading.Thread(target=server.stop).start()

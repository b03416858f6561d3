"""A server of rewards on the standard library's HTTP: loopback by default, sizes limited, every failure said.

    with RewardServer({"pickscore": load_reward("pickscore")}, port=8000) as server:
        print(server.address)
        server.serve()

What is said over the wire is in :mod:`diffalign.rewards.remote.protocol`. Requests are answered in threads, images of
up to four are unpacked at once, and a reward scores one request at a time.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from diffalign import __version__
from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.remote.protocol import (
    VERSION,
    BadRequest,
    Item,
    Limits,
    Score,
    read_request,
    write_json,
    write_score,
)

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
UNPACKED_AT_ONCE = 4
"""Requests whose images are in memory at the same time; the others wait with their bodies unread."""
WAITING_AT_MOST = 256
"""Requests under way; one more is told to come again."""
_DISCARDED = 16 * 2**20


class ServedReward:
    """A reward behind a lock: one request at a time, and failures told item by item."""

    def __init__(self, name: str, reward: Reward) -> None:
        self.name, self.reward = name, reward
        self.loaded = False
        self._lock = threading.Lock()

    def load(self) -> None:
        """Load the model now instead of with the first request."""
        with self._lock:
            self.reward.prepare()
            self.loaded = True

    def describe(self) -> dict[str, Any]:
        """The row of ``GET /rewards``."""
        reward = self.reward
        return {
            "name": self.name,
            "version": reward.version,
            "identity": reward.identity,
            "summary": reward.summary,
            "mode": reward.mode,
            "uses_prompt": reward.uses_prompt,
            "required_metadata": list(reward.required_metadata),
            "scale": reward.scale,
            "typical": reward.typical,
            "loaded": self.loaded,
        }

    def score(self, items: Sequence[Item]) -> list[Score | str]:
        """A score, or why there is none, for each of ``items``, all of which have an image.

        Raises:
            Exception: whatever loading the model raises; scoring raises nothing.
        """
        if not self.loaded:
            self.load()
        ready = [index for index, item in enumerate(items) if not self._lack(item)]
        results: list[Score | str] = [self._lack(item) for item in items]
        with self._lock:
            for index, result in zip(ready, self._score([items[index] for index in ready]), strict=True):
                results[index] = result
        return results

    def _lack(self, item: Item) -> str:
        if self.reward.uses_prompt and item.prompt is None:
            return f"the reward {self.name} needs a prompt"
        if self.reward.mode == "groupwise" and item.group is None:
            return f"the reward {self.name} compares the images of a group: the item needs a 'group'"
        return ""

    def _score(self, items: Sequence[Item]) -> list[Score | str]:
        """One call for all; if that fails, one for each image or group, so that a bad one fails alone."""
        if not items:
            return []
        try:
            return self._call(items)
        except Exception as error:
            units = self._units(items)
            if len(units) == 1:
                logger.warning("%s: %s cannot be scored", self.name, _names(items), exc_info=True)
                return [f"{type(error).__name__}: {error}"] * len(items)
        results: dict[str, Score | str] = {}
        for unit in units:
            results.update(zip([item.id for item in unit], self._score(unit), strict=True))
        return [results[item.id] for item in items]

    def _units(self, items: Sequence[Item]) -> list[list[Item]]:
        if self.reward.mode != "groupwise":
            return [[item] for item in items]
        groups: dict[int | None, list[Item]] = {}
        for item in items:
            groups.setdefault(item.group, []).append(item)
        return list(groups.values())

    def _call(self, items: Sequence[Item]) -> list[Score | str]:
        groups = [item.group for item in items] if self.reward.mode == "groupwise" else None
        output = self.reward(
            [item.image for item in items if item.image is not None],
            [item.prompt or "" for item in items],
            [item.metadata for item in items],
            group_ids=groups,  # type: ignore[arg-type]
        )
        rewards, details = output.rewards.tolist(), {key: value.tolist() for key, value in output.details.items()}
        return [
            Score(rewards[k], {key: values[k] for key, values in details.items()})
            if valid
            else output.messages[k] or "no reason given"
            for k, valid in enumerate(output.valid.tolist())
        ]

    def close(self) -> None:
        """Let the model go."""
        with self._lock:
            self.reward.close()
            self.loaded = False


class RewardServer(ThreadingHTTPServer):
    """Serves rewards by name until :meth:`stop`.

    Args:
        rewards: by the name they are asked for.
        host: address to listen on. Anything but a loopback address can be reached by other machines.
        port: 0 for any free one.
        token: what a client must know; None for no token.
        limits: of a request's size.

    Raises:
        UserError: the port is taken, or the host is not an address of this machine.
    """

    daemon_threads = False  # requests under way are answered before the server goes
    request_queue_size = 128

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        *,
        host: str = LOOPBACK,
        port: int = 0,
        token: str | None = None,
        limits: Limits | None = None,
    ) -> None:
        if not rewards:
            raise UserError("no reward to serve: name at least one")
        self.rewards = {name: ServedReward(name, reward) for name, reward in rewards.items()}
        self.token, self.limits = token, limits or Limits()
        self.queue = 0
        self.started = time.monotonic()
        self.stopping = threading.Event()
        self._counter, self._unpacked = threading.Lock(), threading.BoundedSemaphore(UNPACKED_AT_ONCE)
        if ":" in host:
            self.address_family = socket.AF_INET6
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}, port {port}: {error.strerror or error}. Choose another --port (0 for any "
                "free one), or a --host of this machine."
            ) from error
        if not is_loopback(host) and token is None:
            logger.warning(
                "Anyone who can reach port %d of this machine can use this server: there is no token. Set one, or "
                "listen on %s.",
                self.server_port,
                LOOPBACK,
            )

    @property
    def address(self) -> str:
        """Where it listens: ``http://host:port``."""
        host = str(self.server_address[0])
        return f"http://{f'[{host}]' if ':' in host else host}:{self.server_port}"

    def load(self) -> None:
        """Load all models now."""
        for served in self.rewards.values():
            served.load()

    def serve(self) -> None:
        """Answer requests until :meth:`stop` is called, from another thread or a signal handler's."""
        self.serve_forever(poll_interval=0.1)

    def stop(self) -> None:
        """Take no more requests; those that are being scored are answered by :meth:`close`."""
        self.stopping.set()
        self.shutdown()

    def close(self) -> None:
        """Wait for requests under way, and let port and models go."""
        self.stopping.set()
        self.server_close()
        for served in self.rewards.values():
            served.close()

    def __exit__(self, *args: Any) -> None:
        self.close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what went wrong with a connection; a client that goes away is not worth a traceback."""
        logger.info("the connection to %s broke", client_address[0], exc_info=True)

    def answer(self, content: bytes) -> dict[str, Any]:
        """The answer to the body of a /score request. Raises BadRequest."""
        items, names = read_request(content, list(self.rewards), self.limits)
        usable = [item for item in items if item.problem is None]
        rows = {item.id: _Row(item.id, names if item.problem else (), item.problem) for item in items}
        for name in names:
            for item, result in zip(usable, self.rewards[name].score(usable), strict=True):
                rows[item.id].add(name, result)
        return {
            "version": VERSION,
            "identities": {name: self.rewards[name].reward.identity for name in names},
            "items": [row.to_json() for row in rows.values()],
        }

    def enter(self) -> bool:
        """Count a request in; False if there are too many, or the server is stopping."""
        with self._counter:
            if self.queue >= WAITING_AT_MOST or self.stopping.is_set():
                return False
            self.queue += 1
            return True

    def leave(self) -> None:
        """Count a request out."""
        with self._counter:
            self.queue -= 1


class _Row:
    """The answer of one item."""

    def __init__(self, key: str, names: Sequence[str], problem: str | None) -> None:
        self.key = key
        self.scores: dict[str, Any] = {}
        self.errors: dict[str, str] = dict.fromkeys(names, problem or "")

    def add(self, name: str, result: Score | str) -> None:
        if isinstance(result, Score):
            self.scores[name] = write_score(result)
        else:
            self.errors[name] = result

    def to_json(self) -> dict[str, Any]:
        return {"id": self.key, "scores": self.scores, "errors": self.errors}


class _Handler(BaseHTTPRequestHandler):
    """One connection, which is one request: HTTP 1.0."""

    server: RewardServer
    unread = 0  # bytes of the body
    timeout = 30  # seconds that a client may stay silent in the middle of a request
    server_version, sys_version = "diffalign", ""

    def do_GET(self) -> None:
        server = self.server
        if not self._allowed():
            return
        if self.path == "/health":
            loaded = [name for name, served in server.rewards.items() if served.loaded]
            status = "stopping" if server.stopping.is_set() else "ok"
            self._send(
                {
                    "version": VERSION,
                    "diffalign": __version__,
                    "status": status,
                    "loaded": loaded,
                    "queue": server.queue,
                    "seconds": round(time.monotonic() - server.started, 1),
                }
            )
        elif self.path == "/rewards":
            rows = [served.describe() for served in server.rewards.values()]
            self._send({"version": VERSION, "rewards": rows, "limits": vars(server.limits)})
        else:
            self._refuse(404, f"there is no {self.path!r} here: GET /health, GET /rewards, POST /score")

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        self.unread = int(length) if length.isdecimal() else -1
        if not self._allowed():
            return
        if self.path != "/score":
            self._refuse(404, f"there is no {self.path!r} here: GET /health, GET /rewards, POST /score")
        elif self.headers.get_content_type() != "application/json":
            # A web page can make a browser send anything else to this machine without asking first.
            self._refuse(415, "the body must be of Content-Type application/json")
        elif not self.server.enter():
            self._refuse(503, "the server is stopping, or has too many requests")
        else:
            try:
                with self.server._unpacked:
                    self._score()
            finally:
                self.server.leave()

    def _score(self) -> None:
        length = self.unread
        if length < 0:
            self._refuse(411, "the request needs a Content-Length")
            return
        if length > self.server.limits.body_bytes:
            self._refuse(413, f"{length} bytes are over the limit of {self.server.limits.body_bytes} a request")
            return
        if self.server.stopping.is_set():
            self._refuse(503, "the server is stopping")
            return
        content = self.rfile.read(length)
        self.unread = 0
        if len(content) < length:
            self._refuse(400, f"the body ends after {len(content)} of {length} bytes")
            return
        try:
            answer = self.server.answer(content)
        except BadRequest as error:
            self._refuse(error.status, str(error))
        except Exception as error:
            logger.exception("a request could not be answered")
            self._refuse(500, f"{type(error).__name__}: {error}")
        else:
            self._send(answer)

    def _allowed(self) -> bool:
        token = self.server.token
        given = self.headers.get("Authorization", "")
        if token is None or hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return True
        self._refuse(401, "this server needs a token, and another one than was sent" if given else "no token was sent")
        return False

    def _refuse(self, status: int, why: str) -> None:
        self._discard()
        self._send({"version": VERSION, "error": why}, status)

    def _discard(self) -> None:
        """Read some of what is still coming: closing on a client that is sending would hide our answer from it."""
        left = min(self.unread, _DISCARDED)
        self.connection.settimeout(1)
        try:
            while left > 0 and (part := self.rfile.read1(min(left, 2**16))):
                left -= len(part)
        except OSError:
            logger.debug("%s sends no more", self.client_address[0])
        self.connection.settimeout(self.timeout)

    def _send(self, payload: Mapping[str, Any], status: int = 200) -> None:
        content = write_json(payload)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug("%s %s", self.client_address[0], format % args)


def is_loopback(host: str) -> bool:
    """Whether an address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _names(items: Sequence[Item]) -> str:
    return f"image {items[0].id!r}" if len(items) == 1 else f"a group of {len(items)} images"

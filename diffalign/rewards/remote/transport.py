"""Requests to reward servers: a limit on time, several addresses in turn, and retries where they can help."""

from __future__ import annotations

import http.client
import itertools
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from diffalign import __version__
from diffalign.errors import UserError
from diffalign.rewards.output import RewardError
from diffalign.rewards.remote.protocol import TOKEN_VARIABLE, BadAnswer, read_json, write_json

logger = logging.getLogger(__name__)

T = TypeVar("T")

LARGEST_ANSWER = 64 * 2**20
LONGEST_WAIT = 30.0
_REST_SECONDS = 30.0
"""For how long an address that failed is asked after the others."""


class Unreachable(RewardError):
    """No server answered in time, or only with errors of its own (status 500 and above)."""


class Refused(UserError):
    """A server understood and refused: asking again will not help. ``status`` is 300 to 499."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Address:
    """Where a server is: ``scheme://host:port`` and a path before its routes, mostly empty."""

    scheme: str
    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, text: str) -> tuple[Address, str]:
        """An address and the name that ends it, "" for none: ``http://127.0.0.1:8000/pickscore``.

        Raises:
            UserError: it is no such address.
        """
        parts = urlsplit(text if "://" in text else f"http://{text}")
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1:
            raise UserError(
                f"{text!r} is not the address of a reward server; expected something like "
                "http://127.0.0.1:8000/pickscore"
            )
        if parts.username or parts.password or parts.query or parts.fragment:
            raise UserError(
                f"the address of a reward server at {parts.hostname} has a user, password, query or fragment, which "
                f"it must not. A token belongs into the environment variable {TOKEN_VARIABLE} or a token_file."
            )
        path, _, name = parts.path.rpartition("/")
        return cls(parts.scheme, parts.hostname, port or (443 if parts.scheme == "https" else 80), path), name

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}{self.path}"


def read_token(token_file: str | Path | None) -> str | None:
    """The token of a file, or of the environment variable DIFFALIGN_REWARD_TOKEN, or None.

    Raises:
        UserError: the file cannot be read or is empty.
    """
    if token_file is None:
        return os.environ.get(TOKEN_VARIABLE) or None
    try:
        token = Path(token_file).expanduser().read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the token file {token_file} cannot be read: {error}") from error
    if not token or not token.isascii() or not token.isprintable():
        raise UserError(f"the token file {token_file} must hold one line of printable ASCII, the token")
    return token


def request(
    address: Address, method: str, route: str, body: bytes | None, *, timeout: float, token: str | None
) -> bytes:
    """One request, and the body of its answer. Redirections are not followed, proxies not used.

    Raises:
        Unreachable: no whole answer within ``timeout`` seconds, or a status of 500 and above.
        Refused: a status of 300 to 499.
    """
    deadline = time.monotonic() + timeout
    make = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    connection = make(address.host, address.port, timeout=timeout)
    headers = {"User-Agent": f"diffalign/{__version__}", "Connection": "close"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    try:
        connection.request(method, address.path + route, body, headers)
        link = connection.sock  # http.client forgets it where the server closes after its answer
        answer = connection.getresponse()
        content = _read(link, answer, deadline)
    except TimeoutError as error:
        raise Unreachable(f"{address} did not answer within {timeout:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise Unreachable(f"{address}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()
    if answer.status == 200:
        return content
    why = f"{address}{route} answered with status {answer.status}: {_reason(content) or answer.reason}"
    if answer.status >= 500:
        raise Unreachable(why)
    raise Refused(why, answer.status)


def _read(link: socket.socket, answer: http.client.HTTPResponse, deadline: float) -> bytes:
    """The body; a server that sends a byte now and then does not outlive the deadline."""
    parts: list[bytes] = []
    size = 0
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        link.settimeout(left)
        part = answer.read1(2**16)
        if not part:
            break
        parts.append(part)
        size += len(part)
        if size > LARGEST_ANSWER:
            raise http.client.HTTPException(f"the answer is longer than {LARGEST_ANSWER} bytes")
    if answer.length:
        raise http.client.IncompleteRead(b"", answer.length)
    return b"".join(parts)


def _reason(content: bytes) -> str:
    try:
        return str(read_json(content).get("error", ""))
    except BadAnswer:
        return ""


class Transport:
    """Several servers of one kind, asked in turn.

    A request that fails is sent to the next address; when all have failed, again to all after a pause of
    ``backoff_seconds``, twice that, four times that and so on, ``retries`` times. What a server refuses is not sent
    again.
    """

    def __init__(
        self,
        addresses: Callable[[], Sequence[Address]],
        *,
        timeout: float,
        retries: int,
        backoff_seconds: float,
        token: str | None,
    ) -> None:
        self.addresses = addresses
        self.timeout, self.retries, self.backoff_seconds, self.token = timeout, retries, backoff_seconds, token
        self._turn, self._resting = 0, dict[Address, float]()
        self._lock = threading.Lock()

    def get(self, address: Address, route: str) -> dict[str, Any]:
        """A JSON object from one address, asked once. Raises Unreachable, Refused, BadAnswer."""
        return read_json(request(address, "GET", route, None, timeout=self.timeout, token=self.token))

    def post(self, route: str, payload: Mapping[str, Any], read: Callable[[bytes], T]) -> T:
        """What ``read`` makes of the answer of whichever address gives one.

        Raises:
            Unreachable: none did, each time that it was asked.
            Refused: the request was refused.
            Exception: what ``read`` raises.
        """
        body = write_json(payload)
        content, address = self.insist(lambda: self._post(route, body))
        try:
            return read(content)
        except BadAnswer as error:
            raise BadAnswer(f"{address}: {error}") from error

    def insist(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` returns; made again, after a pause, while it raises Unreachable and there are retries."""
        for number in itertools.count(1):
            try:
                return attempt()
            except Unreachable as error:
                if number > self.retries:
                    raise Unreachable(f"{error} (asked {number} times)") from error
                pause = min(LONGEST_WAIT, self.backoff_seconds * 2 ** (number - 1))
                logger.warning("%s; asking again in %.3g s (%d of %d)", error, pause, number, self.retries)
            time.sleep(pause)
        raise AssertionError("counts without end")

    def _post(self, route: str, body: bytes) -> tuple[bytes, Address]:
        """The first answer from any address, each asked once."""
        problems = []
        for address in self._in_turn():
            try:
                content = request(address, "POST", route, body, timeout=self.timeout, token=self.token)
            except Unreachable as error:
                problems.append(str(error))
                self._resting[address] = time.monotonic() + _REST_SECONDS
                continue
            self._resting.pop(address, None)
            return content, address
        raise Unreachable("; ".join(problems))

    def _in_turn(self) -> list[Address]:
        """All addresses, each time beginning with the next; those that failed lately at the end."""
        addresses = list(self.addresses())
        with self._lock:
            start = self._turn % len(addresses)
            self._turn += 1
        turned = addresses[start:] + addresses[:start]
        now = time.monotonic()
        return sorted(turned, key=lambda address: self._resting.get(address, 0.0) > now)

"""A reward server in another Python interpreter, for rewards whose libraries cannot live in this one."""

from __future__ import annotations

import atexit
import logging
import os
import queue
import re
import secrets
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from diffalign.errors import UserError
from diffalign.rewards.output import RewardError
from diffalign.rewards.remote.protocol import TOKEN_VARIABLE
from diffalign.rewards.remote.transport import Address

logger = logging.getLogger(__name__)

_READY = re.compile(r"serving .* on (http://\S+)")
_START_SECONDS = 600.0


class SpawnedServer:
    """Started when its address is first asked for, and again if it has died; ends with this process, in any case.

    Args:
        python: the interpreter; diffalign must be installed in it.
        reward: what it serves, in any form that ``diffalign serve-reward --rewards`` takes.
        options: flags of ``diffalign serve-reward`` and their values; None is left out.

    Raises:
        UserError: there is no such interpreter.
    """

    def __init__(self, python: str | Path, reward: str, options: Mapping[str, Any]) -> None:
        self.python = Path(python).expanduser()
        if not self.python.is_file():
            raise UserError(f"there is no Python interpreter {self.python} to serve the reward {reward} with")
        self.token = secrets.token_urlsafe(24)
        flags = [f"--{key}={value}" for key, value in options.items() if value is not None]
        self._command = [str(self.python), "-m", "diffalign", "serve-reward", "--rewards", reward]
        self._command += ["--port", "0", "--until_stdin_closes", *flags]
        self._process: subprocess.Popen[str] | None = None
        self._address: Address | None = None
        self._lock = threading.Lock()

    def addresses(self) -> list[Address]:
        """Where it listens; waits until it does.

        Raises:
            RewardError: it ended before it listened, or did not within ten minutes.
        """
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                logger.warning("the reward server in %s ended with code %s", self.python, self._process.returncode)
                self._process = None
            if self._process is None or self._address is None:
                self._start()
            assert self._address is not None
            return [self._address]

    def _start(self) -> None:
        # Its standard input is a pipe from us, which closes when we end, even if we are killed.
        self._process = process = subprocess.Popen(
            self._command,
            env={**os.environ, TOKEN_VARIABLE: self.token},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.stop)
        lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_pass_on, args=(process.stdout, lines), daemon=True).start()
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                self._end()
                raise RewardError(f"the reward server in {self.python} did not listen within 10 minutes") from None
            if line is None:
                code = process.wait()
                raise RewardError(
                    f"the reward server in {self.python} ended with code {code} before it listened; what it said is "
                    "above. diffalign must be installed there, and the reward's own packages."
                )
            if found := _READY.search(line):
                self._address, _ = Address.parse(found[1])
                return

    def stop(self) -> None:
        """End it, if it runs."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        process, self._process, self._address = self._process, None, None
        atexit.unregister(self.stop)
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _pass_on(stream: IO[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        logger.info("reward server: %s", line.rstrip())
        lines.put(line)
    stream.close()
    lines.put(None)

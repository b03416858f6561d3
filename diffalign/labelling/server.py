"""The page on this machine's own address: Starlette behind uvicorn.

Other pages in the same browser could send requests here too. So a request must name this machine as its host, what
changes anything must come from our own page as JSON, and the page may load nothing from elsewhere.
"""

from __future__ import annotations

import io
import json
import signal
import socket
from collections.abc import Callable
from importlib import resources
from typing import Any

from diffalign.data.images import decode_image
from diffalign.errors import UserError
from diffalign.evaluation.html import asset
from diffalign.labelling.session import Session

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError as error:
    raise UserError(
        f"the page needs {error.name}: pip install 'diffalign[label]' (from a checkout: pip install '.[label]')"
    ) from error

_HOSTS = ("127.0.0.1", "localhost", "[::1]")
_MOST_BYTES = 10_000
_POLICY = (
    "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_MAGIC = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}


def make_app(session: Session) -> Starlette:
    """The application that serves a session."""

    def state(request: Request) -> Response:
        return _answer(lambda: session.state(request.path_params["name"]))

    async def vote(request: Request) -> Response:
        return await _change(request, lambda name, body: session.vote(name, str(body["item"]), str(body["choice"])))

    async def undo(request: Request) -> Response:
        return await _change(request, lambda name, body: session.undo(name, str(body["item"])))

    def picture(request: Request) -> Response:
        content = session.picture(request.path_params["token"])
        if content is None:
            return JSONResponse({"error": "no such image: load the page again"}, 404)
        content, kind = _shown(content)
        return Response(content, media_type=kind, headers={"Cache-Control": "private, max-age=86400"})

    def start(request: Request) -> Response:
        return JSONResponse({"annotators": session.progress(), "total": len(session.items)})

    routes = [
        Route("/", _page),
        Route("/results", _page),
        Route("/label/{name}", _page),
        Route("/static/{file}", _static),
        Route("/image/{token}", picture),
        Route("/api/start", start),
        Route("/api/results", lambda request: _answer(lambda: session.results().plain())),
        Route("/api/label/{name}", state),
        Route("/api/label/{name}/vote", vote, methods=["POST"]),
        Route("/api/label/{name}/undo", undo, methods=["POST"]),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_Guard)])


class _Guard:
    """Refuses requests that came by another name than this machine's, or from another page."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = Request(scope)
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if host.rpartition(":")[0] not in _HOSTS and host not in _HOSTS:
            await _refuse(403, "this page answers to 127.0.0.1 and localhost only")(scope, receive, send)
        elif origin is not None and origin != f"http://{host}":
            await _refuse(403, "another page may not ask this")(scope, receive, send)
        elif request.method == "POST" and kind != "application/json":
            await _refuse(415, "the body must be application/json")(scope, receive, send)
        else:

            async def with_headers(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [
                        *message["headers"],
                        *((name.lower().encode(), value.encode()) for name, value in _HEADERS.items()),
                    ]
                await send(message)

            await self.app(scope, receive, with_headers)


def _refuse(status: int, why: str) -> Response:
    return JSONResponse({"error": why}, status)


async def _change(request: Request, change: Callable[[str, Any], dict[str, Any]]) -> Response:
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MOST_BYTES:
            return _refuse(413, f"a vote has fewer than {_MOST_BYTES} bytes")
    try:
        values = json.loads(body)
    except ValueError:
        return _refuse(400, "the body is no JSON")
    if not isinstance(values, dict):
        return _refuse(400, "the body must be an object")
    # Writing waits for the disk.
    return await run_in_threadpool(_answer, lambda: change(request.path_params["name"], values))


def _answer(make: Callable[[], dict[str, Any]]) -> Response:
    try:
        return JSONResponse(make(), headers={"Cache-Control": "no-store"})
    except UserError as error:
        return _refuse(400, str(error))
    except KeyError as error:
        return _refuse(400, f"the body lacks {error}")
    except OSError as error:
        return _refuse(507, f"the vote could not be written: {error.strerror or error}")


def _page(request: Request) -> Response:
    return Response(_file("label.html"), media_type="text/html")


def _static(request: Request) -> Response:
    shared = {"base.css": "text/css", "theme.js": "text/javascript"}
    own = {"label.css": "text/css", "label.js": "text/javascript"}
    name = request.path_params["file"]
    if name not in shared | own:
        return _refuse(404, "no such file")
    text = asset(name) if name in shared else _file(name)
    return Response(text, media_type=(shared | own)[name], headers={"Cache-Control": "no-cache"})


def _file(name: str) -> str:
    return resources.files("diffalign.labelling").joinpath("web", name).read_text(encoding="utf-8")


def _shown(content: bytes) -> tuple[bytes, str]:
    """An image and its type; one that browsers do not know is made PNG."""
    kind = next((kind for magic, kind in _MAGIC.items() if content.startswith(magic)), None)
    if kind is None:
        buffer = io.BytesIO()
        decode_image(content).save(buffer, "PNG")
        content, kind = buffer.getvalue(), "image/png"
    return content, kind


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address.

    Raises:
        UserError: the port is taken, or not ours to take.
    """
    try:
        return socket.create_server(("127.0.0.1", port))
    except OSError as error:
        raise UserError(f"cannot listen on port {port}: {error.strerror}. Choose another with --port.") from error


def serve(session: Session, listening: socket.socket) -> None:
    """Serve until interrupted or terminated."""
    config = uvicorn.Config(make_app(session), log_level="warning", access_log=False, timeout_graceful_shutdown=5)
    numbers = (signal.SIGINT, signal.SIGTERM)
    # uvicorn hands a signal on when it has stopped; there is still something to do then.
    before = {number: signal.signal(number, lambda *_: None) for number in numbers}
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

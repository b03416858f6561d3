"""What a reward server and its clients say to each other: version 1, JSON over HTTP, images as PNG in base64.

    GET  /health   {"version", "status", "loaded": [names], "queue": requests under way}
    GET  /rewards  {"version", "rewards": [{"name", "version", "identity", "mode", ...}], "limits": {...}}
    POST /score    {"version", "rewards": [names], "items": [{"id", "prompt", "image", "metadata", "group"}]}
         answered  {"version", "identities": {name: identity},
                    "items": [{"id", "scores": {name: {"reward": x, detail: y}}, "errors": {name: why}}]}

Every item has, for every reward that was asked for, either a finite score or an error. What is wrong with a whole
request is answered with a status of 400 to 499 and {"error": why}. Numbers that are not finite do not exist in JSON: a
detail that is none is null.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from diffalign.errors import DiffalignError, did_you_mean
from diffalign.rewards.output import RewardError

VERSION = 1
TOKEN_VARIABLE = "DIFFALIGN_REWARD_TOKEN"
"""Environment variable that holds the token of a server or of a client."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Limits:
    """How large a request may be.

    Attributes:
        body_bytes: of the whole request, as sent.
        items: images of a request.
        pixels: of one image.
        request_pixels: of all images of a request together, since a small PNG can hold a large image.
    """

    body_bytes: int = 64 * 2**20
    items: int = 256
    pixels: int = 2**25
    request_pixels: int = 2**28


class BadRequest(DiffalignError):
    """A request that cannot be answered, whoever sends it again. ``status`` is the HTTP status, 400 to 499."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class BadAnswer(RewardError):
    """An answer that is not one of the protocol."""


@dataclass
class Item:
    """One image to score. ``problem`` says why it cannot be; ``image`` is None then."""

    id: str
    prompt: str | None
    image: Image.Image | None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    group: int | None = None
    problem: str | None = None


def encode_image(image: Image.Image) -> str:
    """An RGB picture as PNG in base64: lossless, and packed quickly rather than tightly."""
    packed = io.BytesIO()
    image.save(packed, format="PNG", compress_level=1)
    return base64.b64encode(packed.getvalue()).decode("ascii")


def decode_image(text: Any, limits: Limits) -> Image.Image:
    """The RGB picture in base64 PNG; its size is looked at before its pixels are unpacked.

    Raises:
        ValueError: not base64, not a PNG, too large, broken, or transparent.
    """
    if not isinstance(text, str):
        raise ValueError(f"image must be a PNG in base64, got {type(text).__name__}")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"image is not base64: {error}") from error
    if not content.startswith(_PNG_SIGNATURE):
        raise ValueError("image is not a PNG")
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.width * image.height > limits.pixels:
                raise ValueError(f"image of {image.width}x{image.height} is over the limit of {limits.pixels} pixels")
            if image.has_transparency_data:
                raise ValueError("image is transparent: lay it on a background before it is scored")
            return image.convert("RGB")
    except (OSError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise ValueError(f"image cannot be decoded: {str(error).partition(' <_io.')[0]}") from error


def read_request(content: bytes, known: Sequence[str], limits: Limits) -> tuple[list[Item], list[str]]:
    """The items of a /score request and the names of the rewards it asks for.

    An item that cannot be used carries its ``problem``.

    Raises:
        BadRequest: the request as a whole is not one of the protocol, or over a limit.
    """
    try:
        payload = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {error}") from error
    if not isinstance(payload, dict) or payload.get("version") != VERSION:
        given = payload.get("version") if isinstance(payload, dict) else type(payload).__name__
        raise BadRequest(f"this server speaks version {VERSION} of the protocol, the request is of {given!r}")
    names = payload.get("rewards")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise BadRequest(f"'rewards' must be a list of names, got {names!r:.80}")
    for name in names:
        if name not in known:
            raise BadRequest(
                f"no reward {name!r} is served here.{did_you_mean(name, known)} Served: {', '.join(known)}."
            )
    rows = payload.get("items")
    if not isinstance(rows, list):
        raise BadRequest("'items' must be a list")
    if len(rows) > limits.items:
        raise BadRequest(f"{len(rows)} items are over the limit of {limits.items} a request", 413)
    budget = limits.request_pixels
    items = []
    for index, row in enumerate(rows):
        items.append(_read_item(row, index, limits))
        image = items[-1].image
        budget -= image.width * image.height if image is not None else 0
        if budget < 0:
            raise BadRequest(f"the images are over the limit of {limits.request_pixels} pixels a request", 413)
    if len({item.id for item in items}) < len(items):
        raise BadRequest("two items have the same id")
    return items, list(dict.fromkeys(names))


def _read_item(row: Any, index: int, limits: Limits) -> Item:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise BadRequest(f"item {index} has no 'id' of text")
    prompt, metadata, group = row.get("prompt"), row.get("metadata"), row.get("group")
    item = Item(row["id"], prompt, None, metadata or {}, group)
    if prompt is not None and not isinstance(prompt, str):
        item.problem = f"prompt must be text, got {type(prompt).__name__}"
    elif metadata is not None and not isinstance(metadata, dict):
        item.problem = f"metadata must hold keys and values, got {type(metadata).__name__}"
    elif group is not None and (isinstance(group, bool) or not isinstance(group, int)):
        item.problem = f"group must be a whole number, got {group!r:.40}"
    else:
        try:
            item.image = decode_image(row.get("image"), limits)
        except ValueError as error:
            item.problem = str(error)
    return item


@dataclass(frozen=True)
class Score:
    """The score of one item: finite, with details by name."""

    reward: float
    details: Mapping[str, float | list[float]] = field(default_factory=dict)


def write_score(score: Score) -> dict[str, Any]:
    """A score in JSON's words."""
    return {**{name: _finite(value) for name, value in score.details.items()}, "reward": score.reward}


def _finite(value: float | list[float]) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def read_answer(content: bytes, ids: Sequence[str], name: str) -> tuple[list[Score | str], str | None]:
    """What a /score answer says of each of ``ids``, in that order: a score, or why there is none.

    Returns:
        these, and the identity of the reward that scored.

    Raises:
        BadAnswer: it is not JSON, of other items or another number of them, or a score is no finite number.
    """
    payload = read_json(content)
    rows = payload.get("items")
    if payload.get("version") != VERSION or not isinstance(rows, list):
        raise BadAnswer(f"no answer of version {VERSION} of the protocol: {content[:80]!r}")
    if len(rows) != len(ids):
        raise BadAnswer(f"{len(rows)} items were answered, {len(ids)} asked")
    by_id = {row.get("id"): row for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)}
    if set(by_id) != set(ids):
        stranger = next(iter(set(by_id) - set(ids)), None)
        raise BadAnswer(f"other items were answered than asked, such as {stranger!r}")
    identities = payload.get("identities")
    identity = identities.get(name) if isinstance(identities, dict) else None
    return [_read_item_answer(by_id[key], name) for key in ids], identity


def _read_item_answer(row: Mapping[str, Any], name: str) -> Score | str:
    scores, errors = row.get("scores") or {}, row.get("errors") or {}
    if not isinstance(scores, dict) or not isinstance(errors, dict):
        raise BadAnswer(f"scores and errors of item {row['id']!r} are not keys and values")
    if name in errors:
        return str(errors[name])
    score = scores.get(name)
    if not isinstance(score, dict):
        raise BadAnswer(f"item {row['id']!r} has neither a score nor an error of {name!r}")
    values = {key: _number(value, row["id"], key) for key, value in score.items() if key != "reward"}
    reward = score.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise BadAnswer(f"item {row['id']!r} was scored as {reward!r}, which is no finite number")
    return Score(float(reward), values)


def _number(value: Any, item: str, key: str) -> float | list[float]:
    if isinstance(value, list):
        return [float(_number(part, item, key)) for part in value]  # type: ignore[arg-type]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadAnswer(f"the detail {key!r} of item {item!r} is {value!r:.40}, not a number")
    return float(value)


def read_json(content: bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadAnswer: it is none.
    """
    try:
        payload = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"not JSON: {content[:80]!r}") from error
    if not isinstance(payload, dict):
        raise BadAnswer(f"not a JSON object: {content[:80]!r}")
    return payload


def write_json(payload: Any) -> bytes:
    """Compact JSON in UTF-8. Raises ValueError for what JSON has no word for, such as NaN."""
    return json.dumps(payload, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()

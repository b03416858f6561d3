from __future__ import annotations

import base64
import io
import json
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffalign.rewards.remote.protocol import (
    BadAnswer,
    BadRequest,
    Limits,
    Score,
    decode_image,
    encode_image,
    read_answer,
    read_request,
    write_json,
    write_score,
)

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8))


def packed(image: Image.Image, kind: str) -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return base64.b64encode(file.getvalue()).decode()


def claiming(side: int) -> str:
    """A few bytes that claim to be a picture of side x side."""
    real = base64.b64decode(encode_image(PICTURE))
    head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return base64.b64encode(real[:12] + head + struct.pack(">I", zlib.crc32(head)) + real[33:]).decode()


def asked(**changes: Any) -> bytes:
    item = {"id": "a", "prompt": "x", "image": encode_image(PICTURE)}
    return json.dumps({"version": 1, "rewards": ["red"], "items": [item], **changes}).encode()


def test_a_picture_arrives_as_it_was_sent() -> None:
    assert decode_image(encode_image(PICTURE), Limits()).tobytes() == PICTURE.tobytes()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "PNG in base64, got NoneType"),
        ("%%%", "not base64"),
        (base64.b64encode(b"GIF89a").decode(), "not a PNG"),
        (packed(PICTURE, "JPEG"), "not a PNG"),
        (encode_image(PICTURE)[:80], "not base64|cannot be decoded"),
        (packed(PICTURE.convert("RGBA"), "PNG"), "transparent"),
        (claiming(5_000), "5000x5000 is over the limit of 1000 pixels"),
        (claiming(100_000), "cannot be decoded: .*decompression bomb"),
    ],
)
def test_pictures_that_are_refused(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_image(text, Limits(pixels=1000))


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"\x80\x04pickle", 400, "not JSON"),
        (b"[" * 100_000, 400, "not JSON"),
        (b"[]", 400, "version 1.*'list'"),
        (asked(version=2), 400, "version 1 of the protocol, the request is of 2"),
        (asked(rewards="red"), 400, "list of names"),
        (asked(rewards=["rde"]), 400, "no reward 'rde' is served here. Did you mean 'red'"),
        (asked(items={}), 400, "'items' must be a list"),
        (asked(items=[{"prompt": "x"}]), 400, "item 0 has no 'id'"),
        (asked(items=[{"id": "a"}, {"id": "a"}]), 400, "same id"),
        (asked(items=[{"id": str(i)} for i in range(4)]), 413, "4 items are over the limit of 3"),
        (asked(items=[{"id": str(i), "image": encode_image(PICTURE)} for i in range(3)]), 413, "100 pixels a request"),
    ],
)
def test_requests_that_are_refused(content: bytes, status: int, message: str) -> None:
    with pytest.raises(BadRequest, match=message) as stop:
        read_request(content, ["red"], Limits(items=3, request_pixels=100))
    assert stop.value.status == status


def test_an_item_that_cannot_be_used_does_not_spoil_the_others() -> None:
    good = {"id": "a", "prompt": "x", "image": encode_image(PICTURE), "metadata": {"k": 1}, "group": 3}
    wrong = [{"prompt": 3}, {"metadata": []}, {"metadata": [1]}, {"group": "g"}, {"group": True}, {"image": "zzz"}]
    rows = [good, *({**good, "id": str(i), **change} for i, change in enumerate(wrong))]
    items, names = read_request(asked(items=rows, rewards=["red", "red"]), ["red"], Limits())
    assert names == ["red"]
    assert items[0].image is not None and items[0].problem is None
    assert (items[0].prompt, items[0].metadata, items[0].group) == ("x", {"k": 1}, 3)
    assert [item.image is None and bool(item.problem) for item in items[1:]] == [True] * 6


def answer(score: Any = None, **changes: Any) -> bytes:
    row = {"id": "a", "scores": {"red": {"reward": 1.5} if score is None else score}, "errors": {}}
    return json.dumps({"version": 1, "identities": {"red": "red/1/a"}, "items": [row], **changes}).encode()


def test_scores_and_reasons_arrive_in_the_order_asked() -> None:
    rows = [
        {"id": "b", "scores": {}, "errors": {"red": "too dark"}},
        {"id": "a", "scores": {"red": {"reward": 1.5, "sigma": 0.25, "all": [1, None]}}},
    ]
    results, identity = read_answer(answer(items=rows), ["a", "b"], "red")
    assert identity == "red/1/a" and results[1] == "too dark"
    assert isinstance(results[0], Score) and results[0].reward == 1.5 and results[0].details["sigma"] == 0.25
    assert np.isnan(results[0].details["all"][1])  # type: ignore[index]


def test_what_json_cannot_say_is_null() -> None:
    score = Score(0.1, {"a": float("nan"), "b": [1.0, float("inf")], "reward": 7.0})
    assert write_score(score) == {"reward": 0.1, "a": None, "b": [1.0, None]}
    with pytest.raises(ValueError):
        write_json(float("nan"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>", "not JSON"),
        (b"3", "not a JSON object"),
        (answer(version=7), "no answer of version 1"),
        (answer(items=None), "no answer of version 1"),
        (answer(items=[]), "0 items were answered, 1 asked"),
        (answer(items=[{"id": "z"}]), "other items were answered than asked, such as 'z'"),
        (answer(items=["a"]), "other items"),
        (answer(items=[{"id": "a", "scores": [1]}]), "not keys and values"),
        (answer(items=[{"id": "a", "scores": {}}]), "neither a score nor an error"),
        (answer(3), "neither a score nor an error"),
        (answer({}), "scored as None"),
        (answer({"reward": float("nan")}), "scored as nan"),
        (answer({"reward": float("-inf")}), "scored as -inf"),
        (answer({"reward": True}), "scored as True"),
        (answer({"reward": "1.5"}), "scored as '1.5'"),
        (answer({"reward": 1.0, "sigma": "big"}), "detail 'sigma'"),
        (answer().replace(b"1.5", b"1e999"), "scored as inf"),
    ],
)
def test_answers_that_are_no_scores(content: bytes, message: str) -> None:
    with pytest.raises(BadAnswer, match=message):
        read_answer(content, ["a"], "red")

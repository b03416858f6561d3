"""The next batch is made while the last one is in use, and nothing else changes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from diffalign.training.ahead import read_ahead


def test_items_come_in_order_and_end() -> None:
    assert list(read_ahead(iter(range(100)))) == list(range(100))
    assert list(read_ahead(iter(()))) == []


def test_the_next_item_is_made_while_the_last_one_is_in_use_and_no_more_than_that() -> None:
    made = [threading.Event() for _ in range(4)]

    def source() -> Iterator[int]:
        for index, event in enumerate(made):
            event.set()
            yield index

    stream = read_ahead(source())
    assert next(stream) == 0
    assert made[1].wait(60), "nobody read ahead"
    assert not made[2].wait(0.05), "more than one item was read ahead"
    assert list(stream) == [1, 2, 3]


def test_an_error_comes_in_its_turn() -> None:
    def source() -> Iterator[int]:
        yield 0
        raise ValueError("row 1 is bad")

    stream = read_ahead(source())
    assert next(stream) == 0
    with pytest.raises(ValueError, match="row 1 is bad"):
        next(stream)


def test_a_stream_that_is_left_early_ends_its_thread_and_its_source() -> None:
    closed = threading.Event()

    def source() -> Iterator[int]:
        try:
            yield from range(1000)
        finally:
            closed.set()

    items = source()
    stream = read_ahead(items)
    assert next(stream) == 0
    stream.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("read-ahead") for thread in threading.enumerate())
    del stream, items
    assert closed.wait(60)

"""One sitting: who is shown which pair next, on which side, and what becomes of a vote."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from diffalign.errors import UserError
from diffalign.labelling.items import Item
from diffalign.labelling.journal import Journal
from diffalign.labelling.results import Results, judge

_NAME = re.compile(r"[\w.@ -]{1,40}")
CHOICES = ("left", "right", "tie", "skip")


class Session:
    """Pairs and the votes on them. Every annotator has an order and sides of their own, keyed by name and seed."""

    def __init__(self, items: Sequence[Item], journal: Journal, seed: int = 0) -> None:
        self.items = {item.id: item for item in items}
        self.journal, self.seed = journal, seed
        self._secret = secrets.token_hex(8)
        self._order = lru_cache(maxsize=256)(self._shuffled)
        # The name of an image in the page tells nothing of its model, and is another one when the server starts anew.
        self._pictures = {self._token(item.id, side): (item, side) for item in items for side in (0, 1)}

    def state(self, annotator: str) -> dict[str, Any]:
        """What an annotator's page shows: progress, the pair to judge, the one after it, and what can be undone.

        Raises:
            UserError: not a name.
        """
        own = self._votes(annotator)
        left = [name for name in self._order(annotator) if name not in own]
        coming = [self._shown(annotator, self.items[name]) for name in left[:2]]
        return {
            "annotator": annotator,
            "done": len(own),
            "total": len(self.items),
            "item": coming[0] if coming else None,
            "next": coming[1] if len(coming) > 1 else None,
            "undo": next(reversed(own), None),
        }

    def vote(self, annotator: str, item: str, choice: str) -> dict[str, Any]:
        """Take down a vote; the new state.

        Raises:
            UserError: not a name, not a pair of this sitting, or not a choice.
            OSError: it could not be written.
        """
        self._check(annotator, item)
        if choice not in CHOICES:
            raise UserError(f"{choice!r} is no choice: {', '.join(CHOICES)}")
        left = self._left(annotator, item)
        sides = ("first", "second") if left == 0 else ("second", "first")
        vote = dict(zip(("left", "right"), sides, strict=True)).get(choice, choice)
        self.journal.add(annotator, item, vote, left=sides[0])
        return self.state(annotator)

    def undo(self, annotator: str, item: str) -> dict[str, Any]:
        """Take a vote back; the new state, which shows the pair again. Errors as in :meth:`vote`."""
        self._check(annotator, item)
        self.journal.add(annotator, item, "undo")
        return self.state(annotator)

    def picture(self, token: str) -> bytes | None:
        """The file of an image in a page; None where there is none of that name."""
        found = self._pictures.get(token)
        return None if found is None else found[0].images[found[1]].read()

    def progress(self) -> list[dict[str, Any]]:
        """Of every annotator so far."""
        return [
            {"name": name, "done": len(self._votes(name)), "total": len(self.items)}
            for name in list(self.journal.votes)
        ]

    def results(self) -> Results:
        """What the votes say so far."""
        return judge(list(self.items.values()), {name: self._votes(name) for name in list(self.journal.votes)})

    def _check(self, annotator: str, item: str) -> None:
        self._votes(annotator)
        if item not in self.items:
            raise UserError("this pair is not among those shown: load the page again")

    def _votes(self, annotator: str) -> dict[str, str]:
        if not _NAME.fullmatch(annotator) or annotator != annotator.strip():
            raise UserError("a name has 1 to 40 letters, digits, spaces or . _ - @")
        own = self.journal.votes.get(annotator, {}).copy()
        return {item: vote for item, vote in own.items() if item in self.items}

    def _shown(self, annotator: str, item: Item) -> dict[str, str]:
        left = self._left(annotator, item.id)
        tokens = [f"/image/{self._token(item.id, side)}" for side in (left, 1 - left)]
        return {"id": item.id, "prompt": item.prompt, "left": tokens[0], "right": tokens[1]}

    def _shuffled(self, annotator: str) -> list[str]:
        return sorted(self.items, key=lambda item: self._hash(str(self.seed), "order", annotator, item))

    def _left(self, annotator: str, item: str) -> int:
        return self._hash(str(self.seed), "side", annotator, item)[0] & 1

    def _token(self, item: str, side: int) -> str:
        return self._hash(self._secret, item, str(side)).hex()

    @staticmethod
    def _hash(*parts: str) -> bytes:
        return hashlib.blake2b("\0".join(parts).encode(), digest_size=8).digest()

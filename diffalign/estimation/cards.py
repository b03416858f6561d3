"""Graphics cards, and what is assumed of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, did_you_mean

HERE = Path(__file__).parent
CALIBRATION = HERE / "calibration.json"
# What a driver puts beside the name of a card and does not change its speed.
_FORM = re.compile(r"nvidia|geforce|generation|pcie|sxm\d*|hbm\d\w*")


@dataclass(frozen=True)
class Card:
    """A device that runs are planned for.

    Attributes:
        name: of the card.
        memory: bytes.
        flops: matrix products in bf16, a second; None where only the memory is known.
        bandwidth: of its memory, bytes a second.
    """

    name: str
    memory: float
    flops: float | None = None
    bandwidth: float | None = None


@dataclass(frozen=True)
class Calibration:
    """What an estimate assumes where shapes do not say.

    Attributes:
        matmul_efficiency: share of a card's matrix products that are reached.
        bandwidth_efficiency: share of its bandwidth.
        launch_microseconds: least time of an operation, started one by one from Python.
        reserve_gib: of CUDA and its libraries, beside all tensors.
        fragmentation: share of the peak that the allocator cannot use.
        memory_error: the worst of a pass against a real one on a CPU, as a share (``benchmarks/estimate_error.py``).
        time_error: of an image by SDXL, against a published time; as above.
        cards: name -> {"time": factor, "memory": factor, "results": how many, ...}, measured / estimated.
    """

    matmul_efficiency: float
    bandwidth_efficiency: float
    launch_microseconds: float
    reserve_gib: float
    fragmentation: float
    memory_error: float
    time_error: float
    cards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def factor(self, card: str, what: str) -> float:
        """Measured over estimated "time" or "memory" of a card; 1 where nothing was measured."""
        return float(self.cards.get(card, {}).get(what, 1.0))


@lru_cache
def cards() -> dict[str, Card]:
    """The cards by name."""
    found = json.loads((HERE / "cards.json").read_text(encoding="utf-8"))["cards"]
    return {
        name: Card(name, facts["memory_gib"] * 2**30, facts["tflops"] * 1e12, facts["gb_per_s"] * 1e9)
        for name, facts in found.items()
    }


def find_card(name: str) -> Card:
    """The card of a name, in any case; a part of the name is enough where it is the part of one only, and so is what
    a driver calls the card, such as "NVIDIA A100-SXM4-80GB".

    Raises:
        UserError: there is none, or there are several.
    """
    plain = {_plain(known): known for known in cards()}
    wanted = _plain(name)
    found = [wanted] if wanted in plain else [key for key in plain if wanted and wanted in key]
    found = found or [key for key, known in plain.items() if _is_called(cards()[known], name)]
    if len(found) == 1:
        return cards()[plain[found[0]]]
    which = [plain[key] for key in found] or list(cards())
    raise UserError(
        f"card {name!r} {'is any of' if found else 'is not one of'} {', '.join(which)}."
        + ("" if found else did_you_mean(name, cards()) + " For another one give its memory: --memory_gb 24.")
    )


def load_calibration(path: Path = CALIBRATION) -> Calibration:
    """Read a calibration."""
    values = json.loads(path.read_text(encoding="utf-8"))
    values.pop("about", None)
    return Calibration(**values)


def _is_called(card: Card, name: str) -> bool:
    """Whether a driver's name is that of a card: all of its words, and else only the form and the memory."""
    words, own = ({*re.findall(r"[a-z0-9]+", text.lower())} for text in (name, card.name))
    memory = round(card.memory / 2**30)
    sizes = {f"{size}gb" for size in range(memory, memory + 3)}
    return own <= words and all(_FORM.fullmatch(word) or word in sizes for word in words - own)


def _plain(name: str) -> str:
    return "".join(char for char in name.lower().removeprefix("nvidia").removeprefix(" geforce") if char.isalnum())

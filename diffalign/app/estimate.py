"""``diffalign estimate``: memory and time of a training run, before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffalign import recipes
from diffalign.app import console
from diffalign.config import Parser, load_yaml, parse_args
from diffalign.errors import UserError
from diffalign.trainers import METHODS, load_method, settings_for

_IN_NAME = re.compile(r"-\d+x(\d+)gb$")


def main(argv: Sequence[str]) -> int:
    """Estimate a recipe or a config file."""
    parser = Parser(
        prog="diffalign estimate",
        usage="%(prog)s RECIPE [--FLAG VALUE ...] [--card NAME | --memory_gb N]",
        description="Predict the memory and time of a training run. Only configs are read: nothing is loaded, and no "
        "GPU is needed. RECIPE is the name of a recipe or a YAML file; the flags of `diffalign train` change it.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="name of a recipe, or a file (also: --config)")
    parser.add_argument("--config", metavar="FILE", help="the same")
    parser.add_argument("--card", metavar="NAME", help="such as 'RTX 4090' or A100 80GB; `list` lists them")
    parser.add_argument("--memory_gb", type=float, metavar="N", help="of a card, where only that matters")
    parser.add_argument("--num_processes", type=int, default=1, metavar="N", help="cards of the run (default: 1)")
    parser.add_argument("--shard", choices=["fsdp2", "zero2"], help="share weights out between --num_processes cards")
    parser.add_argument("--like", metavar="MODEL", help="take the shapes of sdxl or sd15, for a fine-tune of one")
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="take factors from results of benchmarks/sdxl_step.py, and end"
    )
    parser.add_argument("--json", action="store_true", help="print the estimate as JSON")
    given, rest = parser.parse_known_args([word.replace("-gb", "_gb") for word in argv])
    if given.card == "list":
        return _list_cards()
    if given.calibrate:
        from diffalign.app.calibrate import calibrate

        print("\n".join(calibrate(given.calibrate)))
        return 0
    recipe = given.config or given.recipe
    if recipe is None:
        raise UserError("which run? diffalign estimate RECIPE, or --config FILE; `diffalign recipes` lists recipes.")
    config, work = read(recipe, rest, processes=given.num_processes, like=given.like)
    console.set_up(logging.WARNING)
    if given.shard:
        work = _sharded(work, given.num_processes, given.shard)

    from diffalign.estimation.cards import load_calibration
    from diffalign.estimation.estimate import estimate
    from diffalign.estimation.report import as_dict, report
    from diffalign.training.fitting import what_would_fit

    card, calibration = choose_card(given.card, given.memory_gb, recipe), load_calibration()
    found = estimate(work(config), card, calibration)
    options = [] if found.fits else what_would_fit(config, work, card, calibration)
    print(json.dumps(as_dict(found, options), indent=2) if given.json else report(found, calibration, options))
    return 0


def read(
    recipe: str, flags: Sequence[str] = (), *, processes: int = 1, like: str | None = None
) -> tuple[Any, Callable[[Any], Any]]:
    """The config of a run, and a function that says of such a config what the run does.

    What a run must be told and an estimate need not know (its data, its folder) may be missing.

    Raises:
        UserError: it is no config of a method of `diffalign train`.
    """
    name = load_yaml(recipes.resolve(recipe)).get("method")
    if name not in METHODS:
        raise UserError(
            f"{recipe} is no config of a training run on a diffusion model"
            + (f" (its method is {name})." if name else " (it names no method).")
            + f" `diffalign estimate` knows {', '.join(METHODS)}."
        )
    config_class, trainer = load_method(str(name))

    def complete(settings: dict[str, Any], source: str) -> dict[str, Any]:
        required = [f.name for f in dataclasses.fields(config_class) if _is_required(f)]
        return {**dict.fromkeys(required, "-"), **settings_for(str(name), settings, source)}

    config = parse_args(config_class, ["--config", recipe, *flags], prog="diffalign estimate", adapt=complete)
    from diffalign.training.work import with_like

    return config, lambda changed: with_like(partial(trainer.work, processes=processes)(changed), like)


def _sharded(work: Callable[[Any], Any], processes: int, kind: str) -> Callable[[Any], Any]:
    from diffalign.training.work import sharded

    return lambda config: sharded(work(config), processes, stay_together=kind == "zero2")


def choose_card(name: str | None, memory_gb: float | None, recipe: str) -> Any:
    """The card to plan for: the one named, one of so many GB, this machine's, or that of the recipe's name.

    Raises:
        UserError: there is nothing to go by.
    """
    from diffalign.estimation.cards import Card, find_card

    if name is not None:
        return find_card(name)
    in_name = _IN_NAME.search(Path(recipe).stem)
    if memory_gb is None and in_name:
        memory_gb = float(in_name.group(1))
    if memory_gb is not None:
        if memory_gb <= 0:
            raise UserError(f"memory_gb must be above 0, got {memory_gb:g}")
        # What CUDA leaves of a card of so many GB.
        return Card(f"a {memory_gb:g} GB card", memory_gb * 0.975 * 2**30)
    import torch

    if not torch.cuda.is_available():
        raise UserError("for which card? Give --card NAME (--card list lists them) or --memory_gb N.")
    device = torch.cuda.get_device_properties(0)
    try:
        known = find_card(device.name)
    except UserError:
        return Card(device.name, device.total_memory)
    return dataclasses.replace(known, memory=device.total_memory)


def _is_required(declared: Any) -> bool:
    missing = dataclasses.MISSING
    return declared.init and declared.default is missing and declared.default_factory is missing


def _list_cards() -> int:
    from diffalign.estimation.cards import cards

    print(f"{'card':<18} {'GiB':>6} {'TFLOP/s':>8} {'GB/s':>6}")
    for card in cards().values():
        assert card.flops is not None and card.bandwidth is not None
        memory, flops, bandwidth = card.memory / 2**30, card.flops / 1e12, card.bandwidth / 1e9
        print(f"{card.name:<18} {memory:>6.1f} {flops:>8.1f} {bandwidth:>6.0f}")
    return 0

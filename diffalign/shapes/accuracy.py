"""Measure the checker: ``python -m diffalign.shapes.checker [--count 2000] [--seed 0]``."""

from __future__ import annotations

import argparse
import time
from collections import defaultdict

import numpy as np

from diffalign.shapes.checker import Reading, facts, read
from diffalign.shapes.disturb import DISTURBANCES, change_fact
from diffalign.shapes.scene import Scene, Spec, Thing, complete, render, sample_spec

FACTS = ("count", "shape", "color", "size", "relation", "background", "all")


def full_spec(scene: Scene) -> Spec:
    """The spec that states every fact of ``scene``."""
    return Spec(tuple(Thing(t.shape, t.color, t.size) for t in scene.things), scene.background)


def measure(disturbance: str, count: int, seed: int) -> dict[str, float]:
    """Accuracy in [0, 1] of the checker on ``count`` disturbed renders.

    Per kind of fact: the share read right. ``all``: the share of all facts. ``wrong noticed``: the share of captions
    with one fact changed (and false of the scene) in which the checker finds a fact that does not hold.
    ``true accepted``: the share of true captions in which it finds none. ``ms``: milliseconds a picture.
    """
    rng = np.random.default_rng(seed)
    right: dict[str, list[bool]] = defaultdict(list)
    seconds = 0.0
    for _ in range(count):
        spec = sample_spec(rng)
        scene = complete(spec, rng)
        image = DISTURBANCES[disturbance](render(scene), rng)
        start = time.perf_counter()
        reading = read(image)
        seconds += time.perf_counter() - start
        for name, held in facts(reading, full_spec(scene)).items():
            right[name.split(".")[-1]].append(held)
            right["all"].append(held)
        wrong = change_fact(spec, rng)
        if not all(facts(Reading.of_scene(scene), wrong).values()):
            right["wrong noticed"].append(not all(facts(reading, wrong).values()))
        right["true accepted"].append(all(facts(reading, spec).values()))
    return {**{name: float(np.mean(values)) for name, values in right.items()}, "ms": 1000 * seconds / count}


def main() -> None:
    """Print the accuracy table, in percent."""
    parser = argparse.ArgumentParser(prog="python -m diffalign.shapes.checker", description=__doc__)
    parser.add_argument("--count", type=int, default=2000, help="pictures for each disturbance")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    columns = (*FACTS, "true accepted", "wrong noticed", "ms")
    print("| " + " | ".join(["disturbance", *columns]) + " |")
    print("|" + "---|" * (len(columns) + 1))
    for name in DISTURBANCES:
        result = measure(name, arguments.count, arguments.seed)
        cells = [f"{100 * result[column]:.2f}" for column in columns[:-1]] + [f"{result['ms']:.2f}"]
        print("| " + " | ".join([name, *cells]) + " |", flush=True)

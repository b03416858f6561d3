"""The checker against renders whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffalign.shapes import checker
from diffalign.shapes.accuracy import full_spec, measure
from diffalign.shapes.disturb import blur, noise
from diffalign.shapes.scene import BACKGROUNDS, Placed, Scene, complete, parse, render, sample_spec

LEFT = Placed("circle", "red", "small", 16, 30, 7.5)
RIGHT = Placed("square", "blue", "large", 48, 35, 12)


def scene(*things: Placed, background: str = "gray") -> Scene:
    return Scene(things, background)


@pytest.mark.parametrize("disturbance", ["none", "noise", "blur", "jpeg"])
def test_reads_99_percent_of_facts_on_disturbed_renders(disturbance: str) -> None:
    accuracy = measure(disturbance, 300, seed=0)
    for fact in ("count", "shape", "color", "size", "relation", "background", "all", "wrong noticed"):
        assert accuracy[fact] >= 0.99, (fact, accuracy)


def test_reads_most_facts_even_after_all_three_disturbances() -> None:
    accuracy = measure("all three", 300, seed=0)
    assert accuracy["all"] >= 0.99
    assert accuracy["wrong noticed"] >= 0.99


def test_positions_and_radii_are_measured_to_half_a_pixel() -> None:
    for found, placed in zip(checker.read(render(scene(LEFT, RIGHT))).things, (LEFT, RIGHT), strict=True):
        assert (found.shape, found.color, found.size) == (placed.shape, placed.color, placed.size)
        assert (
            abs(found.x - placed.x) < 0.5 and abs(found.y - placed.y) < 0.5 and abs(found.radius - placed.radius) < 0.5
        )


@pytest.mark.parametrize(
    ("caption", "wrong"),
    [
        ("a small red circle left of a large blue square on a gray background", set()),
        ("a large blue square right of a small red circle on a gray background", set()),
        ("a blue square and a red circle", set()),
        ("a large red circle left of a large blue square on a gray background", {"thing0.size"}),
        ("a red circle left of a green square", {"thing1.color"}),
        ("a red circle left of a blue cross", {"thing1.shape"}),
        ("a red circle right of a blue square", {"relation"}),
        ("a circle and a square on a white background", {"background"}),
        ("a blue square", {"count"}),
        ("a green triangle on a gray background", {"count", "thing0.shape", "thing0.color"}),
    ],
)
def test_facts_name_what_is_wrong(caption: str, wrong: set[str]) -> None:
    held = checker.facts(checker.read(render(scene(LEFT, RIGHT))), parse(caption))
    assert {name for name, holds in held.items() if not holds} == wrong
    assert checker.score(render(scene(LEFT, RIGHT)), caption) == pytest.approx(1 - len(wrong) / len(held))


def test_a_missing_thing_costs_its_facts_the_count_and_the_relation() -> None:
    held = checker.facts(checker.read(render(scene(LEFT))), parse("a red circle left of a large blue square"))
    assert {name for name, holds in held.items() if holds} == {"thing0.shape", "thing0.color"}


def test_an_empty_picture_shows_nothing_but_its_background() -> None:
    image = Image.new("RGB", (64, 64), BACKGROUNDS["black"])
    assert checker.read(image).things == ()
    assert checker.describe(checker.read(image)) is None
    assert checker.score(image, "a circle on a black background") == pytest.approx(1 / 3)


def test_what_is_not_of_the_world_is_not_named() -> None:
    image = Image.new("RGB", (64, 64), (240, 120, 180))
    ImageDraw.Draw(image).rectangle((10, 28, 50, 36), fill=(255, 255, 255))
    reading = checker.read(image)
    assert reading.background is None
    assert [(found.shape, found.color) for found in reading.things] == [(None, None)]


def test_noise_around_the_colour_of_the_ground_is_read_without_a_colour() -> None:
    picture = np.full((64, 64, 3), 128, np.uint8)
    rows, columns = np.indices((12, 12))
    picture[20:32, 20:32] = np.where((rows + columns) % 2, 68, 188)[..., None]
    assert [thing.color for thing in checker.read(picture).things] == [None]
    assert checker.score(picture, "a small red circle on a gray background") < 1


def test_describe_states_what_render_drew() -> None:
    rng = np.random.default_rng(5)
    for _ in range(50):
        drawn = complete(sample_spec(rng), rng)
        assert checker.describe(checker.read(render(drawn))) == full_spec(drawn).caption()


def test_other_sizes_and_arrays_read_alike() -> None:
    image = render(scene(LEFT, RIGHT))
    expected = checker.describe(checker.read(image))
    assert checker.describe(checker.read(np.asarray(image))) == expected
    assert checker.describe(checker.read(image.resize((512, 512)))) == expected
    assert [checker.describe(r) for r in checker.read_all(np.stack([np.asarray(image)] * 2))] == [expected] * 2


def test_floats_are_refused_with_advice() -> None:
    with pytest.raises(ValueError, match="uint8"):
        checker.read(np.zeros((64, 64, 3), np.float32))  # type: ignore[arg-type]


def test_scores_wants_a_caption_for_each_picture() -> None:
    image = render(scene(LEFT))
    assert checker.scores([image, image], ["a red circle", "a blue circle"]) == pytest.approx([1, 2 / 3])
    with pytest.raises(ValueError, match="2 pictures but 1 captions"):
        checker.scores([image, image], ["a red circle"])


def test_residual_grows_with_artefacts() -> None:
    rng = np.random.default_rng(0)
    clean = render(scene(LEFT, RIGHT))
    assert checker.residual(clean) < 0.006
    assert checker.residual(clean) < checker.residual(blur(clean, rng)) < checker.residual(noise(clean, rng))

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.data.prompt_sets import is_prompt_set, spread
from diffalign.data.prompts import Prompt, read_prompts
from diffalign.errors import UserError


def categories(prompts: list[Prompt]) -> Counter[str]:
    return Counter(str(prompt.metadata["category"]) for prompt in prompts)


def test_the_small_set_has_104_different_prompts_in_8_even_categories() -> None:
    prompts = read_prompts("diffalign-small")
    assert len({prompt.text for prompt in prompts}) == len(prompts) == 104
    assert len(categories(prompts)) == 8
    assert set(categories(prompts).values()) == {13}


def test_a_limit_takes_evenly_from_the_categories_and_keeps_the_order() -> None:
    few = read_prompts("diffalign-small", limit=16)
    assert set(categories(few).values()) == {2}
    everything = [prompt.text for prompt in read_prompts("diffalign-small")]
    places = [everything.index(prompt.text) for prompt in few]
    assert places == sorted(places)
    assert spread([Prompt("a"), Prompt("b")], 5) == [Prompt("a"), Prompt("b")]


def test_partiprompts_with_lone_quotation_marks(tmp_path: Path) -> None:
    (tmp_path / "PartiPrompts.tsv").write_text(
        'Prompt\tCategory\tChallenge\tNote\na 6" ruler\tArtifacts\tBasic\t\na "cat\tAnimals\tSimple Detail\tx\n'
    )
    first, second = read_prompts(f"partiprompts:{tmp_path}")
    assert first == Prompt('a 6" ruler', {"category": "Artifacts", "challenge": "Basic"})
    assert second.text == 'a "cat' and second.metadata["note"] == "x"


def test_partiprompts_as_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Prompt": ["a", "b"], "Category": ["X", "Y"]}), tmp_path / "train.parquet")
    assert categories(read_prompts(f"partiprompts:{tmp_path}")) == {"X": 1, "Y": 1}


def test_hpsv2_by_style_and_a_missing_style_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "benchmark"
    folder.mkdir()
    for style in ("anime", "concept-art", "paintings", "photo"):
        (folder / f"{style}.json").write_text(json.dumps([f"{style} 1", f"{style} 2"]))
    prompts = read_prompts(f"hpsv2:{tmp_path}")
    assert [prompt.text for prompt in prompts][:3] == ["anime 1", "anime 2", "concept-art 1"]
    assert set(categories(prompts).values()) == {2}
    (folder / "photo.json").unlink()
    with pytest.raises(UserError, match=r"photo\.json"):
        read_prompts(f"hpsv2:{tmp_path}")


def test_drawbench(tmp_path: Path) -> None:
    file = tmp_path / "DrawBench.csv"
    file.write_text('Prompts,Category\n"A red car, parked.",Colors\nOne dog.,Counting\n')
    assert read_prompts(f"drawbench:{file}") == [
        Prompt("A red car, parked.", {"category": "Colors"}),
        Prompt("One dog.", {"category": "Counting"}),
    ]
    file.write_text("Text,Category\nx,y\n")
    with pytest.raises(UserError, match="row 1: no prompt"):
        read_prompts(f"drawbench:{file}")


def test_pickapic_has_each_caption_once(tmp_path: Path) -> None:
    table = pa.table({"caption": ["a", "b", "a"], "jpg_0": [b"x", b"y", b"z"]})
    pq.write_table(table, tmp_path / "validation_unique-00000-of-00001.parquet")
    assert [prompt.text for prompt in read_prompts(f"pickapic:{tmp_path}")] == ["a", "b"]


def test_geneval_keeps_what_its_checker_needs(tmp_path: Path) -> None:
    row = {"tag": "counting", "include": [{"class": "clock", "count": 2}], "prompt": "two clocks"}
    (tmp_path / "evaluation_metadata.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = read_prompts(f"geneval:{tmp_path}")
    assert prompt.text == "two clocks"
    assert prompt.metadata == {"tag": "counting", "include": row["include"], "category": "counting"}


def test_t2i_compbench(tmp_path: Path) -> None:
    names = ("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
    for name in names:
        (tmp_path / f"{name}_val.txt").write_text(f"{name} one\n{name} two\n\n")
    prompts = read_prompts(f"t2i-compbench:{tmp_path}")
    assert categories(prompts) == dict.fromkeys(names, 2)
    (single,) = read_prompts(f"t2i-compbench:{tmp_path / 'color_val.txt'}", limit=1)
    assert single.metadata["category"] == "color"


def test_a_place_that_is_nothing(tmp_path: Path) -> None:
    assert is_prompt_set("hpsv2:x") and not is_prompt_set("mine:x") and not is_prompt_set("hpsv2")
    with pytest.raises(UserError, match="there is nothing at"):
        read_prompts(f"geneval:{tmp_path / 'nowhere'}")

"""What ``Reward.card`` and docs/rewards.md say of each built-in reward: complete, and the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from diffalign.rewards import registry
from diffalign.rewards.base import RewardCard

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"
NAMES = sorted(set(registry._BUILT_IN) - {"remote"})  # which is as what it asks is
SCALES = {
    "bt_logit": "logit",
    "cosine": "cosine",
    "rating": "rating",
    "probability": "share",
    "unbounded": "open",
}


def row(card: RewardCard) -> str:
    """The card as a row of the table in the docs."""
    usual = "{:g} to {:g}".format(*card.typical) if card.typical else "-"
    cells = [
        f"[`{card.name}`](#{re.sub(r'[^a-z0-9_-]', '', card.name)})",
        card.summary,
        f"{SCALES[card.scale]}, {usual}",
        f"{card.input_size}" if card.input_size else "any",
        f"{card.memory_gb:g}" if card.memory_gb else "-",
        "yes" if card.uses_prompt else "no",
        "yes" if card.differentiable else "no",
        card.licence,
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("name", NAMES)
def test_card_is_complete(name: str) -> None:
    card = registry.card(name)
    assert card.name == name
    assert card.summary and not card.summary.endswith(".") and "|" not in card.summary
    assert card.licence and card.hacks and all(hack.endswith(".") for hack in card.hacks)
    assert card.typical is None or card.typical[0] < card.typical[1]


@pytest.mark.parametrize("name", NAMES)
def test_docs_agree_with_the_card(name: str) -> None:
    card, text = registry.card(name), PAGE.read_text(encoding="utf-8")
    assert row(card) in text, f"this row belongs into the table of {PAGE.name}:\n{row(card)}"
    section = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^##|\Z)", text, re.DOTALL | re.MULTILINE)
    assert section, f"{PAGE.name} has no section on {name}"
    plain = " ".join(section[1].split())
    for hack in card.hacks:
        assert f"- {hack}" in plain, f"the section on {name} must say: - {hack}"


def test_docs_describe_no_reward_that_is_gone() -> None:
    cards = PAGE.read_text(encoding="utf-8").partition("## The built-in rewards")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^### (.*)$", cards, re.MULTILINE)) == NAMES


def test_python_examples_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks that stand alone: those with an import."""
    blocks = re.findall(r"^((?: {4}.*\n|\n)+)", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    code = [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in blocks]
    examples = [block for block in code if re.search(r"^(import|from) ", block, re.MULTILINE)]
    monkeypatch.chdir(tmp_path)
    first, second, third = ({"__name__": "example"} for _ in range(3))
    exec(compile(examples[0], "docs/rewards.md", "exec"), first)
    assert first["scores"].shape == (4,) and len(set(first["scores"].tolist())) > 1
    exec(compile(examples[1], "docs/rewards.md", "exec"), second)
    red = torch.tensor([1.0, 0, 0]).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    assert second["Redness"]()(red).rewards.tolist() == [1.0, 1.0]
    exec(compile(examples[2], "docs/rewards.md", "exec"), third)
    assert third["kept"](torch.zeros(2, 3, 8, 8)).rewards.shape == (2,)
    assert len(examples) == 3

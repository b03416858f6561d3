from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import Reward, load_reward, register
from diffalign.rewards import registry as module
from diffalign.rewards.base import FunctionReward

IMAGES = torch.full((2, 3, 4, 4), 0.25)
MINE = """
import torch
from diffalign.rewards import Reward

class Bright(Reward):
    def __init__(self, gain=1.0, **options):
        super().__init__(**options)
        self.gain = gain
    def score(self, images, prompts, metadata):
        return self.gain * images.mean((1, 2, 3))

class Nested:
    Inner = Bright

def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))

def make_bright():
    return Bright(gain=3.0)

constant = 3
"""


def dark(images: Tensor, prompts: list[str], metadata: list[Mapping[str, Any]]) -> Tensor:
    return 1 - images.mean((1, 2, 3))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    file = tmp_path / "my_reward.py"
    file.write_text(MINE)
    return file


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_registered", {})


def scores(reward: Reward) -> list[float]:
    return reward(IMAGES, "x").rewards.tolist()


def test_file(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = load_reward(f"{mine}:Bright", gain=2.0, batch_size=1, device=None)
    assert scores(reward) == [0.5, 0.5]
    assert reward.batch_size == 1
    monkeypatch.chdir(mine.parent)
    assert scores(load_reward("my_reward.py:Nested.Inner")) == [0.25, 0.25]
    assert scores(load_reward("./my_reward.py:bright", device="cpu")) == [0.25, 0.25]
    assert scores(load_reward("my_reward.py:make_bright", device="cpu")) == [0.75, 0.75]
    assert "my_reward" not in sys.modules, "a user's file must not hide a module of that name"
    assert type(load_reward("my_reward.py:Bright")) is type(reward), "the file was run twice"


def test_module_class_and_function() -> None:
    assert type(load_reward("diffalign.rewards.shapes:ShapesChecker")).name == "shapes-checker"
    assert scores(load_reward(dark)) == [0.75, 0.75]
    reward = FunctionReward(dark)
    assert load_reward(reward) is reward
    assert load_reward(FunctionReward, function=dark, name="night").name == "night"


def test_registered_names(registered: None) -> None:
    register("night", dark)
    register("later", "no.such.module:Thing")
    assert {"night", "later", "pickscore", "shapes-checker"} <= set(module.names())
    assert scores(load_reward("night")) == [0.75, 0.75]
    assert load_reward("night").name == "night"
    with pytest.raises(UserError, match=r"no module 'no\.such\.module'"):
        load_reward("later")
    with pytest.raises(UserError, match="a reward 'night' already"):
        register("night", dark)
    with pytest.raises(UserError, match="a reward 'pickscore' already"):
        register("pickscore", dark)
    with pytest.raises(UserError, match="colon"):
        register("a:b", dark)


def installed(monkeypatch: pytest.MonkeyPatch, **values: str) -> None:
    """As if packages offered these rewards."""
    points = [EntryPoint(name.rstrip("_"), value, module.GROUP) for name, value in values.items()]
    monkeypatch.setattr(module, "entry_points", lambda **params: EntryPoints(points).select(**params))


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, theirs="diffalign.rewards.shapes:ShapesAnnotator", broken="no.such.module:Thing")
    assert {"theirs", "broken"} <= set(module.names())
    assert load_reward("theirs").name == "shapes-annotator"
    with pytest.raises(UserError, match=r"no module 'no\.such\.module'"):
        load_reward("broken")
    installed(monkeypatch, twice="a:B", twice_="c:D")
    with pytest.raises(UserError, match=r"several packages offer a reward 'twice': a:B .*, c:D"):
        load_reward("twice")


def test_other_packages_are_imported_only_when_named(tmp_path: Path) -> None:
    """In a process of its own, with two packages installed that offer rewards."""
    for name in ("one", "two"):
        (tmp_path / f"reward_{name}.py").write_text(f"def {name}(images, prompts, metadata):\n    'Says {name}.'\n")
        info = tmp_path / f"reward_{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: reward-{name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[diffalign.rewards]\n{name} = reward_{name}:{name}\n")
    code = (
        "import sys; from diffalign.rewards import load_reward, registry; "
        "assert {'one', 'two'} <= set(registry.names()); assert load_reward('one').summary == 'Says one.'; "
        "assert 'reward_one' in sys.modules and 'reward_two' not in sys.modules and 'transformers' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(tmp_path), *sys.path]))}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, env=environment)


def test_cards_need_no_model(monkeypatch: pytest.MonkeyPatch, registered: None) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a reward was made")

    monkeypatch.setattr(Reward, "__new__", refuse)
    register("night", dark)
    installed(monkeypatch, broken="no.such.module:Thing")
    cards, problems = module.cards()
    found = {card.name: card for card in cards}
    assert sorted([*found, "broken"]) == module.names()
    assert found["pickscore"].differentiable and found["pickscore"].typical == (15.0, 28.0)
    assert not found["shapes-checker"].differentiable
    assert found["night"].summary == ""
    assert problems[0].startswith("broken cannot be used: UserError: there is no module 'no.such.module'")
    with pytest.raises(UserError, match="Did you mean 'pickscore'"):
        module.card("pickscor")
    assert module.card("diffalign.rewards.shapes:ShapesChecker").name == "shapes-checker"
    assert module.card("pickscore:my/checkpoint") == found["pickscore"]


def test_a_name_takes_a_checkpoint(registered: None) -> None:
    seen: dict[str, Any] = {}

    class Model(FunctionReward):
        def __init__(self, checkpoint: str = "default", **options: Any) -> None:
            super().__init__(dark, **options)
            seen["checkpoint"] = checkpoint

    register("model", Model)
    load_reward("model")
    assert seen["checkpoint"] == "default"
    load_reward("model:owner/name", device="cpu")
    assert seen["checkpoint"] == "owner/name"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "shapes-cheker",
            r"no reward 'shapes-cheker'. Did you mean 'shapes-checker'\? A reward is a name \(aes",
        ),
        ("my.py", r"which reward of my.py\? Write my.py:ClassOrFunction"),
        ("nowhere/my.py:Mine", "no file .*nowhere/my.py"),
        ("no_such_package.x:Mine", "no module 'no_such_package.x'"),
        ("diffalign.rewards.shapes:ShapesCheker", r"no 'ShapesCheker'. Did you mean 'ShapesChecker'"),
        ("math:pi", "is a float, not a reward"),
        ("shapes-checker:x", "has no option 'checkpoint'"),
        ("", "no reward ''"),
    ],
)
def test_wrong_names(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(text)


def test_wrong_options_and_makers(mine: Path) -> None:
    with pytest.raises(UserError, match=r"no option 'gian'. Did you mean 'gain'"):
        load_reward(f"{mine}:Bright", gian=2)
    with pytest.raises(UserError, match="function, which has no option 'gain'"):
        load_reward(f"{mine}:bright", gain=2)
    with pytest.raises(UserError, match="not a reward class or function"):
        load_reward(f"{mine}:constant")
    with pytest.raises(UserError, match="made a dict, not a reward"):
        load_reward("builtins:dict")


def test_an_error_inside_a_file_is_shown_as_it_is_and_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import no_such_thing_at_all\n")
    for _ in range(2):
        with pytest.raises(ModuleNotFoundError, match="no_such_thing_at_all"):
            load_reward(f"{file}:Mine")


def test_naming_a_reward_imports_no_models() -> None:
    code = (
        "import sys, diffalign.rewards as r; assert 'torch' not in sys.modules; r.load_reward('shapes-checker'); "
        "assert 'transformers' not in sys.modules and 'diffusers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)

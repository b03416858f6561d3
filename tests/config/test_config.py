from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from diffalign.config import field, from_dict, load_yaml, parse_args, save_yaml, to_dict
from diffalign.errors import UserError


@dataclass(kw_only=True)
class Inner:
    """An inner part."""

    rank: int = field(8, help="Rank.")
    targets: tuple[str, ...] | None = field(None, help="Modules.")


@dataclass(kw_only=True)
class Base:
    """What every run has."""

    output_dir: Path = field(help="Folder that the run writes.")
    seed: int = field(0, help="Seed.")


@dataclass(kw_only=True)
class Config(Base):
    """What this run has."""

    learning_rate: float = field(1e-5, help="Step size, 100% of it.")
    steps: int | None = field(None, help="Number of steps. Default: one pass.")
    mixed_precision: Literal["no", "fp16", "bf16"] = field("no", help="Precision.")
    ema: bool = field(False, help="Average the weights.")
    prompts: list[str] = field([], help="Prompts.")
    betas: tuple[float, float] = field((0.9, 0.999), help="Betas.")
    columns: dict[str, str] = field({}, help="Columns.")
    rewards: dict[str, float] | None = field(None, help="Rewards.")
    resume: str | None = field(None, help="Where to go on.")
    loss: str = field("sigmoid", help="Form.", choices=("sigmoid", "hinge"))
    amount: int | Literal["auto"] = field("auto", help="Amount.")
    lora: Inner = dataclasses.field(default_factory=Inner)
    parts: list[Inner] = field([], help="Parts.")

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate must be above 0, got {self.learning_rate}")


def load(text: str, tmp_path: Path, **given: Any) -> Config:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return from_dict(Config, {"output_dir": "out", **load_yaml(path), **given}, "run.yaml")


def test_yaml_means_what_it_says(tmp_path: Path) -> None:
    config = load(
        "learning_rate: 1e-4\nsteps: 1e3\nmixed_precision: no\nema: true\nprompts: [yes, '1']\nresume: 007\n"
        "betas: [0.5, 1]\ncolumns: {jpg_0: chosen}\nlora: {rank: 4, targets: [to_q]}\nparts: [{rank: 2}]\n",
        tmp_path,
    )
    assert config.learning_rate == 1e-4
    assert config.steps == 1000 and isinstance(config.steps, int)
    assert config.mixed_precision == "no"
    assert config.ema is True
    assert config.prompts == ["yes", "1"]
    assert config.resume == "007"
    assert config.betas == (0.5, 1.0) and all(isinstance(b, float) for b in config.betas)
    assert config.columns == {"jpg_0": "chosen"}
    assert config.lora == Inner(rank=4, targets=("to_q",))
    assert config.parts == [Inner(rank=2)]
    assert config.output_dir == Path("out")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learnin_rate: 1", ["run.yaml", "learnin_rate", "Did you mean 'learning_rate'?"]),
        ("zzz: 1", ["run.yaml", "zzz", "Known keys", "learning_rate"]),
        ("lora: {rnk: 1}", ["run.yaml", "lora.rnk", "Did you mean 'rank'?"]),
        ("lora: 8", ["lora", "8"]),
        ("seed: four", ["run.yaml", "seed", "whole number", "'four'"]),
        ("seed: 1.5", ["seed", "whole number", "1.5"]),
        ("seed: true", ["seed", "whole number", "True"]),
        ("seed: null", ["seed", "None"]),
        ("learning_rate: .nan", ["learning_rate", "a number", "nan"]),
        ("learning_rate: -1", ["learning_rate must be above 0"]),
        ("ema: 3", ["ema", "true or false"]),
        ("resume: 12", ["resume", "text", "quotes"]),
        ("prompts: one", ["prompts", "a list", "'one'"]),
        ("prompts: [a, 2]", ["prompts[1]", "text"]),
        ("betas: [1]", ["betas", "2 values"]),
        ("columns: [a]", ["columns", "keys with values"]),
        ("rewards: {clip: much}", ["rewards.clip", "a number", "much"]),
        ("loss: hing", ["loss", "sigmoid, hinge", "Did you mean 'hinge'?"]),
        ("mixed_precision: bf61", ["mixed_precision", "no, fp16, bf16", "Did you mean 'bf16'?"]),
        ("amount: some", ["amount", "a whole number or one of auto"]),
        ("parts: [{rank: x}]", ["parts[0]", "rank", "'x'"]),
        ("seed: 1\nseed: 2", ["run.yaml", "line 2", "seed", "twice"]),
        ("seed: [1", ["run.yaml", "line", "not valid YAML"]),
        ("- seed", ["run.yaml", "keys and values"]),
    ],
)
def test_errors_name_file_key_and_value(text: str, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load(text, tmp_path)
    for part in parts:
        assert part in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="cannot be read"):
        load_yaml(tmp_path)
    binary = tmp_path / "weights.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_yaml(binary)
    empty = tmp_path / "empty.yaml"
    empty.touch()
    assert load_yaml(empty) == {}


def test_missing_value_names_key_flag_and_file() -> None:
    with pytest.raises(UserError, match=r"'output_dir' has no value.*Folder that.*--output_dir.*'output_dir:'"):
        from_dict(Config, {})


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    config = from_dict(
        Config,
        {
            "output_dir": "a/b",
            "learning_rate": 1e-5,
            "mixed_precision": "no",
            "prompts": ["1e-4", "yes", "no", "null", "007", "1_0", "a: b", "", "ünïcode", "2026-01-01", "12:30"],
            "rewards": {"clip": 2, "1": 0.5},
            "resume": "1.0",
            "lora": {"targets": ["to_q"]},
            "parts": [{"rank": 3}, {"rank": 3}],
        },
    )
    path = save_yaml(config, tmp_path / "config.yaml")
    assert from_dict(Config, load_yaml(path)) == config
    assert load_yaml(path) == to_dict(config)
    assert list(load_yaml(path)) == [f.name for f in dataclasses.fields(Config)]
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_failed_save_keeps_the_old_file(tmp_path: Path) -> None:
    path = save_yaml({"seed": 1}, tmp_path / "config.yaml")
    with pytest.raises(Exception, match="cannot represent"):
        save_yaml({"seed": object()}, path)
    assert load_yaml(path) == {"seed": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_defaults_are_not_shared() -> None:
    first, second = (from_dict(Config, {"output_dir": "o"}) for _ in range(2))
    first.prompts.append("x")
    assert second.prompts == []


def parse(*words: str) -> Config:
    return parse_args(Config, ["--output_dir", "out", *words], prog="toy")


def test_flags_convert_as_yaml_does() -> None:
    config = parse(
        *("--learning-rate", "1e-4", "--steps=20", "--mixed_precision", "no", "--ema", "--prompts", "a b", "2"),
        *("--betas", "0.1", "0.2", "--columns", "jpg_0=chosen", "x=y=z", "--rewards", "{clip: 2}", "--amount", "5"),
        *("--lora.rank", "3", "--lora.targets", "to_q", "to_k", "--parts", "{rank: 1}", "--resume", "none"),
    )
    assert config == Config(
        output_dir=Path("out"),
        learning_rate=1e-4,
        steps=20,
        mixed_precision="no",
        ema=True,
        prompts=["a b", "2"],
        betas=(0.1, 0.2),
        columns={"jpg_0": "chosen", "x": "y=z"},
        rewards={"clip": 2.0},
        amount=5,
        lora=Inner(rank=3, targets=("to_q", "to_k")),
        parts=[Inner(rank=1)],
        resume=None,
    )


def test_hyphens_belong_to_names_only() -> None:
    assert parse("--resume=a-b").resume == "a-b"
    assert parse("--resume", "checkpoint-12").resume == "checkpoint-12"


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--ema"], True),
        (["--ema", "true"], True),
        (["--ema", "False"], False),
        (["--no_ema"], False),
        (["--no-ema"], False),
        (["--ema", "--no-ema"], False),
    ],
)
def test_switches(words: list[str], value: bool) -> None:
    assert parse(*words).ema is value


def test_empty_and_cleared_lists() -> None:
    assert parse("--prompts").prompts == []
    assert parse("--lora.targets", "none").lora.targets is None


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("seed: 1\nsteps: 7\nlora: {rank: 2, targets: [a]}\noutput_dir: there\n")
    config = parse_args(Config, ["--config", str(path), "--seed", "5", "--lora.rank", "9", "--steps", "none"])
    assert (config.seed, config.steps, config.output_dir) == (5, None, Path("there"))
    assert config.lora == Inner(rank=9, targets=("a",))


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--learnin_rate", "1"], ["--learnin_rate", "Did you mean --learning_rate?"]),
        (["--zzz"], ["--zzz", "toy --help"]),
        (["stray"], ["'stray'"]),
        (["--learning_rate", "fast"], ["command line", "--learning_rate", "a number", "'fast'"]),
        (["--learning_rate"], ["--learning_rate", "toy --help"]),
        (["--loss", "hing"], ["--loss", "Did you mean 'hinge'?"]),
        (["--columns", "a"], ["--columns", "key=value"]),
        (["--betas", "1"], ["--betas", "2 values"]),
        (["--learn", "1"], ["--learn"]),
        (["--config", "nonsense"], ["nonsense", "recipe"]),
        (["--config", "nonsense.yaml"], ["nonsense.yaml", "no such file"]),
    ],
)
def test_wrong_flags(words: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse(*words)
    for part in parts:
        assert part in str(error.value)


def test_required_flag() -> None:
    with pytest.raises(UserError, match="--output_dir"):
        parse_args(Config, [])


def test_help_tells_every_flag_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(Config, ["--help"], "Does things.", prog="toy")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Does things." in text
    for name in [f.name for f in dataclasses.fields(Config) if f.name != "lora"] + ["lora.rank"]:
        assert f"--{name} " in text
    assert "What every run has: " in text and "What this run has: " in text
    assert "Folder that the run writes (required)" in text
    assert "Step size, 100% of it (default: 1e-05)" in text
    assert "Number of steps. Default: one pass --" in text
    assert "{no,fp16,bf16}" in text
    assert "usage: toy [--config FILE] [--FLAG VALUE ...]" in text
    assert "one of sigmoid, hinge" in text


def test_the_word_none_clears_an_optional_list_and_is_a_word_in_any_other() -> None:
    @dataclass(kw_only=True)
    class Lists:
        report_to: list[str] = field(["auto"], help="Trackers.")
        columns: list[str] | None = field(["a"], help="Columns.")

    config = parse_args(Lists, ["--report_to", "none", "--columns", "none"])
    assert config.report_to == ["none"] and config.columns is None

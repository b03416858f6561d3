from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign import __version__, cli
from diffalign.errors import DiffalignError, UserError


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "diffalign", *words], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    "words", [["--help"], ["--version"], ["train", "--help"], ["recipes"], ["nonsense"], ["train", "nonsense"]]
)
def test_nothing_heavy_is_imported_before_it_is_needed(words: list[str]) -> None:
    code = (
        "import json, sys; from diffalign.cli import main; main(sys.argv[1:]); sys.stdout.flush();"
        "print(json.dumps([m for m in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=300)
    assert json.loads(done.stdout.splitlines()[-1]) == [], done.stderr


def test_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name in ("demo", "train", "sample", "grid", "doctor", "recipes"):
        assert f"  {name} " in done.stdout


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"diffalign {__version__}\n")


def test_no_command_shows_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["trian"], ["'trian'", "Did you mean 'train'?"]),
        (["zzz"], ["'zzz'", "Commands: demo, train"]),
        (["train"], ["which method?", "dpo"]),
        (["train", "dop"], ["'dop'", "Did you mean 'dpo'?"]),
        (["train", "--config", "x.yaml"], ["x.yaml", "no such file"]),
        (["recipes", "shwo"], ["shwo"]),
        (["recipes", "show", "shapes-dop"], ["'shapes-dop'", "Did you mean 'shapes-dpo'?"]),
    ],
)
def test_errors_are_one_line_with_a_remedy(
    words: list[str], parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("diffalign: error: ") and shown.count("\n") == 1
    for part in parts:
        assert part in shown


def fail(error: BaseException) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("row 3 is empty"), 2, "row 3 is empty"),
        (DiffalignError("stopped"), 1, "stopped"),
        (OSError(errno.ENOSPC, "No space left on device", "/data/x"), 1, "no space left on the disk of /data/x"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guard(lambda: fail(error)) == code
    shown = capsys.readouterr().err
    assert text in shown and "Traceback" not in shown


@pytest.mark.parametrize("error", [RuntimeError("a bug"), PermissionError(errno.EACCES, "denied")])
def test_what_is_not_expected_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        cli.guard(lambda: fail(error))


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_DEBUG", "0")
    assert cli.main(["trian"]) == 2
    with pytest.raises(UserError, match="trian"):
        cli.main(["trian", "--debug"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "from diffalign.cli import guard; import sys; sys.exit(guard(lambda: print('x' * 1000000)))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.read(1)
    process.stdout.close()
    assert process.wait(timeout=300) == 1
    assert process.stderr.read() == b""
    process.stderr.close()


def test_train_help_lists_the_fields_of_the_method(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "dpo", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in ("--config", "--pretrained_model_name_or_path", "--beta_dpo", "--rank", "--learning_rate"):
        assert f"{name} " in shown
    assert "usage: diffalign train dpo" in shown


def test_train_builds_the_config_and_trains(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from diffalign.trainers import dpo

    seen = []

    class Recorder:
        def __init__(self, config: dpo.DPOConfig) -> None:
            seen.append(config)

        def train(self) -> None:
            seen.append("trained")

    monkeypatch.setattr(dpo, "DPOTrainer", Recorder)
    assert cli.main(["train", "dpo", "--config", "shapes-dpo", "--output-dir", str(tmp_path), "--rank", "3"]) == 0
    config, trained = seen
    assert (config.output_dir, config.rank, trained) == (str(tmp_path), 3, "trained")
    assert config.pretrained_model_name_or_path == "shapes-sdxl"


@pytest.mark.parametrize(
    ("command", "module", "config", "function"),
    [
        ("sample", "diffalign.evaluation.sampling", "SampleConfig", "run_sample"),
        ("grid", "diffalign.evaluation.grid", "GridConfig", "run_grid"),
    ],
)
def test_evaluation_commands_show_their_flags(
    command: str, module: str, config: str, function: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: diffalign {command}" in capsys.readouterr().out
    assert callable(getattr(sys.modules[module], function)) and hasattr(sys.modules[module], config)

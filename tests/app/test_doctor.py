from __future__ import annotations

import json

import pytest
from packaging.requirements import Requirement

from diffalign import cli
from diffalign.app import doctor
from diffalign.app.doctor import Check


def test_what_is_installed_is_enough() -> None:
    checks = doctor.examine()
    packages = {check.name.lower(): check for check in checks if check.section == "Packages"}
    assert {"torch", "diffusers", "open-clip-torch", "pyyaml"} <= set(packages)
    assert [check for check in packages.values() if check.status != "ok"] == []
    assert {check.section for check in checks} == {
        "Python", "Packages", "Optional", "Devices", "Bundled", "Hub", "Disk"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("no-such-package-at-all>=1", ["not installed", "pip install 'no-such-package-at-all>=1'"]),
        ("packaging>=9999", ["needs >=9999", "pip install --upgrade 'packaging>=9999'"]),
    ],
)
def test_missing_and_old_packages_are_broken(text: str, parts: list[str]) -> None:
    check = doctor.required(Requirement(text))
    assert check.status == "broken"
    for part in parts:
        assert part in f"{check.value} {check.advice}"


def test_a_package_that_cannot_be_imported_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(module: str) -> None:
        raise RuntimeError(f"{module}: undefined symbol\nmore")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    check = doctor.required(Requirement("packaging"))
    assert (check.status, check.advice) == ("broken", "RuntimeError: packaging: undefined symbol; try to reinstall it")


def test_exit_code_and_advice(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good = [Check("Packages", "torch", "ok", "9"), Check("Optional", "wandb", "absent", "not installed", "no wandb")]
    monkeypatch.setattr(doctor, "examine", lambda: good)
    assert cli.main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "Everything that is needed works." in shown and "(no wandb)" in shown
    monkeypatch.setattr(doctor, "examine", lambda: [*good, Check("Packages", "peft", "broken", "1", "upgrade it")])
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().out.endswith("To put right:\n  peft: upgrade it\n")


def test_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Check("Packages", "peft", "broken", "1", "upgrade it")])
    assert cli.main(["doctor", "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] is False
    assert shown["checks"] == [
        {"section": "Packages", "name": "peft", "status": "broken", "value": "1", "advice": "upgrade it"}
    ]


def test_the_token_is_never_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    checks = list(doctor._hub())
    assert Check("Hub", "token", "ok", "present") in checks
    assert "secret" not in repr(checks)


def test_missing_assets_are_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setattr(doctor.assets, "ROOT", tmp_path)
    checks = list(doctor._assets())
    assert [check.name for check in checks] == list(doctor.assets.BUNDLED)
    assert {check.status for check in checks} == {"broken"}
    assert "make shapes" in checks[0].advice

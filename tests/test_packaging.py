from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import diffalign

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "diffalign"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
REQUIREMENTS = [Requirement(text) for text in PROJECT["project"]["dependencies"]]
EXTRAS = {name: [Requirement(t) for t in texts] for name, texts in PROJECT["project"]["optional-dependencies"].items()}


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(pin.specifier) == 1 and str(pin.specifier).startswith("==") for pin in pins)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("requirement", REQUIREMENTS + [r for group in EXTRAS.values() for r in group], ids=str)
def test_dependencies_have_lower_bounds_only(requirement: Requirement) -> None:
    assert [spec.operator for spec in requirement.specifier] == [">="]


@pytest.mark.parametrize("requirement", REQUIREMENTS + EXTRAS["dev"], ids=str)
def test_what_is_tested_is_pinned_in_the_constraints_only(requirement: Requirement) -> None:
    pin = constraints()[canonicalize_name(requirement.name)]
    assert requirement.specifier.contains(pin)


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_lower_bounds_are_what_was_tested(requirement: Requirement) -> None:
    """A bound below the tested major and minor version would promise what nobody tried."""
    bound = Version(next(iter(requirement.specifier)).version)
    pin = Version(constraints()[canonicalize_name(requirement.name)])
    assert (bound.major, bound.minor) <= (pin.major, pin.minor)
    assert bound.major == pin.major


def test_python_and_licence() -> None:
    assert PROJECT["project"]["requires-python"] == ">=3.11"
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_links_lead_into_the_package() -> None:
    for name in ("pipelines", "rewards"):
        link = ROOT / name
        assert link.is_symlink() and Path(os.readlink(link)) == Path("diffalign") / name
        assert (link / "__init__.py").is_file()


def test_package_data_covers_every_file() -> None:
    """Every tracked file of the package that is not Python is in the wheel."""
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["diffalign"]
    covered = {path for pattern in patterns for path in PACKAGE.glob(pattern)}
    data = {path for path in tracked() if PACKAGE in path.parents and path.suffix != ".py"}
    assert PACKAGE / "py.typed" in data
    assert data - covered == set()


def test_bundled_files_are_small_and_safe() -> None:
    files = [path for path in tracked() if PACKAGE / "shapes" / "assets" in path.parents]
    assert sum(path.stat().st_size for path in files) < 12e6
    kinds = {path.suffix for path in files}
    assert kinds <= {".safetensors", ".parquet", ".json", ".jsonl", ".txt", ".md", ".yaml"}, kinds


def test_no_file_names_a_package_registry() -> None:
    hosts = re.compile(r"py[p]i\.org|python[h]osted|npm[j]s|anaconda\.[o]rg|download\.pytorch\.[o]rg|deb\.[d]ebian")
    for path in tracked():
        if path.suffix not in (".safetensors", ".parquet", ".png"):
            assert not hosts.search(path.read_text(encoding="utf-8")), path


def test_links_in_the_documents_exist() -> None:
    for document in [path for path in tracked() if path.suffix == ".md"]:
        text = document.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_the_readme_names_commands_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^    make ([a-z]+)", readme, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    assert "make test" in readme and "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace(
        "--no-print-directory ", ""
    )
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_the_command_is_installed() -> None:
    scripts = {point.name: point.value for point in metadata.entry_points(group="console_scripts")}
    assert scripts["diffalign"] == "diffalign.cli:main"


@pytest.mark.slow
def test_a_wheel_installs_elsewhere_and_works_from_another_folder(tmp_path: Path) -> None:
    source, target, elsewhere = (tmp_path / name for name in ("source", "target", "elsewhere"))
    source.mkdir(), elsewhere.mkdir()
    for path in tracked():
        name = path.relative_to(ROOT)
        if name.parts[0] in ("diffalign", "pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, source / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    command = [*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, timeout=600)
    wheel = next(tmp_path.glob("diffalign-*.whl"))
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {str(p.relative_to(source)) for p in (source / "diffalign").rglob("*") if p.is_file()}
    assert shipped <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names} == {"diffalign", f"diffalign-{diffalign.__version__}.dist-info"}

    subprocess.run([*pip, "install", "--no-index", "--no-deps", "--target", str(target), str(wheel)], check=True)
    code = (
        "import json, diffalign, diffalign.app.train, diffalign.config; from diffalign import assets, recipes;"
        "print(json.dumps([diffalign.__file__, recipes.names(), [assets.resolve(n) for n in assets.BUNDLED]]))"
    )
    env = os.environ | {"PYTHONPATH": str(target)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=elsewhere, env=env, check=True, capture_output=True, text=True
    )
    file, names_of_recipes, folders = json.loads(done.stdout)
    assert Path(file).is_relative_to(target)
    assert "shapes-dpo" in names_of_recipes
    assert all(Path(folder).is_relative_to(target) and any(Path(folder).iterdir()) for folder in folders)
    command = [str(target / "bin" / "diffalign"), "--version"]
    done = subprocess.run(command, cwd=elsewhere, env=env, check=True, capture_output=True, text=True)
    assert done.stdout == f"diffalign {diffalign.__version__}\n"

"""``diffalign doctor``: what is installed, what works, and what would break."""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from packaging.requirements import Requirement

from diffalign import __version__, assets
from diffalign.config import Parser

Status = Literal["ok", "absent", "broken"]
_MARKS = {"ok": "ok", "absent": "-", "broken": "BROKEN"}

_MODULES = {"open-clip-torch": "open_clip", "pillow": "PIL", "pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
"""Where the name of a package is not the name it is imported by."""

_OPTIONAL = {
    "xformers": "attention uses PyTorch's own kernels, which suit most GPUs as well",
    "bitsandbytes": "no 8-bit AdamW (--use_8bit_adam)",
    "tensorboard": "no TensorBoard curves; metrics.jsonl has every number",
    "wandb": "no --report_to wandb",
    "trackio": "no --report_to trackio",
}
"""Package -> what is missing without it."""

GIB = 1024**3
_LITTLE_SPACE = 5 * GIB


@dataclass(frozen=True)
class Check:
    """One finding. ``advice`` says what it means or what to do, and is empty where nothing needs saying."""

    section: str
    name: str
    status: Status
    value: str
    advice: str = ""


def main(argv: Sequence[str]) -> int:
    """Print the findings; 1 if something required is broken, else 0."""
    parser = Parser(prog="diffalign doctor", description="Tell what is installed, what works and what would break.")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    args = parser.parse_args(list(argv))
    checks = examine()
    broken = [check for check in checks if check.status == "broken"]
    if args.json:
        print(json.dumps({"version": __version__, "ok": not broken, "checks": [asdict(c) for c in checks]}, indent=2))
    else:
        print(report(checks))
    return 1 if broken else 0


def report(checks: Sequence[Check]) -> str:
    """Return the findings as a text of lines, grouped by section, ending with what to do."""
    width = max(len(check.name) for check in checks)
    lines: list[str] = [f"diffalign {__version__}"]
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ["", section]
        line = f"  {_MARKS[check.status]:<6} {check.name:<{width}}  {check.value}"
        lines.append(f"{line}  ({check.advice})" if check.advice and check.status != "broken" else line)
    broken = [check for check in checks if check.status == "broken"]
    lines += ["", "Everything that is needed works." if not broken else "To put right:"]
    lines += [f"  {check.name}: {check.advice}" for check in broken]
    return "\n".join(lines)


def examine() -> list[Check]:
    """Look at everything; takes some seconds, as it imports what training imports."""
    return [*_python(), *_required(), *_optional(), *_devices(), *_assets(), *_hub(), *_disk()]


def _python() -> Iterator[Check]:
    value = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield Check("Python", "python", "ok", value)


def _required() -> Iterator[Check]:
    try:
        texts = metadata.requires("diffalign") or []
    except metadata.PackageNotFoundError:
        advice = "run from a folder, not installed: `pip install -e .` there, or `make setup`"
        yield Check("Packages", "diffalign", "broken", "not installed", advice)
        return
    for text in texts:
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield required(requirement)


def required(requirement: Requirement) -> Check:
    """Check a package against its bounds, and that it can be imported."""
    name = requirement.name
    wanted = f"{name}{requirement.specifier}"
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check("Packages", name, "broken", "not installed", f"pip install '{wanted}'")
    if not requirement.specifier.contains(version, prereleases=True):
        value = f"{version}, needs {requirement.specifier}"
        return Check("Packages", name, "broken", value, f"pip install --upgrade '{wanted}'")
    problem = import_problem(_MODULES.get(name.lower(), name.replace("-", "_")))
    if problem:
        return Check("Packages", name, "broken", f"{version}, cannot be imported", f"{problem}; try to reinstall it")
    return Check("Packages", name, "ok", version)


def import_problem(module: str) -> str:
    """Return why a module cannot be imported, or ""."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 (a broken installation can raise anything)
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    return ""


def _optional() -> Iterator[Check]:
    for name, without in _OPTIONAL.items():
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Check("Optional", name, "absent", "not installed", without)
            continue
        problem = import_problem(name)
        if problem:
            yield Check("Optional", name, "absent", f"{version}, cannot be imported: {problem}", without)
        else:
            yield Check("Optional", name, "ok", version)


def _devices() -> Iterator[Check]:
    try:
        import torch
    except Exception as error:  # noqa: BLE001 (as above; the packages' section says what to do)
        yield Check("Devices", "torch", "broken", f"{type(error).__name__}", "torch cannot be imported, see above")
        return
    yield Check("Devices", "cpu", "ok", f"{os.cpu_count()} cores, {torch.get_num_threads()} used by torch{_memory()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield _cuda(torch, index)
    elif torch.version.cuda and shutil.which("nvidia-smi"):
        advice = "torch sees no CUDA device though a driver is installed: the driver may be older than torch's CUDA"
        yield Check("Devices", "cuda", "absent", f"torch for CUDA {torch.version.cuda}", advice)
    else:
        yield Check("Devices", "cuda", "absent", "none", "the bundled model trains on a CPU; SDXL needs a GPU")
    if torch.backends.mps.is_available():
        yield Check("Devices", "mps", "ok", "available")


def _cuda(torch: Any, index: int) -> Check:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    with torch.cuda.device(index):
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    value = f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute {properties.major}."
    value += f"{properties.minor}, CUDA {torch.version.cuda}, bf16 {'yes' if bf16 else 'no'}"
    return Check("Devices", f"cuda:{index}", "ok", value, "" if bf16 else "use --mixed_precision fp16")


def _memory() -> str:
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names or "SC_PAGE_SIZE" not in names:
        return ""
    return f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB:.1f} GiB of memory"


def _assets() -> Iterator[Check]:
    for name in assets.BUNDLED:
        folder = assets.ROOT / name
        files = [path for path in folder.rglob("*") if path.is_file()]
        if files:
            size = sum(path.stat().st_size for path in files) / 1024**2
            yield Check("Bundled", name, "ok", f"{len(files)} files, {size:.1f} MiB")
        else:
            advice = "reinstall diffalign, or run `make shapes` in a source checkout; `diffalign demo` needs it"
            yield Check("Bundled", name, "broken", f"missing from {folder}", advice)


def _hub() -> Iterator[Check]:
    try:
        from huggingface_hub import constants, get_token
    except ImportError:
        return
    cache = Path(constants.HF_HUB_CACHE)
    state = "exists" if cache.is_dir() else "made at the first download"
    yield Check("Hub", "cache", "ok", f"{cache} ({state})")
    if constants.HF_HUB_OFFLINE:
        yield Check(
            "Hub", "offline", "ok", "HF_HUB_OFFLINE is set", "only local folders and cached models can be used"
        )
    if get_token():
        yield Check("Hub", "token", "ok", "present")
    else:
        yield Check("Hub", "token", "absent", "none", "gated models and pushing need `hf auth login`")


def _disk() -> Iterator[Check]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    advice = "" if free > _LITTLE_SPACE else "little: SDXL takes 7 GB, caches and checkpoints come on top"
    yield Check("Disk", "free", "ok" if not advice else "absent", f"{free / GIB:.1f} GiB in {here}", advice)
    if not os.access(here, os.W_OK):
        yield Check("Disk", "writable", "absent", str(here), "this folder cannot be written; give --output_dir")

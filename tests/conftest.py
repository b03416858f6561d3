"""Fixtures shared by all tests: tiny random models, built here, no network."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def _beside(name: str):  # type: ignore[no-untyped-def]
    """A module of tests/, imported late because it imports what not every test needs."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(folder)


def _tiny():  # type: ignore[no-untyped-def]
    return _beside("tiny")


@pytest.fixture(scope="session")
def _chromium():  # type: ignore[no-untyped-def]
    with _beside("browser").chromium() as browser:
        yield browser


@pytest.fixture
def browser(_chromium):  # type: ignore[no-untyped-def]
    """A window of headless Chromium, light and of a desktop's size; see tests/browser.py."""
    _chromium.look()
    return _chromium


@pytest.fixture(scope="session")
def tiny_sd_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Stable Diffusion pipeline, epsilon prediction. Read only."""
    return str(_tiny().tiny_sd(tmp_path_factory.mktemp("tiny") / "sd"))


@pytest.fixture(scope="session")
def tiny_sd_v_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random Stable Diffusion pipeline, v prediction. Read only."""
    return str(_tiny().tiny_sd(tmp_path_factory.mktemp("tiny") / "sd-v", "v_prediction"))


@pytest.fixture(scope="session")
def tiny_sdxl_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a random SDXL pipeline. Read only."""
    return str(_tiny().tiny_sdxl(tmp_path_factory.mktemp("tiny") / "sdxl"))


@pytest.fixture(autouse=True)
def fresh_process():  # type: ignore[no-untyped-def]
    """Commands own their process: they choose log levels, and accelerate keeps one precision. Not so between tests."""
    logger = logging.getLogger("diffalign")
    level = logger.level
    yield
    logger.setLevel(level)
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)

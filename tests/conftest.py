"""Fixtures shared by all tests: tiny random models, built here, no network."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


def _tiny():  # type: ignore[no-untyped-def]
    """The module tests/tiny.py, imported late because it imports diffusers."""
    folder = str(Path(__file__).parent)
    sys.path.insert(0, folder)
    try:
        import tiny
    finally:
        sys.path.remove(folder)
    return tiny


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

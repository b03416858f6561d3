"""A small preference set of the shapes world, rendered here."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from diffalign.data.write import PairRow, write_pairs
from diffalign.shapes.disturb import change_fact
from diffalign.shapes.scene import complete, parse, render, sample_captions


@pytest.fixture(scope="session")
def shapes_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of 8 pairs of 4 prompts: chosen images fit, rejected ones have one fact wrong. Read only."""
    folder = tmp_path_factory.mktemp("shapes-pairs")
    rng = np.random.default_rng(0)
    rows = []
    for index, caption in enumerate(2 * sample_captions(4, 0)):
        spec = parse(caption)
        files = []
        for scene in (spec, change_fact(spec, rng)):
            buffer = io.BytesIO()
            render(complete(scene, rng)).save(buffer, "PNG")
            files.append(buffer.getvalue())
        rows.append(PairRow(caption, *files, label_0=1.0, id=f"p{index}", user_id="3"))
    write_pairs(folder / "train.parquet", rows)
    return folder

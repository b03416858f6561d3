from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from diffalign.errors import UserError
from diffalign.rewards import checkpoints
from diffalign.rewards.checkpoints import fill, locate, read_weights

NAMES = ("first.pt", "second.safetensors")


def test_locate_takes_a_file_or_looks_into_a_folder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "second.safetensors")
    (tmp_path / "other.bin").touch()
    assert locate(str(tmp_path), NAMES, what="weights") == tmp_path / "second.safetensors"
    assert locate(str(tmp_path / "other.bin"), NAMES, what="weights") == tmp_path / "other.bin"
    (tmp_path / "first.pt").touch()
    assert locate(str(tmp_path), NAMES, what="weights") == tmp_path / "first.pt"


def test_locate_on_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def download(repo: str, name: str, *, revision: str | None, local_files_only: bool) -> str:
        asked.append((repo, name, revision, local_files_only))
        if name == "first.pt":
            raise EntryNotFoundError("404: not there")
        return f"/cache/{name}"

    monkeypatch.setattr(checkpoints, "hf_hub_download", download)
    assert locate("owner/repo", NAMES, what="weights", revision="v1") == Path("/cache/second.safetensors")
    assert asked == [("owner/repo", "first.pt", "v1", False), ("owner/repo", "second.safetensors", "v1", False)]
    assert locate("owner/repo/sub/file.pth", NAMES, what="weights") == Path("/cache/sub/file.pth")
    assert asked[-1] == ("owner/repo", "sub/file.pth", None, False)
    with pytest.raises(UserError, match=r"no weights: neither a local file or folder 'owner/repo', .*first\.pt"):
        locate("owner/repo", NAMES[:1], what="weights")


def test_what_cannot_be_on_the_hub_is_not_looked_for_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "hf_hub_download", lambda *a, **k: pytest.fail("asked the hub"))
    for place in ("nowhere.pth", "/nowhere/file.pt", "./nowhere/file.pt", "~/nowhere/file.pt"):
        with pytest.raises(UserError, match="there is no weight file"):
            locate(place, NAMES, what="weights")


def test_fill_names_what_does_not_fit() -> None:
    with torch.device("meta"):
        model = torch.nn.Linear(3, 2)
    right = {"weight": torch.ones(2, 3, dtype=torch.float16), "bias": torch.zeros(2)}
    fill(model, {**right, "embeddings.position_ids": torch.arange(3)}, "file", "thing")
    assert model.weight.dtype == torch.float32 and model(torch.ones(3)).tolist() == [3, 3]
    with pytest.raises(UserError) as error:
        fill(model, {"weight": torch.ones(2, 4), "scale": torch.ones(1)}, "file", "thing")
    assert str(error.value) == (
        "'file' is not a checkpoint of a thing: weights it lacks: 1 (bias); weights that have no place: 1 (scale); "
        "weights of another shape: 1 (weight (2, 4) for (2, 3))"
    )


def test_read_weights_unwraps_and_refuses(tmp_path: Path) -> None:
    file = tmp_path / "file.pt"
    for wrapped in ({"a": torch.ones(1)}, {"state_dict": {"module.a": torch.ones(1)}, "epoch": 3}):
        torch.save(wrapped, file)
        assert read_weights(file) == {"a": torch.ones(1)}
    torch.save({"a": torch.ones(1), "epoch": 3}, file)
    with pytest.raises(UserError, match="holds a dict, not tensors by name"):
        read_weights(file)
    (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match="is not a whole safetensors file"):
        read_weights(tmp_path / "cut.safetensors")

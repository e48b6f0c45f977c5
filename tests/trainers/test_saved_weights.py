"""The file that `fit` writes: whole, or as it was before."""

import pytest
import torch

from fastmtl.errors import ConfigError
from fastmtl.trainers.arguments import save_weights


def test_a_failure_leaves_the_file_before_it_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "model.pth"
    save_weights({"w": torch.arange(3.0)}, str(path))
    before = path.read_bytes()

    def fill_the_disk(weights, to):
        with open(to, "wb") as file:
            file.write(b"half")
        raise RuntimeError("unexpected pos 47040 vs 46960")

    monkeypatch.setattr(torch, "save", fill_the_disk)
    with pytest.raises(ConfigError, match=r"model.pth: the weights \(20 bytes\) can't be written"):
        save_weights({"w": torch.zeros(5)}, str(path))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
    assert torch.equal(torch.load(path)["w"], torch.arange(3.0))

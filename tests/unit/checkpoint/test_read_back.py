"""What is read back after writing is compared with what was to be written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from maskvr_ds.checkpoint.save import _check_checksums, _check_equal

TENSORS = {"a": torch.arange(1000.0), "b": torch.arange(10)}


def test_a_file_of_torch_is_compared_with_its_checksums(tmp_path: Path) -> None:
    path = tmp_path / "optimizer.pt"
    torch.save({"state": TENSORS}, path)
    _check_checksums(path)
    content = bytearray(path.read_bytes())
    middle = content.index(torch.arange(500.0, 510.0).numpy().tobytes())
    content[middle] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="other bytes are read back than were written"):
        _check_checksums(path)
    path.write_bytes(content[:-100])
    with pytest.raises(OSError, match="other bytes are read back than were written"):
        _check_checksums(path)


def test_torchs_earlier_format_has_no_checksums(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "optimizer.pt", _use_new_zipfile_serialization=False)
    _check_checksums(tmp_path / "optimizer.pt")


def test_safetensors_are_compared_with_what_was_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(TENSORS, path)
    _check_equal(path, TENSORS)
    other = {**TENSORS, "a": TENSORS["a"].clone()}
    other["a"][7] += 1
    with pytest.raises(OSError, match=r"other values are read back than were written \(a\)"):
        _check_equal(path, other)

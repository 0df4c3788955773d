"""What torch may read, and what a file that it may not read seems to be."""

import zipfile

import pytest
import torch

import torture
from workflow.errors import CheckpointError, DamagedError
from workflow.training.archive import check_archive


def test_files_that_torch_writes_pass(tmp_path):
    path = tmp_path / "file.pt"
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    for content in ({"w": parameter}, [torch.zeros(2, 0), 1, "x", None, 2.5], torch.arange(3)):
        torch.save(content, path)
        assert check_archive(path) is None


def test_hostile_files_are_refused_run_nothing_and_take_no_memory(tmp_path):
    assert torture.hostile(tmp_path)["hostile files"] > 40


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"step 5000\n", "it is a text file"),
        (b"  <!DOCTYPE html>", "it is an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1", "type git lfs pull"),
        (b"\x80\x04]", "it is a plain pickle"),
        (b"PK\x03\x04 and no more", "it is damaged"),
    ],
)
def test_what_a_file_looks_like_is_said(tmp_path, content, words):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(DamagedError, match=words):
        check_archive(tmp_path / "x.pt")


def test_what_is_not_there_or_no_file_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="there is no such file"):
        check_archive(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="it cannot be read"):
        check_archive(tmp_path)


def test_a_size_that_the_file_cannot_have_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        place = archive.start_dir
        (record,) = [r for r in archive.infolist() if r.filename.endswith("data/0")]
        size = record.file_size.to_bytes(4, "little")
    raw = bytearray(path.read_bytes())
    while (place := raw.find(size + size, place)) > 0:  # both sizes, in the directory
        raw[place : place + 8] = (2_000_000_000).to_bytes(4, "little") * 2
    path.write_bytes(raw)
    with pytest.raises(DamagedError, match="its records claim"):
        check_archive(path)

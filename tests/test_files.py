"""Atomic writes and partial files. For locks and full disks: test_faults.py."""

import pytest

from workflow.errors import DiskError
from workflow.files import atomic_write, remove_temporary_files, write_text_atomic


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_failed_write_keeps_only_the_old_file(tmp_path):
    path = tmp_path / "file"
    write_text_atomic(path, "old", "paths.runs")
    with pytest.raises(ZeroDivisionError, match="by zero"), atomic_write(path, "paths.runs") as new:
        new.write_text("partial")
        1 / 0  # noqa: B018
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_only_an_error_of_the_system_is_a_full_disk(tmp_path):
    file = tmp_path / "file"
    with pytest.raises(RuntimeError, match="out of memory"), atomic_write(file, "paths.runs"):
        raise RuntimeError("CUDA out of memory")
    for error in (OSError(28, "No space left"), RuntimeError("[fail at inline_container.cc:9]")):
        with pytest.raises(DiskError, match="cannot be written"), atomic_write(file, "paths.runs"):
            raise error


def test_partial_files_of_a_killed_process_are_removed(tmp_path, capsys):
    for name in ("a.pt.tmp.17", "b.json.tmp.4", "c.pt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tmp.3").mkdir()
    remove_temporary_files(tmp_path, min_age=60)  # they may be in use
    assert len(names(tmp_path)) == 4
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == ["c.pt"]
    assert capsys.readouterr().out.count("the partial file of a killed process") == 3

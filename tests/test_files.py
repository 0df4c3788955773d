"""Files appear whole or not at all; folders have one writer; room is looked at before."""

import os
import re
import subprocess
import sys

import pytest

from conftest import ROOT
from workflow.errors import DiskError
from workflow.files import (
    atomic_write,
    check_free_space,
    lock_folder,
    remove_temporary_files,
    write_text_atomic,
)


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def in_another_process(program: str, path) -> str:
    """The last line of its error, or ""; `path` is its argument."""
    program = f"import sys; from pathlib import Path; from workflow import files; {program}"
    command = [sys.executable, "-c", program, str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stderr.rpartition("\n")[0].rpartition("\n")[2]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text_atomic(path, "old", "paths.runs")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "paths.runs") as unfinished:
        unfinished.write_text("half")
        1 / 0  # noqa: B018
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "files.write_text_atomic(Path(sys.argv[1]), 'x' * 9999, 'paths.runs')"
    )
    error = in_another_process(program, path)
    assert error.startswith("workflow.errors.DiskError: ")
    assert "MB are free; free some room, or set another place: --set paths.runs=PATH" in error
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_what_a_kill_left_is_removed_with_one_notice(tmp_path, capsys):
    for name in ("a.pt.tmp.17", "b.json.tmp.4", "c.pt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tmp.3").mkdir()
    remove_temporary_files(tmp_path, untouched=60)  # in use, perhaps
    assert len(names(tmp_path)) == 4
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == ["c.pt"]
    assert capsys.readouterr().out.count("the partial file of a killed process") == 3


def test_too_little_room_is_said_with_both_figures(tmp_path):
    check_free_space(tmp_path, 1000, "2 checkpoints", "paths.checkpoints")
    with pytest.raises(DiskError, match=r"2 checkpoints need 10{9}\.0 MB, \d"):
        check_free_space(tmp_path, 10**15, "2 checkpoints", "paths.checkpoints")


def test_a_folder_has_one_writing_process_at_a_time(tmp_path):
    held = lock_folder(tmp_path / "run", "paths.checkpoints")
    again = lock_folder(tmp_path / "run", "paths.checkpoints")  # a cell that is run twice
    program = "files.lock_folder(Path(sys.argv[1]), 'paths.checkpoints')"
    error = in_another_process(program, tmp_path / "run")
    assert error.startswith("workflow.errors.BusyError: ")
    assert re.search(f"in use by process {os.getpid()} on .+; wait for it", error)
    held.release()
    again.release()
    assert in_another_process(program, tmp_path / "run") == ""


def test_a_folder_that_cannot_be_made_is_said_with_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="file/run: it cannot be written"):
        lock_folder(tmp_path / "file" / "run", "paths.checkpoints")

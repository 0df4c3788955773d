"""Files appear whole or not at all; folders have one writer; room is looked at before."""

import os
import subprocess
import sys

import pytest

from conftest import ROOT
from workflow.errors import BusyError, DiskError
from workflow.files import (
    atomic_write,
    check_free_space,
    lock,
    remove_temporary_files,
    write_text_atomic,
)


def names(folder) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_text_atomic(path, "old", "paths.runs")
    with pytest.raises(ZeroDivisionError), atomic_write(path, "paths.runs") as unfinished:
        unfinished.write_text("half")
        1 / 0  # noqa: B018
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])
    program = (
        "import resource, sys; from pathlib import Path; from workflow import files;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "files.write_text_atomic(Path(sys.argv[1]), 'x' * 9999, 'paths.runs')"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    line = result.stderr.splitlines()[-1]
    assert "DiskError" in line and "MB are free; free some room, or set another place" in line
    assert (path.read_text(), names(tmp_path)) == ("old", ["file"])


def test_what_a_kill_left_is_removed_with_one_notice(tmp_path, capsys):
    for name in ("a.pt.tmp.17", "b.json.tmp.4", "c.pt"):
        (tmp_path / name).touch()
    (tmp_path / "folder.tmp.3").mkdir()
    remove_temporary_files(tmp_path, untouched=60)  # in use, perhaps
    assert len(names(tmp_path)) == 4
    remove_temporary_files(tmp_path)
    assert names(tmp_path) == ["c.pt"]
    assert capsys.readouterr().out.count("a killed process left half written") == 3


def test_too_little_room_is_said_with_both_figures(tmp_path):
    check_free_space(tmp_path, 1000, "2 checkpoints", "paths.checkpoints")
    with pytest.raises(DiskError, match=r"2 checkpoints need 10{9}\.0 MB, \d"):
        check_free_space(tmp_path, 10**15, "2 checkpoints", "paths.checkpoints")


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    held = lock(tmp_path / "run", "paths.checkpoints")
    with pytest.raises(BusyError, match=f"in use by process {os.getpid()} on .+; wait for it"):
        lock(tmp_path / "run", "paths.checkpoints")
    held.release()
    lock(tmp_path / "run", "paths.checkpoints").release()


def test_a_folder_that_cannot_be_made_is_said_with_its_path(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="file/run: it cannot be written"):
        lock(tmp_path / "file" / "run", "paths.checkpoints")

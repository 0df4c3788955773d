"""The folder with the checkpoints of a run."""

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from workflow.config.settings import Config
from workflow.errors import DiskError
from workflow.files import SPACE_FIX, lock_folder, remove_temporary_files
from workflow.training import checkpoint, distributed


class RunDirectory:
    """The folder with the checkpoints of a run. The main process locks it and alone saves there.

    Raises BusyError, with the name of the process that has the lock, or DiskError.
    """

    def __init__(self, folder: Path):
        self.folder, self.locked = folder, distributed.is_main_process()
        if self.locked:
            self._lock = lock_folder(folder, checkpoint.FOLDER_KEY)
            if earlier := getattr(self._lock, "run", None):  # opened earlier by this same process
                earlier.save_and_close()
                self._lock = lock_folder(folder, checkpoint.FOLDER_KEY)
            remove_temporary_files(folder)

    def close_on_reopen(self, run) -> None:
        """If this process opens the folder again, `run` is saved and closed first."""
        if self.locked:
            self._lock.run = run

    def checkpoint(self, step: int) -> Path:
        return checkpoint.checkpoint_path(self.folder, step)

    def save(self, state: dict[str, Any], keep: int, milestones: Collection[int]) -> list[str]:
        """Writes a checkpoint, then deletes old ones, except the newest `keep` and `milestones`.

        Returns the names of the deleted ones.
        """
        checkpoint.save(self.checkpoint(state["step"]), state)
        older = [step for step in checkpoint.steps_in(self.folder) if step <= state["step"]]
        deleted = [self.checkpoint(step) for step in older[keep:] if step not in milestones]
        for path in deleted:
            path.unlink()
        return [path.name for path in deleted]

    def check_free_space(self, config: Config, weights_bytes: int) -> None:
        """Raises DiskError if the checkpoints of the whole run will not fit."""
        saves = config.last_step // config.train.checkpoint_every + 2
        count = min(saves, config.train.keep_checkpoints + 2)  # a resumed and a temporary one
        missing = max(count - len(checkpoint.steps_in(self.folder)), 1)
        size = 3 * weights_bytes * missing  # weights and two moments
        free = shutil.disk_usage(self.folder).free
        if free < size:
            what = f"{count} checkpoints need {size / 1e6:.1f} MB, {free / 1e6:.1f} MB are free"
            raise DiskError(self.folder, what, SPACE_FIX.format(checkpoint.FOLDER_KEY))

    def close(self) -> None:
        if self.locked:
            self._lock.run = None
            self._lock.release(force=True)
        self.locked = False

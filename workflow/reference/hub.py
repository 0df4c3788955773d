"""Files of the Hugging Face Hub, each checked against its hash.

The client's cache comes first. If it lacks a file, a probe of three seconds decides whether to
download: the client itself can wait for minutes. The cache names a file after its hash. A file with
another hash is refused, but not deleted, since other programs use the cache, too.
"""

from __future__ import annotations

import errno
import shlex
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects, logging
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from workflow.errors import DiskError, SourceError

PROBE_SECONDS = 3.0
LOG_IN = "check its id, or type: hf auth login, with an account that may read it"
LATER = "wait some minutes and run again"
NO_SUCH = "fix its id or revision in the YAML"
FIXES = {401: LOG_IN, 403: LOG_IN, 404: NO_SUCH, 429: LATER, 500: LATER, 502: LATER, 503: LATER}


def snapshot(
    repo_id: str,
    revision: str,
    patterns: list[str],
    *,
    repo_type: str = "model",
    complete: Callable[[Path], bool] = lambda folder: True,
) -> Path:
    """The folder of a revision's files in the Hub's cache, downloaded if necessary.

    revision: a commit, a branch or a tag; the folder is named after the commit.
    patterns: which files, `*` for any characters. complete: whether a cached folder has them all.
    Raises SourceError, with what to do.
    """
    place = {"repo_id": repo_id, "revision": revision, "repo_type": repo_type}
    fetch = partial(snapshot_download, **place, allow_patterns=patterns)
    try:
        folder = Path(fetch(local_files_only=True))
        if check_files(folder, patterns) and complete(folder):
            return folder
    except LocalEntryNotFoundError:
        pass
    except (ValueError, OSError) as error:  # not a possible id or revision
        raise SourceError(repo_id, str(error), NO_SUCH) from None
    flags = {"repo-type": [repo_type], "revision": [revision], "include": patterns}
    words = [word for flag in flags for value in flags[flag] for word in (f"--{flag}", value)]
    fix = f"with a network, type: {shlex.join(['hf', 'download', repo_id, *words])}"
    if constants.HF_HUB_OFFLINE:
        raise SourceError(repo_id, "not in the cache, and HF_HUB_OFFLINE is set", fix)
    if error := probe(**place, seconds=PROBE_SECONDS):
        raise source_error(repo_id, f"{constants.ENDPOINT} cannot be reached", error, fix)
    print(f"Fetching {repo_id}, revision {revision}, from {constants.ENDPOINT}")
    folder = download(repo_id, fetch)
    check_files(folder, patterns)
    return folder


def check_files(folder: Path, patterns: list[str]) -> bool:
    """Whether no file of a cached snapshot is missing; raises SourceError for a damaged one.

    A cache without links (Windows without developer mode) has no hashes to compare with.
    """
    links = [path for path in sorted(folder.rglob("*")) if path.is_symlink()]
    names = [link.relative_to(folder).as_posix() for link in links]
    for name in filter_repo_objects(names, allow_patterns=patterns):
        link = folder / name
        if not link.exists():
            return False
        blob = link.parent / link.readlink()  # may itself be a link, into a store for all models
        with open(blob, "rb") as file:  # small files have git's hash
            actual = git_hash(file.read()) if len(blob.name) == 40 else sha_fileobj(file).hex()
        if actual != blob.name:
            file = blob.resolve() if blob.parent.name == "blobs" else link  # not the cache's file
            what = f"its hash is not the Hub's for {name}"
            raise SourceError(file, what, "remove it and run again")
    return True


def probe(repo_id: str, revision: str, repo_type: str, seconds: float) -> Exception | None:
    """None if the Hub has this revision and serves files, else the error, after `seconds` at most.

    In a thread, because resolving a host's name can outlast any timeout of a socket.
    """
    outcome = [TimeoutError(f"no answer within {seconds:g} s")]

    def ask():
        api, place = HfApi(), {"revision": revision, "repo_type": repo_type}
        try:
            api.repo_info(repo_id, **place, timeout=2 * seconds)  # `join` is to end first
            api.file_exists(repo_id, "config.json", **place)  # raises for gated files
            outcome[0] = None
        except Exception as error:
            outcome[0] = error

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]


def download(repo_id: str, fetch: Callable[[], str]) -> Path:
    """The snapshot's folder, filled by the Hub's client; raises SourceError or DiskError."""
    logging.set_verbosity_error()  # an error is printed once, as ours
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(fetch())
    except Exception as error:  # the client's own errors, and those of every layer below it
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            where, full = constants.HF_HUB_CACHE, "the disk is full"
            raise DiskError(where, full, "free some room, or set HF_HOME=FOLDER") from None
        fix = "run again, it continues where it stopped"
        raise source_error(repo_id, "the download failed", error, fix) from None


def source_error(repo_id: str, what: str, error: Exception, fix: str) -> SourceError:
    """The client's error in one line; a status of the Hub has its own fix."""
    while error.__cause__:  # the client wraps the cause in several lines of advice
        error = error.__cause__
    if (response := getattr(error, "response", None)) is not None:
        what = f"the Hub answered {response.status_code} {response.reason_phrase}"
        return SourceError(repo_id, what, FIXES.get(response.status_code, fix))
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return SourceError(repo_id, f"{what} ({lines[0]})", fix)

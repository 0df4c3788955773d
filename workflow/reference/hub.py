"""Files of the Hugging Face Hub: from the client's cache or downloaded, with verified hashes.

The cache uses the hash of a file as its name. A file with another hash is refused, but not deleted,
because other programs use the cache too.
"""

import errno
import re
import shlex
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import disable_progress_bars, filter_repo_objects, logging
from huggingface_hub.utils.sha import git_hash, sha_fileobj

from workflow.errors import DiskError, SourceError

SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")  # for example model-00001-of-00002.safetensors
LOG_IN = "check its id, or type: hf auth login, with an account that may read it"
WAIT = "wait some minutes and run again"
FIX_ID = "fix its id or revision in the YAML"
FIXES = {401: LOG_IN, 403: LOG_IN, 404: FIX_ID, 429: WAIT, 500: WAIT, 502: WAIT, 503: WAIT}


def snapshot(
    repo_id: str, revision: str, patterns: list[str], repo_type="model", needed: Sequence[str] = ()
) -> Path:
    """The folder with a repository's files in the Hub's cache, downloaded if necessary.

    revision: a commit, a branch or a tag. The folder's name is the commit.
    patterns: which files to get. needed: patterns that a complete folder must match.
    Raises SourceError or DiskError.
    """
    place = {"repo_id": repo_id, "revision": revision, "repo_type": repo_type}
    fetch = partial(snapshot_download, **place, allow_patterns=patterns)
    try:
        folder = Path(fetch(local_files_only=True))
        if check_files(folder, patterns, needed):
            return folder
    except LocalEntryNotFoundError:
        pass
    except (ValueError, OSError) as error:  # an invalid id or revision
        raise SourceError(repo_id, str(error), FIX_ID) from None
    words = ["hf", "download", repo_id, "--repo-type", repo_type, "--revision", revision]
    words += [word for pattern in patterns for word in ("--include", pattern)]
    fix = f"with a network, type: {shlex.join(words)}"
    if constants.HF_HUB_OFFLINE:
        raise SourceError(repo_id, "not in the cache, and HF_HUB_OFFLINE is set", fix)
    if error := probe(**place):
        raise source_error(repo_id, f"{constants.ENDPOINT} cannot be reached", error, fix)
    print(f"Fetching {repo_id}, revision {revision}, from {constants.ENDPOINT}")
    folder = download(repo_id, fetch)
    check_files(folder, patterns, needed)  # for the hashes
    return folder


def matching_files(folder: Path, patterns: list[str]) -> list[Path]:
    """The files in a folder that match one of the client's patterns, without hidden files."""
    names = [f.relative_to(folder).as_posix() for f in sorted(folder.rglob("*")) if not f.is_dir()]
    hidden = [".*", "*/.*"]
    matches = filter_repo_objects(names, allow_patterns=patterns, ignore_patterns=hidden)
    return [folder / name for name in matches]


def check_files(folder: Path, patterns: list[str], needed: Sequence[str]) -> bool:
    """Returns whether all files are there. Raises SourceError if a file has a wrong hash."""
    files = matching_files(folder, patterns)
    for file in files:
        if not file.exists():  # a link to a deleted file
            return False
        check_hash(file)
    shards = Counter((SHARD.sub("", str(f)), m[1]) for f in files if (m := SHARD.search(str(f))))
    complete = all(count >= int(total) for (_, total), count in shards.items())
    return bool(files) and complete and all(matching_files(folder, [one]) for one in needed)


def check_hash(file: Path) -> None:
    """Refuses a file of a snapshot that has not the hash in the name of its link's target.

    Without links (Windows, or a copy of the cache), hashes are not known.
    """
    if not file.is_symlink():
        return
    blob = file.parent / file.readlink()  # can be a link too, to a store that all models share
    with open(blob, "rb") as content:  # git's hash for small files, otherwise sha256
        of_git = len(blob.name) == 40
        found = git_hash(content.read()) if of_git else sha_fileobj(content).hex()
    if found != blob.name:
        damaged = blob.resolve() if blob.parent.name == "blobs" else file  # a link out of the cache
        what = f"its hash is not the Hub's for {file.name}"
        raise SourceError(damaged, what, "remove it and run again")


def probe(repo_id: str, revision: str, repo_type: str, seconds: float = 3.0) -> Exception | None:
    """Returns None if the Hub can send this revision's files, otherwise the error.

    The client itself can wait for minutes. A thread is needed to stop after `seconds`, because a
    socket's timeout does not limit the lookup of a host name.
    """
    outcome = [TimeoutError(f"no answer within {seconds:g} s")]

    def request():
        api, place = HfApi(), {"revision": revision, "repo_type": repo_type}
        try:
            api.repo_info(repo_id, **place, timeout=2 * seconds)  # `join` ends first
            api.file_exists(repo_id, "config.json", **place)  # raises for gated files
            outcome[0] = None
        except Exception as error:
            outcome[0] = error

    thread = threading.Thread(target=request, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0]


def download(repo_id: str, fetch: Callable[[], str]) -> Path:
    """Downloads with the Hub's client; returns the folder. Raises SourceError or DiskError."""
    logging.set_verbosity_error()  # the client's warnings would repeat our error
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        return Path(fetch())
    except Exception as error:  # errors of the client and of all libraries below
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            fix = "free disk space, or set HF_HOME=FOLDER"
            raise DiskError(constants.HF_HUB_CACHE, "the disk is full", fix) from None
        fix = "run again, it continues where it stopped"
        raise source_error(repo_id, "the download failed", error, fix) from None


def source_error(repo_id: str, what: str, error: Exception, fix: str) -> SourceError:
    """The client's error in one line. Some HTTP status codes have their own fix."""
    if (response := getattr(root_cause(error), "response", None)) is not None:
        what = f"the Hub answered {response.status_code} {response.reason_phrase}"
        return SourceError(repo_id, what, FIXES.get(response.status_code, fix))
    return SourceError(repo_id, f"{what} ({short_cause(error)})", fix)


def short_cause(error: BaseException) -> str:
    """The first line of the root cause, without the library's advice."""
    cause = root_cause(error)
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def root_cause(error: BaseException) -> BaseException:
    return root_cause(error.__cause__) if error.__cause__ else error

"""Files of the Hugging Face Hub, from the client's cache or downloaded, checked against their hash.

The cache names a file after its hash. A file with another one is refused, but not deleted, since
other programs use the cache, too.
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

SHARD = re.compile(r"-\d{5}-of-(\d{5})(?=\.)")  # how the Hub numbers files that belong together
LOG_IN = "check its id, or type: hf auth login, with an account that may read it"
LATER = "wait some minutes and run again"
NO_SUCH = "fix its id or revision in the YAML"
FIXES = {401: LOG_IN, 403: LOG_IN, 404: NO_SUCH, 429: LATER, 500: LATER, 502: LATER, 503: LATER}


def snapshot(
    repo_id: str, revision: str, patterns: list[str], repo_type="model", needed: Sequence[str] = ()
) -> Path:
    """The folder of a revision's files in the Hub's cache, downloaded if necessary.

    revision: a commit, a branch or a tag; the folder is named after the commit.
    patterns: which files, `*` for any characters. needed: those without which a cached folder is
        not complete. Raises SourceError, with what to do.
    """
    place = {"repo_id": repo_id, "revision": revision, "repo_type": repo_type}
    fetch = partial(snapshot_download, **place, allow_patterns=patterns)
    try:
        folder = Path(fetch(local_files_only=True))
        if is_complete(folder, patterns, needed):
            return folder
    except LocalEntryNotFoundError:
        pass
    except (ValueError, OSError) as error:  # not a possible id or revision
        raise SourceError(repo_id, str(error), NO_SUCH) from None
    words = ["hf", "download", repo_id, "--repo-type", repo_type, "--revision", revision]
    words += [word for pattern in patterns for word in ("--include", pattern)]
    fix = f"with a network, type: {shlex.join(words)}"
    if constants.HF_HUB_OFFLINE:
        raise SourceError(repo_id, "not in the cache, and HF_HUB_OFFLINE is set", fix)
    if error := probe(**place):
        raise source_error(repo_id, f"{constants.ENDPOINT} cannot be reached", error, fix)
    print(f"Fetching {repo_id}, revision {revision}, from {constants.ENDPOINT}")
    folder = download(repo_id, fetch)
    is_complete(folder, patterns, needed)  # for the hashes
    return folder


def matching(folder: Path, patterns: list[str]) -> list[Path]:
    """The files below a folder that a pattern fits, as the client understands it, but no hidden."""
    names = [f.relative_to(folder).as_posix() for f in sorted(folder.rglob("*")) if not f.is_dir()]
    hidden = [".*", "*/.*"]
    fits = filter_repo_objects(names, allow_patterns=patterns, ignore_patterns=hidden)
    return [folder / name for name in fits]


def is_complete(folder: Path, patterns: list[str], needed: Sequence[str]) -> bool:
    """Whether no file is missing in a cached snapshot; raises SourceError for a damaged one."""
    files = matching(folder, patterns)
    for file in files:
        if not file.exists():  # a link to a file that is gone
            return False
        if file.is_symlink():  # Windows without developer mode has no links, and no hashes
            check_hash(file)
    shards = Counter((SHARD.sub("", str(f)), m[1]) for f in files if (m := SHARD.search(str(f))))
    complete = all(count >= int(total) for (_, total), count in shards.items())
    return bool(files) and complete and all(matching(folder, [one]) for one in needed)


def check_hash(link: Path) -> None:
    blob = link.parent / link.readlink()  # may itself be a link, into a store for all models
    with open(blob, "rb") as file:  # small files have git's hash
        actual = git_hash(file.read()) if len(blob.name) == 40 else sha_fileobj(file).hex()
    if actual != blob.name:
        wrong = blob.resolve() if blob.parent.name == "blobs" else link  # not the cache's file
        what = f"its hash is not the Hub's for {link.name}"
        raise SourceError(wrong, what, "remove it and run again")


def probe(repo_id: str, revision: str, repo_type: str, seconds: float = 3.0) -> Exception | None:
    """None if the Hub has this revision and serves files, else the error, after `seconds` at most.

    The client itself can wait for minutes. In a thread, because resolving a host's name can outlast
    any timeout of a socket.
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
    error = root_cause(error)
    if (response := getattr(error, "response", None)) is not None:
        what = f"the Hub answered {response.status_code} {response.reason_phrase}"
        return SourceError(repo_id, what, FIXES.get(response.status_code, fix))
    return SourceError(repo_id, f"{what} ({first_line(error)})", fix)


def first_line(error: BaseException) -> str:
    """The cause of a library's error, without the advice around it."""
    cause = root_cause(error)
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]


def root_cause(error: BaseException) -> BaseException:
    return root_cause(error.__cause__) if error.__cause__ else error

"""Write whole, read verified.

A checkpoint is one torch zip file with everything that the next step depends on. It is written
beside its name, read back, synced and only then renamed, so that under its name there is always a
whole file, old or new. It is read only after its archive was looked through (`archive.py`), with
`weights_only=True`, and used only after its own digest, its contents and every number are right.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from SmolLm3 import hf_name
from workflow.errors import CheckpointError, DamagedError, ForeignError
from workflow.files import atomic_write, sha256_of
from workflow.training.archive import check_archive

FORMAT = "smollm-workflow checkpoint"
FORMAT_VERSION = 2
# What the next step depends on. A file that lacks any of it cannot be resumed.
CONTENTS = {
    "format": str,
    "format_version": int,
    "step": int,
    "model": dict,  # Hugging Face's name -> tensor
    "optimizer": dict,  # its kind, and torch's own state dict, with the parameters' names
    "random": dict,  # every random state
    "data": dict,  # hash and sizes of the text; with config's seed, the order of the data
    "config": dict,  # the settings of the run, as plain values
    "tokenizer": dict,  # end of text, vocabulary, sha256
    "reference": dict,  # what the weights started from, honestly named
    "environment": dict,  # where it was written: bit-exact resume is promised only there
    "digest": str,  # sha256 over all of the above
}
MOST_LEAVES = 200_000  # of a file's nested values; aliases can make endless ones of a small file
WRAPPERS = re.compile(r"^(_orig_mod\.|module\.)+")  # of torch.compile, of DistributedDataParallel
STATE_DICTS = ("model", "state_dict", "model_state_dict", "module")  # where others keep weights
SETTING = "paths.checkpoints"  # the key of the YAML that says where all this lies


# --- write ----------------------------------------------------------------------------------------


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes `state` under `path`, whole or not at all.

    Raises DiskError; what was there before stays.
    """
    state = {"format": FORMAT, "format_version": FORMAT_VERSION, **state}
    state["digest"] = sha256_of(leaves(state))
    with atomic_write(path, SETTING, bytes_of(state)) as unfinished:
        with open(unfinished, "wb") as file:  # given a path, torch.save would store its name
            torch.save(state, file)
        check_archive(unfinished)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested dicts and sequences, with its dotted name."""
    inner: Any = ()
    if isinstance(value, Mapping):
        inner = value.items()
    elif isinstance(value, (list, tuple)):
        inner = enumerate(value)
    for key, part in inner:
        yield from leaves(part, f"{name}.{key}" if name else str(key))
    if not inner or not value:
        yield name, value


def bytes_of(state: Any) -> int:
    """Bytes of all tensors in nested dicts and sequences."""
    return sum(leaf.nbytes for _, leaf in leaves(state) if isinstance(leaf, Tensor))


def not_finite(state: Any) -> list[str]:
    """The names of the tensors that hold NaN or inf."""
    tensors = ((name, leaf) for name, leaf in leaves(state) if isinstance(leaf, Tensor))
    return [name for name, t in tensors if t.is_floating_point() and not t.isfinite().all()]


def within(folder: Path, path: Path) -> tuple[Path, dict[str, Any]]:
    """`path`, or the newest checkpoint of that run's folder, and its state.

    Raises CheckpointError where the run is not one of those in `folder`.
    """
    if path.is_dir():
        if not found(path):
            raise CheckpointError(path, "no checkpoint in this folder", "name another")
        path, state = newest(path)
    else:
        state = load(path)
    if path.parent.parent != folder.resolve():
        do = f"put its folder there, or give --set paths.checkpoints={path.parent.parent}"
        raise CheckpointError(path, f"it is not in {folder}", do)
    return path, state


def prune(folder: Path, step: int, keep: int, kept: Collection[int | None]) -> None:
    """Deletes all but the newest `keep` checkpoints up to `step` and those of the steps `kept`.

    What lies beyond `step` is not this run's to count, nor to delete.
    """
    for old in sorted((n for n in found(folder) if n <= step), reverse=True)[keep:]:
        if old not in kept:
            path_of(folder, old).unlink()


# --- read -----------------------------------------------------------------------------------------


def load(path: Path) -> dict[str, Any]:
    """The verified contents, on the CPU.

    Raises CheckpointError, before anything is used, for all that is not whole and ours; a damaged
    file's error names the newest whole one beside it.
    """
    try:
        return _load(path)
    except DamagedError as error:
        others = (path_of(path.parent, n) for n in sorted(found(path.parent), reverse=True))
        whole = next((other.name for other in others if other != path and is_whole(other)), None)
        do = f"resume from {whole}, the newest whole one" if whole else "no whole one is beside it"
        raise DamagedError(path, error.what, do) from None


def _load(path: Path) -> dict[str, Any]:
    state = read(path)
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise foreign(path, state)
    if state.get("format_version") != FORMAT_VERSION:
        what = f"its format is version {state.get('format_version')}, this code's {FORMAT_VERSION}"
        raise CheckpointError(path, what, "use the release that wrote it")
    wrong = [name for name, kind in CONTENTS.items() if not isinstance(state.get(name), kind)]
    if wrong:
        what = f"it lacks {', '.join(wrong)}"
        raise CheckpointError(path, what, "it cannot be resumed, choose another")
    digest = state.pop("digest")
    if digest != sha256_of(leaves(state)):
        raise DamagedError(path, "its contents are not those of its digest", "choose another")
    if wrong := not_finite(state):
        raise CheckpointError(path, f"{wrong[0]} holds NaN or inf", "choose an older one")
    return state


def read(path: Path) -> Any:
    """What a torch file holds, ours or not, on the CPU. Raises CheckpointError."""
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        parts = list(islice(leaves(content), MOST_LEAVES + 1))
    except Exception as error:  # unpickling a file that is not ours can fail in any way
        what = f"it is not a checkpoint that can be read ({type(error).__name__})"
        raise DamagedError(path, what, "choose another") from None
    views = [name for name, leaf in parts if isinstance(leaf, Tensor) and larger_than_stored(leaf)]
    if views or len(parts) > MOST_LEAVES:
        what = f"{views[0]} is larger than its record" if views else "its contents have no end"
        raise DamagedError(path, what, "choose another")
    return content


def larger_than_stored(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes()


def foreign(path: Path, content: Any) -> ForeignError:
    """Why a whole torch file that is not ours can't be resumed."""
    weights = weights_in(content)
    if weights is None:
        keys = ", ".join(map(str, islice(content, 5))) if isinstance(content, dict) else "no keys"
        what = f"it is not a checkpoint of this project (a {type(content).__name__} with {keys})"
        return ForeignError(path, what, "choose another")
    what = f"it has {len(weights)} weights, but no moments, step or random states of this project's"
    do = f"it can be evaluated, not resumed: main.py evaluate {path} --data TEXT"
    error = ForeignError(path, what, do)
    error.weights = weights
    return error


def weights_in(content: Any) -> dict[str, Tensor] | None:
    """The state dict in a torch file of whatever program."""
    places = [content, *(content.get(key) for key in STATE_DICTS)] if is_dict(content) else []
    for place in places:
        if is_dict(place) and all(isinstance(tensor, Tensor) for tensor in place.values()):
            return place
    return None


def is_dict(value: Any) -> bool:
    return isinstance(value, dict) and len(value) > 0 and all(isinstance(key, str) for key in value)


def canonical(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same under Hugging Face's names, without what wrappers put before them; notes it."""
    named = {WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}
    if named.keys() != weights.keys():
        print(f"Note: `module.` and `_orig_mod.` before names in {path.name} are left out")
    bare = "embed_tokens.weight" in named  # LlamaModel's own names
    return {hf_name(name) if bare else name: tensor for name, tensor in named.items()}


def is_whole(path: Path) -> bool:
    """Whether there is an undamaged archive."""
    try:
        check_archive(path)
    except CheckpointError:
        return False
    return True


def path_of(folder: Path, step: int) -> Path:
    return folder / f"checkpoint_{step}.pt"


def found(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder."""
    names = (
        re.fullmatch(r"checkpoint_(\d+)\.pt", file.name) for file in folder.glob("checkpoint_*.pt")
    )
    return [int(match[1]) for match in names if match]


def newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint of a folder; damaged ones are passed over, each with one line.

    Raises CheckpointError where there are some and none is whole, or where one is not ours.
    """
    steps = sorted(found(folder), reverse=True)
    for step in steps:
        try:
            return path_of(folder, step), _load(path_of(folder, step))
        except DamagedError as error:
            print(f"passed over: {error.where}: {error.what}")
    if steps:
        what = f"none of its {len(steps)} checkpoints is whole"
        raise CheckpointError(folder, what, "move them away, and a run starts anew")
    return None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The run's tokenizer, which lies beside its checkpoints."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(file, "the run's tokenizer is missing", "put it back")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers library raises nothing more particular
        what = f"it is damaged ({error})"
        raise CheckpointError(file, what, "put the run's own tokenizer back") from None

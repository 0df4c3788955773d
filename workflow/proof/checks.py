"""The checks that compare the copy with the original, from the config to generated text.

Both sides get the same ids, nothing is sampled, and bounds were set before figures were seen.
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from SmolLm3 import KVCache, LlamaModel, ModelConfig, hf_state_dict, load_hf_weights
from workflow.analysis import states
from workflow.analysis.states import max_difference
from workflow.config import ProofSettings
from workflow.proof.bounds import Check, largest, summary
from workflow.proof.external import external_checks, unequal_tensors
from workflow.proof.prompts import LONG_PROMPT, PROMPTS
from workflow.reference import Reference, architecture_rows, export
from workflow.training import NextTokenLoss


def copy_reference(reference: Reference) -> LlamaModel:
    """A `LlamaModel` with the reference's weights, copied by name, strictly; prints both counts."""
    model = LlamaModel(reference.config)
    ours, theirs = hf_state_dict(model), reference.state_dict
    load_hf_weights(model, theirs)
    print(f"Model loaded. Total params: {sum(map(torch.numel, ours.values()))}")
    print(f"HF model params: {reference.model.num_parameters()}")
    layers = len(reference.model.model.layers)
    print(f"Layers: {len(model.layers)}, HF model layers: {layers}; {len(ours)} tensors")
    missing, extra = sorted(ours.keys() - theirs), sorted(theirs.keys() - ours)
    print(f"Missing keys: {missing}, extra keys: {extra}")
    return model


def verify(
    model: LlamaModel, reference: Reference, settings: ProofSettings, text: str
) -> list[Check]:
    """Runs all checks and prints each when done; text: for the tokenizer and the long texts."""
    checks, start = [], time.perf_counter()
    print(f"{'check':<38}{'value':>9}  {'bound':<10}verdict")
    for check in run_checks(model, reference, settings, text):
        checks.append(check)
        print(check)
    print(f"{summary(checks)}, in {time.perf_counter() - start:.0f} s")
    return checks


def run_checks(
    model: LlamaModel, reference: Reference, settings: ProofSettings, text: str
) -> Iterator[Check]:
    """Every check of `BOUNDS`, in its order, also after one has failed; float32 on the CPU.

    The last checks, of long texts and bf16, take minutes: `settings.quick` leaves them out.
    """
    ids = encode(reference, LONG_PROMPT)
    all_ids = reference.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    with torch.no_grad():
        yield from external_checks(model, reference, settings.wikitext)
        yield from copied(model, reference)
        yield tokenizer_check(reference, text, all_ids)
        theirs = states.hidden_states(reference.model, ids)
        yield from computed(model, theirs, ids)
        yield eager_check("logits match eager attention", model, reference, ids, theirs["logits"])
    yield gradient_check(model, reference, ids)
    with torch.no_grad():
        yield from generated(model, reference, settings.new_tokens)
        yield cache_check(model, ids[:, :64])
        yield padding_check(model, reference)
        yield from exported(model, reference, ids)
        if not settings.quick:
            yield from long_texts(model, reference, torch.tensor([all_ids]))
            yield from bf16_checks(model, reference, ids)


def copied(model: LlamaModel, reference: Reference) -> Iterator[Check]:
    """Config and weights."""
    source = ModelConfig.from_hf(reference.model.config)
    rows = architecture_rows(reference.entry.architecture, source)
    rows += [row for row in architecture_rows(model.config, source) if not row[-1]]
    unequal = [f"{key} {mine} is not {theirs}" for key, mine, theirs, same in rows if not same]
    detail = ", ".join(unequal or [f"{key} {mine} = {theirs}" for key, mine, theirs, _ in rows])
    yield Check("config matches the source", len(unequal), f"YAML and source: {detail}")
    ours, theirs = hf_state_dict(model), reference.state_dict
    odd = dict.fromkeys(sorted(ours.keys() ^ theirs.keys()), math.inf)
    detail = ", ".join(list(odd)[:3]) or f"{len(ours)} tensors"
    yield Check("tensor names match", len(odd), detail, odd)
    counted = sum(map(torch.numel, ours.values()))
    missing = reference.model.num_parameters() - counted
    yield Check("parameter counts match", missing, f"{counted} parameters")
    unequal = [name for name in unequal_tensors(ours, theirs) if name not in odd]
    yield Check("tensor values match", len(unequal), ", ".join(unequal[:3]))


def tokenizer_check(reference: Reference, text: str, ids: Sequence[int]) -> Check:
    back = reference.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    lost = sum(a != b for a, b in zip(text, back)) + abs(len(text) - len(back))
    return Check("text survives encode and decode", lost, f"of {len(text)}, encoded and decoded")


def computed(model: LlamaModel, theirs: dict[str, Tensor], ids: Tensor) -> Iterator[Check]:
    """Every state from ids (1, T) to the loss; theirs: the reference's `hidden_states` of them."""
    ours, difference = states.hidden_states(model, ids), states.relative_difference_by_position
    logits = ours.pop("logits")
    parts = {name: difference(state, theirs[name]) for name, state in ours.items()}
    yield Check("embeddings match", parts.pop("embed_tokens"), f"{ids.shape[1]} tokens")
    norm = parts.pop("norm")
    yield largest("hidden states match, layer by layer", parts)
    yield Check("final norm matches", norm)
    detail = f"{ids.shape[1]} tokens; transformers with SDPA attention"
    yield Check("logits match", max_difference(logits, theirs["logits"]), detail)
    mine, other = training_loss(model, ids).item(), theirs["loss"].item()
    yield Check("loss matches", abs(mine - other), f"{mine:.6f} and {other:.6f} nats per token")


def training_loss(model: LlamaModel, ids: Tensor) -> Tensor:
    """The training step's own loss: of each token of ids (1, T) after those before it."""
    return NextTokenLoss(model)(ids[:, :-1], ids[:, 1:])


def eager_check(
    name: str, model: LlamaModel, reference: Reference, ids: Tensor, sdpa: Tensor
) -> Check:
    """The difference to eager attention, as a multiple of that of transformers' `sdpa` logits."""
    reference.model.set_attn_implementation("eager")
    try:
        eager = states.logits(reference.model, ids)
    finally:
        reference.model.set_attn_implementation("sdpa")
    ours = max_difference(states.logits(model, ids), eager)
    return ratio_check(name, ours, max_difference(sdpa, eager), f"{ids.shape[1]} tokens")


def ratio_check(name: str, ours: float, theirs: float, detail: str) -> Check:
    """The figure is `ours` as a multiple of `theirs`; 0 if both are 0."""
    figure = ours / theirs if theirs else (math.inf if ours else 0.0)
    return Check(name, figure, f"{ours:.2e} and {theirs:.2e}, {detail}")


def gradient_check(model: LlamaModel, reference: Reference, ids: Tensor) -> Check:
    """The gradients of training, before clipping, against transformers' own."""
    ours = states.gradients(model, training_loss(model, ids))
    reference.model.requires_grad_(True)
    theirs = states.gradients(reference.model, reference.model(ids, labels=ids).loss)
    reference.model.requires_grad_(False)
    parts = {name: states.relative_difference(ours[name], theirs[name]) for name in theirs}
    return largest("gradients match", parts)


def encode(reference: Reference, text: str) -> Tensor:
    """The prompt's ids, (1, T), at most 300."""
    ids = reference.tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([ids[:300]])


def pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts (1, T) of different lengths as one left-padded batch of ids, and its mask."""
    rows = [prompt[0] for prompt in prompts]
    batch = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    return batch.clamp(min=0), batch >= 0


def generated(model: LlamaModel, reference: Reference, new_tokens: int) -> Iterator[Check]:
    """Greedy text of every prompt, generated on both sides, and the logits over it."""
    prompts = {kind: encode(reference, text) for kind, text in PROMPTS}
    # a batch of its own: padding all to its length would take ten times as long
    long = {kind: prompts.pop(kind) for kind, text in PROMPTS if text == LONG_PROMPT}
    greedy = {"do_sample": False, "eos_token_id": None, "max_new_tokens": new_tokens}
    differing, first, parts = 0, "", {}
    for group in (prompts, long):
        batch, mask = pad(list(group.values()))
        ours = model.generate(batch, new_tokens, mask=mask)[:, batch.shape[1] :]
        theirs = reference.model.generate(batch, attention_mask=mask.long(), **greedy)
        theirs = theirs[:, batch.shape[1] :]
        differing += int((ours != theirs).sum())
        for (kind, prompt), mine, other in zip(group.items(), ours, theirs, strict=True):
            text = torch.cat([prompt, mine[None]], dim=1)
            logits = reference.model(text).logits
            parts[kind] = max_difference(model(text), logits)
            if not first and not torch.equal(mine, other):
                place = int((mine != other).nonzero()[0])
                best = logits[0, prompt.shape[1] + place - 1].topk(2).values
                first = f"first: {kind}, token {place + 1}, where transformers' best two are "
                first += f"{best[0] - best[1]:.2e} apart"
    total = f"{len(PROMPTS)} prompts of {new_tokens} new tokens each, generated on both sides"
    yield Check("greedy tokens match", differing, first or total)
    yield largest("logits match on generated text", parts)


def cache_check(model: LlamaModel, ids: Tensor) -> Check:
    """Token by token through the cache, against all at once without one."""
    cache = KVCache(model.config, 1, ids.shape[1], like=model.embed_tokens.weight)
    parts = {
        f"token {place}": max_difference(model(ids[:, [place]], cache=cache)[:, 0], whole)
        for place, whole in enumerate(model(ids).unbind(dim=1))
    }
    return largest("cache matches no cache", parts)


def padding_check(model: LlamaModel, reference: Reference) -> Check:
    """Prompts of different lengths in one left-padded batch, against each alone."""
    prompts = {kind: encode(reference, text)[:, :100] for kind, text in PROMPTS}
    batch, mask = pad(list(prompts.values()))
    together = model.hidden(batch, mask=mask)
    parts = {
        kind: max_difference(model.lm_head(row[None, -prompt.shape[1] :]), model(prompt))
        for row, (kind, prompt) in zip(together, prompts.items(), strict=True)
    }
    return largest("padded batch matches single prompts", parts)


def exported(model: LlamaModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """Written as a Hugging Face folder and read by transformers."""
    from transformers import AutoModelForCausalLM  # 3 s that `import workflow.proof` does not need

    with tempfile.TemporaryDirectory() as folder:
        export(model, reference.tokenizer, f"{folder}/exported", asdict(reference.provenance))
        back = AutoModelForCausalLM.from_pretrained(f"{folder}/exported", local_files_only=True)
    changed = unequal_tensors(hf_state_dict(model), dict(back.named_parameters()))
    detail = ", ".join(changed[:3]) or "a Hugging Face folder, read by transformers"
    yield Check("export keeps every tensor", len(changed), detail)
    yield Check("export keeps the logits", max_difference(back.eval()(ids).logits, model(ids)))


def long_texts(model: LlamaModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """2048 and 8192 tokens of ids (1, N), repeated if too few, or as many as the context holds."""
    import resource  # Windows has none: there, only the quick checks run

    context = min(model.config.max_position_embeddings, 8192)
    ids = ids.repeat(1, -(-context // ids.shape[1]))[:, :context]
    part = ids[:, :2048]
    sdpa = states.logits(reference.model, part)
    detail = f"{part.shape[1]} tokens; transformers with SDPA attention"
    yield Check(
        "logits match, 2048 tokens", max_difference(states.logits(model, part), sdpa), detail
    )
    yield eager_check("logits match eager, 2048 tokens", model, reference, part, sdpa)
    del sdpa  # 0.4 GB
    sides = (states.logits_in_chunks(side, ids) for side in (model, reference.model))
    difference = max(max_difference(*pair) for pair in zip(*sides, strict=True))
    yield Check("logits match, 8192 tokens", difference, f"{context} tokens")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes of `ru_maxrss`
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    yield Check("peak memory, GB", peak, "of this process so far, with both models in it")


def bf16_checks(model: LlamaModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """Our bf16 against transformers' float32, as a multiple of what its own bf16 differs."""
    token_losses = partial(F.cross_entropy, target=ids[0, 1:], reduction="none")
    exact = states.logits(reference.model, ids)
    divergences, differences = [], []
    for side in (model, reference.model):
        logits = states.logits(states.in_bf16(side), ids).float()
        divergences.append(states.kl_divergence(logits, exact))
        # the mean over tokens of the difference: the difference of the means is mostly noise
        losses = token_losses(logits[0, :-1]), token_losses(exact[0, :-1])
        differences.append(F.l1_loss(*losses).item())
    yield ratio_check("bf16 logits as close as transformers'", *divergences, "nats per token")
    yield ratio_check("bf16 losses as close as transformers'", *differences, "nats per token")


@torch.no_grad()
def reference_loss(reference: Reference, inputs: Tensor, targets: Tensor) -> float:
    """transformers' loss of a batch, inputs and targets (B, T), as the training step defines it."""
    return reference.model(inputs, labels=targets, shift_labels=targets.contiguous()).loss.item()

"""The checks that compare a model with the original, from the config to generated text.

Both get the same ids, in float32 on the CPU; nothing is sampled. `ours` is from the model that is
checked, `theirs` from the original. All bounds but two were set before the first measurement.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from SmolLm3 import LlamaModel, ModelConfig, hf_state_dict
from workflow.analysis import states
from workflow.analysis.states import max_difference
from workflow.config import ProofSettings
from workflow.proof.bounds import (
    ROUNDING,
    CannotAnswer,
    Check,
    answers,
    max_check,
    rounding_bound,
    summary,
)
from workflow.proof.compared import (
    STATES,
    CheckedModel,
    Comparison,
    Original,
    OurModel,
    encode_prompt,
    greedy_texts,
    left_pad,
    load_copy,
    token_losses,
)
from workflow.proof.external import external_checks
from workflow.proof.prompts import PROMPTS
from workflow.reference import Reference, compare_configs, export, unequal_tensors


def copy_reference(reference: Reference) -> LlamaModel:
    """`load_copy`, with a line for each comparison of numbers and names."""
    model = load_copy(reference)
    ours, theirs = hf_state_dict(model), reference.state_dict
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
    """Runs all checks and prints each result. text: for the tokenizer and the long texts."""
    long = "1 to 2 minutes" if settings.quick else "5 to 6 minutes"
    print(f"The checks take {long} for SmolLM2-135M on two CPU cores")
    return print_checks(Comparison(OurModel(model), reference, model, settings, text))


def print_checks(comparison: Comparison) -> list[Check]:
    checks, start = [], time.perf_counter()
    print(f"{'check':<38}{'value':>9}  {'bound':<11}result")
    for check in run_checks(comparison):
        checks.append(check)
        print(check)
    print(f"{summary(checks)}, in {time.perf_counter() - start:.0f} s")
    return checks


def run_checks(comparison: Comparison) -> Iterator[Check]:
    """Runs every check of `BOUNDS`; `settings.quick` skips the last ones, which take minutes.

    A check for which the model lacks something is skipped, with the reason.
    """
    c, subject, reference = comparison, comparison.subject, comparison.reference
    all_ids = reference.tokenizer.backend_tokenizer.encode(c.text, add_special_tokens=False).ids
    with torch.no_grad():
        yield from external_checks(subject, reference, c.settings.wikitext_file)
        yield from config_check(subject, reference)
        yield from weight_checks(subject, reference, reference.stored_weights())
        yield from tokenizer_check(subject, reference, c.text, all_ids)
        for check in forward_pass_checks(subject, c.theirs, c.ids, c.limits):
            c.logits_differ |= check.name == "logits match" and check.passed is False
            yield check
        yield from loss_check(c)
        yield from eager_check(c)
    yield from gradient_check(c)
    with torch.no_grad():
        yield from generation_checks(c)
        yield from cache_check(subject, c.ids)
        yield from batch_check(c)
        yield from export_checks(subject, reference, c.ids)
        if not c.settings.quick:
            yield from long_text_checks(c, torch.tensor([all_ids]))
            yield from bf16_checks(subject, c.original, c.ids)


@answers("config matches the source")
def config_check(subject: CheckedModel, reference: Reference) -> Iterator[Check]:
    """The architecture of our model, in the YAML, and in the source."""
    model, source = subject.llama(), ModelConfig.from_hf(reference.model.config)
    rows = compare_configs(reference.entry.architecture, source)
    rows += [row for row in compare_configs(model.config, source) if not row[-1]]
    unequal = [f"{key} {mine} is not {theirs}" for key, mine, theirs, same in rows if not same]
    detail = ", ".join(unequal or [f"{key} {mine} = {theirs}" for key, mine, theirs, _ in rows])
    yield Check("config matches the source", len(unequal), f"YAML and source: {detail}")


@answers("tensor names match", "parameter counts match", "tensor values match")
def weight_checks(
    subject: CheckedModel, reference: Reference, theirs: Mapping[str, Tensor]
) -> Iterator[Check]:
    """Names, number and values of the tensors. theirs: read from the file."""
    ours = subject.parameters()
    unmatched = dict.fromkeys(sorted(ours.keys() ^ theirs.keys()), math.inf)
    detail = ", ".join(list(unmatched)[:3]) or f"{len(ours)} tensors{subject.remark}"
    yield Check("tensor names match", len(unmatched), detail, unmatched)
    count = sum(map(torch.numel, ours.values()))
    missing = reference.model.num_parameters() - count
    yield Check("parameter counts match", missing, f"{count} parameters")
    theirs = {name: tensor.to(ours.get(name, tensor).dtype) for name, tensor in theirs.items()}
    unequal = [name for name in unequal_tensors(ours, theirs) if name not in unmatched]
    yield Check("tensor values match", len(unequal), ", ".join(unequal[:3]))


@answers("text survives encode and decode")
def tokenizer_check(
    subject: CheckedModel, reference: Reference, text: str, ids: Sequence[int]
) -> Iterator[Check]:
    subject.llama()
    decoded = reference.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    wrong = sum(a != b for a, b in zip(text, decoded)) + abs(len(text) - len(decoded))
    detail = f"{wrong} of {len(text)} characters differ"
    yield Check("text survives encode and decode", wrong, detail)


@answers(*STATES, "logits match")
def forward_pass_checks(
    subject: CheckedModel, theirs: Mapping[str, Tensor], ids: Tensor, limits: Mapping[str, float]
) -> Iterator[Check]:
    """Every state from ids (1, T) to the logits. theirs: of the original. limits: other bounds."""
    names = [name for name in theirs if name not in ("logits", "loss")]
    ours, difference = subject.states(ids, names), states.relative_difference_by_position
    logits = max_difference(ours.pop("logits"), theirs["logits"])
    if not subject.same_order:  # a state of another size is another state
        ours = {name: s for name, s in ours.items() if s.shape == theirs[name].shape}
    parts = {name: difference(state, theirs[name]) for name, state in ours.items()}
    if limits and logits <= limits["logits match"]:  # then its modules only have other borders
        parts = {name: value for name, value in parts.items() if value <= limits[STATES[0]]}
    for name, modules in zip(STATES, (names[:1], names[1:-1], names[-1:])):
        found = {module: parts[module] for module in modules if module in parts}
        yield max_check(name, found, limits.get(name))
    detail = f"{ids.shape[1]} tokens; transformers with SDPA attention"
    yield Check("logits match", logits, detail, limit=limits.get("logits match"))


@answers("loss matches")
def loss_check(c: Comparison) -> Iterator[Check]:
    loss, theirs = c.subject.loss(c.ids).item(), c.theirs["loss"].item()
    yield compare_losses(loss, theirs, c.limits.get("loss matches"))


def compare_losses(loss: float, theirs: float, limit: float | None = None) -> Check:
    detail = f"ours {loss:.6f}, transformers' {theirs:.6f} nats per token"
    return Check("loss matches", abs(loss - theirs), detail, limit=limit)


@answers("distance to eager attention")
def eager_check(c: Comparison) -> Iterator[Check]:
    logits, sdpa, eager = c.subject.logits(c.ids), c.theirs["logits"], c.eager["logits"]
    yield distance_check("distance to eager attention", c.subject, logits, sdpa, eager)


def distance_check(
    name: str, subject: CheckedModel, logits: Tensor, sdpa: Tensor, eager: Tensor
) -> Check:
    """The distance of `logits` from eager attention, divided by that of `sdpa` logits."""
    ours, theirs = max_difference(logits, eager), max_difference(sdpa, eager)
    if subject.same_order:
        return ratio_check(name, ours, theirs, f"{logits.shape[1]} tokens")
    # their rounding can be 0 by chance for a tiny model
    bound = rounding_bound("logits match", theirs)
    return ratio_check(name, ours, bound / ROUNDING, f"{logits.shape[1]} tokens", ROUNDING + 1)


def ratio_check(
    name: str, ours: float, theirs: float, detail: str, limit: float | None = None
) -> Check:
    """The value is `ours` divided by `theirs`; 0 if both are 0."""
    ratio = ours / theirs if theirs else (math.inf if ours else 0.0)
    detail = f"ours {ours:.2e}, transformers' {theirs:.2e}; {detail}"
    return Check(name, ratio, detail, limit=limit)


@answers("gradients match")
def gradient_check(c: Comparison) -> Iterator[Check]:
    """The gradient of every parameter, before clipping."""
    c.require_same_logits()
    name, difference, limit = "gradients match", states.relative_difference, None
    ours, theirs = c.subject.gradients(c.ids), c.original.gradients(c.ids)
    if not c.subject.same_order:
        with c.original.eager():
            eager = c.original.gradients(c.ids)
        limit = rounding_bound(name, max(difference(eager[n], theirs[n]) for n in theirs))
    parts = {name: difference(ours[name], theirs[name]) for name in theirs}
    yield max_check(name, parts, limit)


@answers("greedy tokens match", "logits match on generated text")
def generation_checks(c: Comparison) -> Iterator[Check]:
    """Our model continues every prompt greedily; transformers gets prompts and new tokens.

    If each new token has transformers' largest logit, its greedy text is the same. Another model
    gets the text of our copy, and must have the same largest logits; but rounding may change it
    where transformers' best two logits are close.
    """
    c.require_same_logits()
    ours = c.subject.same_order
    differing, first, parts, limits = 0, "", {}, c.limits
    close = 2 * limits.get("logits match", 0.0)  # both logits may be off
    writer, lacking = c.subject if ours else OurModel(c.copy), None
    for kind, ids, length in greedy_texts(c.reference, c.settings.greedy_tokens, writer):
        try:
            logits, theirs = c.subject.logits(ids), c.original.logits(ids)
        except CannotAnswer as reason:  # for example, this text is too long
            lacking = reason
            continue
        parts[kind] = max_difference(logits, theirs)
        chosen = ids[0, length:] if ours else logits[0, length - 1 : -1].argmax(dim=-1)
        best = theirs[0, length - 1 : -1].topk(2)  # for each new token
        gaps = best.values[:, 0] - best.values[:, 1]
        wrong = ((best.indices[:, 0] != chosen) & (gaps >= close)).nonzero()
        differing += len(wrong)
        if len(wrong) and not first:
            place = int(wrong[0])
            first = f"first: {kind}, token {place + 1}, where transformers' best two logits "
            first += f"differ by {gaps[place]:.2e}"
    if not parts:
        raise lacking
    total = f"{len(parts)} prompts, {c.settings.greedy_tokens} new tokens each"
    yield Check("greedy tokens match", differing, first or total)
    yield max_check("logits match on generated text", parts, limits.get("logits match"))


@answers("logits match with and without cache")
def cache_check(subject: CheckedModel, ids: Tensor) -> Iterator[Check]:
    """The logits of ids (1, T): with a cache in several calls, and all at once without one."""
    logits, parts, place = subject.logits(ids), {}, 0
    for part in subject.logits_with_cache(ids):
        end = place + part.shape[1]
        parts[f"token {place}"] = max_difference(part, logits[:, place:end])
        place = end
    yield max_check("logits match with and without cache", parts)


@answers("batch matches single prompts")
def batch_check(c: Comparison) -> Iterator[Check]:
    """The logits of prompts in a batch, and alone: two of one length; and all, if it can mask."""
    name, length = "batch matches single prompts", min(100, c.subject.longest)
    prompts = {kind: encode_prompt(c.reference, text)[:, :length] for kind, text in PROMPTS}
    pair = list(prompts.values())[:2]
    pair = torch.cat([ids[:, : min(ids.shape[1] for ids in pair)] for ids in pair])
    single = torch.cat([c.subject.logits(ids[None]) for ids in pair])
    parts, lacking = {"two without padding": max_difference(c.subject.logits(pair), single)}, ""
    try:
        rows = c.subject.logits_of_padded(*left_pad(list(prompts.values())))
        for row, (kind, prompt) in zip(rows, prompts.items(), strict=True):
            parts[kind] = max_difference(row, c.subject.logits(prompt))
    except CannotAnswer as reason:
        lacking = f"; {reason}"
    check = max_check(name, parts, c.limits.get(name))
    yield replace(check, detail=check.detail + lacking)


@answers("export keeps every tensor", "export keeps the logits")
def export_checks(subject: CheckedModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """Tensors and logits after the model is exported and loaded again by transformers."""
    from transformers import AutoModelForCausalLM  # 3 s that `import workflow.proof` does not need

    model = subject.llama()
    with tempfile.TemporaryDirectory() as folder:
        export(model, reference.tokenizer, f"{folder}/exported", asdict(reference.provenance))
        loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/exported", local_files_only=True)
    changed = unequal_tensors(hf_state_dict(model), dict(loaded.named_parameters()))
    detail = ", ".join(changed[:3]) or "a Hugging Face folder, loaded by transformers"
    yield Check("export keeps every tensor", len(changed), detail)
    yield Check("export keeps the logits", max_difference(loaded.eval()(ids).logits, model(ids)))


def long_text_checks(c: Comparison, ids: Tensor) -> Iterator[Check]:
    """Logits of 2048 and 8192 tokens of ids (1, N), or as many as fit into the context."""
    context = min(c.reference.config.max_position_embeddings, 8192)
    ids = ids.repeat(1, -(-context // ids.shape[1]))[:, :context]  # repeated if too short
    yield from checks_of_2048_tokens(c, ids[:, : min(2048, c.subject.longest)])
    yield from checks_of_8192_tokens(c, ids)


@answers("logits match, 2048 tokens", "distance to eager, 2048 tokens")
def checks_of_2048_tokens(c: Comparison, ids: Tensor) -> Iterator[Check]:
    c.require_same_logits()
    name, detail = "logits match, 2048 tokens", f"{ids.shape[1]} tokens; transformers with SDPA"
    logits, sdpa = c.subject.logits(ids), c.original.logits(ids)
    with c.original.eager():
        eager = c.original.logits(ids)
    limit = None
    if not c.subject.same_order:
        limit = rounding_bound(name, max_difference(eager, sdpa))
    yield Check(name, max_difference(logits, sdpa), f"{detail} attention", limit=limit)
    yield distance_check("distance to eager, 2048 tokens", c.subject, logits, sdpa, eager)


@answers("logits match, 8192 tokens")
def checks_of_8192_tokens(c: Comparison, ids: Tensor) -> Iterator[Check]:
    chunks = (side.logits_in_chunks(ids) for side in (c.subject, c.original))
    difference = max(max_difference(*pair) for pair in zip(*chunks, strict=True))
    yield Check("logits match, 8192 tokens", difference, f"{ids.shape[1]} tokens")


@answers("bf16 logits as close as transformers'", "bf16 losses as close as transformers'")
def bf16_checks(subject: CheckedModel, original: Original, ids: Tensor) -> Iterator[Check]:
    """The model's bf16 error, divided by that of transformers; both against float32."""
    exact = original.logits(ids)
    divergences, differences = [], []
    for side in (subject, original):
        logits = side.bf16_logits(ids).float()
        divergences.append(states.kl_divergence(logits, exact))
        # differences token by token: the difference of the mean losses is mostly noise
        losses = F.l1_loss(token_losses(logits, ids), token_losses(exact, ids))
        differences.append(losses.item())
    yield ratio_check("bf16 logits as close as transformers'", *divergences, "nats per token")
    yield ratio_check("bf16 losses as close as transformers'", *differences, "nats per token")


@torch.no_grad()
def reference_loss(reference: Reference, inputs: Tensor, targets: Tensor) -> float:
    """transformers' loss for a training batch: inputs (B, T), targets (B, T), already shifted."""
    return reference.model(inputs, labels=targets, shift_labels=targets.contiguous()).loss.item()

"""The checks that compare our copy with the original, from the config to generated text.

Both models get the same ids, in float32 on the CPU; nothing is sampled. `ours` is from our model,
`theirs` from that of transformers. The bounds were set before the first measurement.
"""

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
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
from workflow.proof.bounds import Check, max_check, summary
from workflow.proof.external import external_checks
from workflow.proof.prompts import LONG_PROMPT, PROMPTS
from workflow.reference import Reference, compare_configs, export, unequal_tensors
from workflow.training import NextTokenLoss, hardware


def copy_reference(reference: Reference) -> LlamaModel:
    """A `LlamaModel` with the reference's weights, copied by name. Every name must match."""
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
    """Runs all checks and prints each result. text: for the tokenizer and the long texts."""
    checks, start = [], time.perf_counter()
    long = "1 to 2 minutes" if settings.quick else "5 to 6 minutes"
    print(f"The checks take {long} for SmolLM2-135M on two CPU cores")
    print(f"{'check':<38}{'value':>9}  {'bound':<10}result")
    for check in run_checks(model, reference, settings, text):
        checks.append(check)
        print(check)
    print(f"{summary(checks)}, in {time.perf_counter() - start:.0f} s")
    return checks


def run_checks(
    model: LlamaModel, reference: Reference, settings: ProofSettings, text: str
) -> Iterator[Check]:
    """Runs every check of `BOUNDS`; `settings.quick` skips the last ones, which take minutes."""
    ids = encode_prompt(reference, LONG_PROMPT)
    all_ids = reference.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    with torch.no_grad():
        yield from external_checks(model, reference, settings.wikitext_file)
        yield from config_and_weight_checks(model, reference, reference.stored_weights())
        yield tokenizer_check(reference, text, all_ids)
        theirs = states.hidden_states(reference.model, ids)
        yield from forward_pass_checks(model, theirs, ids)
        yield eager_check("distance to eager attention", model, reference, ids, theirs["logits"])
    yield gradient_check(model, reference, ids)
    with torch.no_grad():
        yield from generation_checks(model, reference, settings.new_tokens)
        yield cache_check(model, ids[:, :64])
        yield padding_check(model, reference)
        yield from export_checks(model, reference, ids)
        if not settings.quick:
            yield from long_text_checks(model, reference, torch.tensor([all_ids]))
            yield from bf16_checks(model, reference, ids)


def config_and_weight_checks(
    model: LlamaModel, reference: Reference, theirs: Mapping[str, Tensor]
) -> Iterator[Check]:
    """Architecture, then names, number and values of the tensors. theirs: read from the file."""
    source = ModelConfig.from_hf(reference.model.config)
    rows = compare_configs(reference.entry.architecture, source)
    rows += [row for row in compare_configs(model.config, source) if not row[-1]]
    unequal = [f"{key} {mine} is not {theirs}" for key, mine, theirs, same in rows if not same]
    detail = ", ".join(unequal or [f"{key} {mine} = {theirs}" for key, mine, theirs, _ in rows])
    yield Check("config matches the source", len(unequal), f"YAML and source: {detail}")
    ours = hf_state_dict(model)
    unmatched = dict.fromkeys(sorted(ours.keys() ^ theirs.keys()), math.inf)
    detail = ", ".join(list(unmatched)[:3]) or f"{len(ours)} tensors"
    yield Check("tensor names match", len(unmatched), detail, unmatched)
    count = sum(map(torch.numel, ours.values()))
    missing = reference.model.num_parameters() - count
    yield Check("parameter counts match", missing, f"{count} parameters")
    unequal = [name for name in unequal_tensors(ours, theirs) if name not in unmatched]
    yield Check("tensor values match", len(unequal), ", ".join(unequal[:3]))


def tokenizer_check(reference: Reference, text: str, ids: Sequence[int]) -> Check:
    decoded = reference.tokenizer.backend_tokenizer.decode(ids, skip_special_tokens=False)
    wrong = sum(a != b for a, b in zip(text, decoded)) + abs(len(text) - len(decoded))
    return Check("text survives encode and decode", wrong, f"of {len(text)} characters differ")


def forward_pass_checks(
    model: LlamaModel, theirs: dict[str, Tensor], ids: Tensor
) -> Iterator[Check]:
    """Every state from ids (1, T) to the loss. theirs: the reference's `hidden_states` for ids."""
    ours, difference = states.hidden_states(model, ids), states.relative_difference_by_position
    logits = ours.pop("logits")
    parts = {name: difference(state, theirs[name]) for name, state in ours.items()}
    yield Check("embeddings match", parts.pop("embed_tokens"), f"{ids.shape[1]} tokens")
    norm = parts.pop("norm")
    yield max_check("hidden states match, layer by layer", parts)
    yield Check("final norm matches", norm)
    detail = f"{ids.shape[1]} tokens; transformers with SDPA attention"
    yield Check("logits match", max_difference(logits, theirs["logits"]), detail)
    loss, their_loss = training_loss(model, ids).item(), theirs["loss"].item()
    detail = f"ours {loss:.6f}, transformers' {their_loss:.6f} nats per token"
    yield Check("loss matches", abs(loss - their_loss), detail)


def training_loss(model: LlamaModel, ids: Tensor) -> Tensor:
    """The loss of the training step, for next-token prediction on ids (1, T)."""
    return NextTokenLoss(model)(ids[:, :-1], ids[:, 1:])


def eager_check(
    name: str, model: LlamaModel, reference: Reference, ids: Tensor, sdpa: Tensor
) -> Check:
    """The distance of our logits from eager attention, divided by that of `sdpa` logits."""
    reference.model.set_attn_implementation("eager")
    try:
        eager = states.logits(reference.model, ids)
    finally:
        reference.model.set_attn_implementation("sdpa")
    ours = max_difference(states.logits(model, ids), eager)
    return ratio_check(name, ours, max_difference(sdpa, eager), f"{ids.shape[1]} tokens")


def ratio_check(name: str, ours: float, theirs: float, detail: str) -> Check:
    """The value is `ours` divided by `theirs`; 0 if both are 0."""
    ratio = ours / theirs if theirs else (math.inf if ours else 0.0)
    return Check(name, ratio, f"ours {ours:.2e}, transformers' {theirs:.2e}; {detail}")


def gradient_check(model: LlamaModel, reference: Reference, ids: Tensor) -> Check:
    """The gradient of every parameter, before clipping."""
    ours = states.gradients(model, training_loss(model, ids))
    reference.model.requires_grad_(True)
    theirs = states.gradients(reference.model, reference.model(ids, labels=ids).loss)
    reference.model.requires_grad_(False)
    parts = {name: states.relative_difference(ours[name], theirs[name]) for name in theirs}
    return max_check("gradients match", parts)


def encode_prompt(reference: Reference, text: str) -> Tensor:
    """The first 300 token ids of a text, (1, T)."""
    ids = reference.tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([ids[:300]])


def left_pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts (1, T) of different lengths as one batch of ids (B, T), and its mask (B, T)."""
    rows = [prompt[0] for prompt in prompts]
    batch = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    return batch.clamp(min=0), batch >= 0


def generation_checks(model: LlamaModel, reference: Reference, new_tokens: int) -> Iterator[Check]:
    """Our model continues every prompt greedily; transformers gets prompts and new tokens.

    If each new token has transformers' largest logit, its greedy text is the same.
    """
    prompts = {kind: encode_prompt(reference, text) for kind, text in PROMPTS}
    # a separate batch: padding the short prompts to its length would take ten times as long
    long = {kind: prompts.pop(kind) for kind, text in PROMPTS if text == LONG_PROMPT}
    differing, first, parts = 0, "", {}
    for group in (prompts, long):
        batch, mask = left_pad(list(group.values()))
        ours = model.generate(batch, new_tokens, mask=mask)[:, batch.shape[1] :]
        for (kind, prompt), new in zip(group.items(), ours, strict=True):
            ids = torch.cat([prompt, new[None]], dim=1)
            logits = reference.model(ids).logits
            parts[kind] = max_difference(model(ids), logits)
            best = logits[0, prompt.shape[1] - 1 : -1].topk(2)  # for each new token
            wrong = (best.indices[:, 0] != new).nonzero()
            differing += len(wrong)
            if len(wrong) and not first:
                place = int(wrong[0])
                gap = best.values[place, 0] - best.values[place, 1]
                first = f"first: {kind}, token {place + 1}, where transformers' best two logits "
                first += f"differ by {gap:.2e}"
    total = f"{len(PROMPTS)} prompts, {new_tokens} new tokens each"
    yield Check("greedy tokens match", differing, first or total)
    yield max_check("logits match on generated text", parts)


def cache_check(model: LlamaModel, ids: Tensor) -> Check:
    """The logits of ids (1, T): token by token with a cache, and all at once without one."""
    cache = KVCache(model.config, 1, ids.shape[1], like=model.embed_tokens.weight)
    parts = {
        f"token {place}": max_difference(model(ids[:, [place]], cache=cache)[:, 0], logits)
        for place, logits in enumerate(model(ids).unbind(dim=1))
    }
    return max_check("logits match with and without cache", parts)


def padding_check(model: LlamaModel, reference: Reference) -> Check:
    """The logits of every prompt: in one left-padded batch, and alone."""
    prompts = {kind: encode_prompt(reference, text)[:, :100] for kind, text in PROMPTS}
    batch, mask = left_pad(list(prompts.values()))
    states_of_batch = model.hidden(batch, mask=mask)
    parts = {
        kind: max_difference(model.lm_head(row[None, -prompt.shape[1] :]), model(prompt))
        for row, (kind, prompt) in zip(states_of_batch, prompts.items(), strict=True)
    }
    return max_check("padded batch matches single prompts", parts)


def export_checks(model: LlamaModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """Tensors and logits after the model is exported and loaded again by transformers."""
    from transformers import AutoModelForCausalLM  # 3 s that `import workflow.proof` does not need

    with tempfile.TemporaryDirectory() as folder:
        export(model, reference.tokenizer, f"{folder}/exported", asdict(reference.provenance))
        loaded = AutoModelForCausalLM.from_pretrained(f"{folder}/exported", local_files_only=True)
    changed = unequal_tensors(hf_state_dict(model), dict(loaded.named_parameters()))
    detail = ", ".join(changed[:3]) or "a Hugging Face folder, loaded by transformers"
    yield Check("export keeps every tensor", len(changed), detail)
    yield Check("export keeps the logits", max_difference(loaded.eval()(ids).logits, model(ids)))


def long_text_checks(model: LlamaModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """Logits of 2048 and 8192 tokens of ids (1, N), or as many as fit into the context."""
    context = min(model.config.max_position_embeddings, 8192)
    ids = ids.repeat(1, -(-context // ids.shape[1]))[:, :context]  # repeated if too short
    part = ids[:, :2048]
    sdpa = states.logits(reference.model, part)
    difference = max_difference(states.logits(model, part), sdpa)
    detail = f"{part.shape[1]} tokens; transformers with SDPA attention"
    yield Check("logits match, 2048 tokens", difference, detail)
    yield eager_check("distance to eager, 2048 tokens", model, reference, part, sdpa)
    del sdpa  # 0.4 GB
    chunks = (states.logits_in_chunks(side, ids) for side in (model, reference.model))
    difference = max(max_difference(*pair) for pair in zip(*chunks, strict=True))
    yield Check("logits match, 8192 tokens", difference, f"{context} tokens")
    peak = hardware.peak_memory(torch.device("cpu"))
    yield Check("peak memory, GB", peak, "of this process, with both models in memory")


def bf16_checks(model: LlamaModel, reference: Reference, ids: Tensor) -> Iterator[Check]:
    """Our bf16 error, divided by that of transformers; both against transformers in float32."""
    token_losses = partial(F.cross_entropy, target=ids[0, 1:], reduction="none")
    exact = states.logits(reference.model, ids)
    divergences, differences = [], []
    for side in (model, reference.model):
        logits = states.logits(states.in_bf16(side), ids).float()
        divergences.append(states.kl_divergence(logits, exact))
        # differences token by token: the difference of the mean losses is mostly noise
        losses = token_losses(logits[0, :-1]), token_losses(exact[0, :-1])
        differences.append(F.l1_loss(*losses).item())
    yield ratio_check("bf16 logits as close as transformers'", *divergences, "nats per token")
    yield ratio_check("bf16 losses as close as transformers'", *differences, "nats per token")


@torch.no_grad()
def reference_loss(reference: Reference, inputs: Tensor, targets: Tensor) -> float:
    """transformers' loss for a training batch: inputs (B, T), targets (B, T), already shifted."""
    return reference.model(inputs, labels=targets, shift_labels=targets.contiguous()).loss.item()

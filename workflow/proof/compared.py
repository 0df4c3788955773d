"""The models that are compared, behind one protocol: ours, and the original of transformers.

The checks ask only what `CheckedModel` has, so they work for every model, also for somebody else's
(`candidate.py`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from SmolLm3 import KVCache, LlamaModel, hf_name, load_hf_weights
from workflow.analysis import states
from workflow.analysis.states import max_difference
from workflow.config import ProofSettings
from workflow.proof.bounds import CannotAnswer, rounding_bound
from workflow.proof.prompts import LONG_PROMPT, PROMPTS
from workflow.reference import Reference
from workflow.training import NextTokenLoss

STATES = ("embeddings match", "hidden states match, layer by layer", "final norm matches")


class CheckedModel:
    """A model as the checks see it, with Hugging Face's names; those of states lack `model.`.

    Whatever a model does not have raises `CannotAnswer`.
    """

    same_order = True  # it adds numbers in the original's order; if not, it may be off by rounding
    longest = 8192  # tokens that it accepts; the checks need no more
    remark = ""  # on its tensors

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T, V) for ids (B, T), float32."""
        raise CannotAnswer("no logits")

    def logits_in_chunks(self, ids: Tensor) -> Iterator[Tensor]:
        """Yields the logits (1, up to 256, V) of a long text, to save memory."""
        raise CannotAnswer("only for models whose attention is known to need little memory")

    def loss(self, ids: Tensor) -> Tensor:
        """The loss of next-token prediction on ids (1, T), nats per token."""
        return F.cross_entropy(self.logits(ids)[0, :-1], ids[0, 1:])

    def parameters(self) -> Mapping[str, Tensor]:
        raise CannotAnswer("no tensors")

    def gradients(self, ids: Tensor) -> dict[str, Tensor]:
        """The gradient of the loss on ids (1, T), for each parameter."""
        parameters = self.parameters()
        found = torch.autograd.grad(self.loss(ids), list(parameters.values()))
        return dict(zip(parameters, found, strict=True))

    def modules(self, names: Sequence[str]) -> dict[str, nn.Module]:
        """The modules with these names; without those that the model does not have."""
        return {}

    def states(self, ids: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The states with these names, as far as the model has them, and its logits.

        A name is that of a module: its output; or `input of ` a module.
        """
        logits, found = states.record(self.modules(names), lambda: self.logits(ids))
        return found | {"logits": logits}

    def bf16_logits(self, ids: Tensor) -> Tensor:
        raise CannotAnswer("it is judged in float32")

    def llama(self) -> LlamaModel:
        """Our own model, for what only it has: a config, evaluation, export."""
        raise CannotAnswer("only for the project's own model")

    def generate(self, ids: Tensor, new_tokens: int, mask: Tensor) -> Tensor:
        """The greedy continuation (B, T + new_tokens) of ids (B, T), padded on the left."""
        raise CannotAnswer("it does not generate")

    def logits_with_cache(self, ids: Tensor) -> Iterator[Tensor]:
        """Yields the logits (B, n, V) of ids (B, T) in parts, each computed with a cache."""
        raise CannotAnswer("no cache")

    def logits_of_padded(self, ids: Tensor, mask: Tensor) -> Iterator[Tensor]:
        """Yields the logits (1, n, V) of the n tokens of each row that `mask` (B, T) shows."""
        raise CannotAnswer("it has no padding mask")


class OurModel(CheckedModel):
    """A `LlamaModel`."""

    def __init__(self, model: LlamaModel):
        self.model = model

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids)

    def logits_in_chunks(self, ids: Tensor) -> Iterator[Tensor]:
        yield from map(self.model.lm_head, self.model.hidden(ids).split(256, dim=1))

    def loss(self, ids: Tensor) -> Tensor:
        """The loss of the training step."""
        return NextTokenLoss(self.model)(ids[:, :-1], ids[:, 1:])

    def parameters(self) -> dict[str, Tensor]:
        return {hf_name(name): tensor for name, tensor in self.model.named_parameters()}

    def gradients(self, ids: Tensor) -> dict[str, Tensor]:
        self.model.train()  # as in training; all other checks are in eval mode
        try:
            return super().gradients(ids)
        finally:
            self.model.eval()

    def modules(self, names: Sequence[str]) -> dict[str, nn.Module]:
        return submodules(self.model, names)

    def bf16_logits(self, ids: Tensor) -> Tensor:
        return states.in_bf16(self.model)(ids)

    def llama(self) -> LlamaModel:
        return self.model

    def generate(self, ids: Tensor, new_tokens: int, mask: Tensor) -> Tensor:
        return self.model.generate(ids, new_tokens, mask=mask)

    def logits_with_cache(self, ids: Tensor) -> Iterator[Tensor]:
        """Some tokens one by one, most of the others at once, the last again one by one."""
        B, T = ids.shape
        cache = KVCache(self.model.config, B, T, like=self.model.embed_tokens.weight)
        many = [T - 48] if T > 48 else []
        for part in ids.split([1] * min(T, 32) + many + [1] * min(max(T - 32, 0), 16), dim=1):
            yield self.model(part, cache=cache)

    def logits_of_padded(self, ids: Tensor, mask: Tensor) -> Iterator[Tensor]:
        for row, real in zip(self.model.hidden(ids, mask=mask), mask):
            yield self.model.lm_head(row[None, real])


class Original(CheckedModel):
    """A Llama of transformers."""

    def __init__(self, model: nn.Module):
        self.model = model

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits

    def logits_in_chunks(self, ids: Tensor) -> Iterator[Tensor]:
        hidden = self.model.model(ids, use_cache=False).last_hidden_state
        yield from map(self.model.lm_head, hidden.split(256, dim=1))

    def loss(self, ids: Tensor) -> Tensor:
        return self.model(ids, labels=ids).loss

    def parameters(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def gradients(self, ids: Tensor) -> dict[str, Tensor]:
        self.model.requires_grad_(True)
        try:
            return super().gradients(ids)
        finally:
            self.model.requires_grad_(False)

    def modules(self, names: Sequence[str]) -> dict[str, nn.Module]:
        return submodules(self.model.model, names)

    def states(self, ids: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """The states, the logits, and also `loss`, as transformers computes it."""
        modules = self.modules(names)
        output, found = states.record(modules, lambda: self.model(ids, labels=ids))
        return found | {"logits": output.logits, "loss": output.loss}

    def bf16_logits(self, ids: Tensor) -> Tensor:
        return states.in_bf16(self.model)(ids).logits

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Attention as plain matrix products, instead of PyTorch's SDPA: other rounding."""
        self.model.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.model.set_attn_implementation("sdpa")


def submodules(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    return {name: model.get_submodule(name.removeprefix(states.INPUT)) for name in names}


def load_copy(reference: Reference) -> LlamaModel:
    """A `LlamaModel` with the reference's weights, copied by name. Every name must match."""
    model = LlamaModel(reference.config)
    load_hf_weights(model, reference.state_dict)
    return model.eval()


@dataclass
class Comparison:
    """A model, the original, and what several checks need of both.

    copy: the original as a `LlamaModel`; it writes the greedy text for a model that cannot.
    text: for the tokenizer and the long texts.
    """

    subject: CheckedModel
    reference: Reference
    copy: LlamaModel
    settings: ProofSettings
    text: str

    def __post_init__(self):
        self.original = Original(self.reference.model)
        self.ids = encode_prompt(self.reference, LONG_PROMPT)[:, : self.subject.longest]
        self.names = states.state_names(self.reference.config.num_hidden_layers)
        self.logits_differ = False  # set by `run_checks`, when this check has failed

    @cached_property
    @torch.no_grad()
    def theirs(self) -> dict[str, Tensor]:
        """States, logits and loss of the original for `ids`."""
        return self.original.states(self.ids, self.names)

    @cached_property
    @torch.no_grad()
    def eager(self) -> dict[str, Tensor]:
        """The same with eager attention."""
        with self.original.eager():
            return self.original.states(self.ids, self.names)

    def require_same_logits(self) -> None:
        """Raises CannotAnswer if somebody else's model has failed "logits match".

        Gradients and longer texts would then show nothing new.
        """
        if self.logits_differ and not self.subject.same_order:
            raise CannotAnswer("its logits differ already")

    @cached_property
    def limits(self) -> dict[str, float]:
        """Bounds for rounding, by check; none if the model adds in the original's order."""
        if self.subject.same_order:
            return {}
        eager, theirs = self.eager, self.theirs
        difference = states.relative_difference_by_position
        distances = dict.fromkeys(STATES, max(difference(eager[n], theirs[n]) for n in self.names))
        losses = (token_losses(side["logits"], self.ids) for side in (eager, theirs))
        distances["loss matches"] = F.l1_loss(*losses).item()
        names = "logits match", "batch matches single prompts"
        distances |= dict.fromkeys(names, max_difference(eager["logits"], theirs["logits"]))
        return {name: rounding_bound(name, distance) for name, distance in distances.items()}


def encode_prompt(reference: Reference, text: str) -> Tensor:
    """The first 300 token ids of a text, (1, T)."""
    ids = reference.tokenizer(text, add_special_tokens=False).input_ids
    return torch.tensor([ids[:300]])


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """The loss (T - 1,) of each token of ids (1, T) but the first, nats."""
    return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")


def left_pad(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts (1, T) of different lengths as one batch of ids (B, T), and its mask (B, T)."""
    rows = [prompt[0] for prompt in prompts]
    batch = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
    return batch.clamp(min=0), batch >= 0


def greedy_texts(
    reference: Reference,
    new_tokens: int,
    writer: CheckedModel,
    prompts: Sequence[tuple[str, str]] = PROMPTS,
) -> Iterator[tuple[str, Tensor, int]]:
    """Yields the kind of each prompt, prompt and greedy text (1, T), and the prompt's length."""
    encoded = {kind: encode_prompt(reference, text) for kind, text in prompts}
    # a separate batch: padding the short prompts to its length would take ten times as long
    long = {kind: encoded.pop(kind) for kind, text in prompts if text == LONG_PROMPT}
    for group in filter(None, (encoded, long)):
        batch, mask = left_pad(list(group.values()))
        new = writer.generate(batch, new_tokens, mask)[:, batch.shape[1] :]
        for (kind, prompt), row in zip(group.items(), new, strict=True):
            yield kind, torch.cat([prompt, row[None]], dim=1), prompt.shape[1]

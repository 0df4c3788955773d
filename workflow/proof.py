"""How the copy is held against the original.

Nothing here samples: every check compares numbers of both models on the same ids, with a bound that
was set before the figures were seen, or greedy tokens, which are either the same or not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from SmolLm3 import LlamaModel, hf_state_dict, load_hf_weights

from .reference import Reference
from .settings import ProofSettings

MAX_LOSS_DIFFERENCE = 1e-5  # nats a token
MAX_PROMPT_TOKENS = 300

LONG_PROMPT = (
    "The mill stood where the valley narrowed, and for as long as anyone could remember it had "
    "ground the corn of three parishes. In dry summers the wheel turned so slowly that the "
    "miller's children could count its paddles; in spring, when the snow came down all at once, "
    "the whole building shook and flour drifted from the rafters. The miller kept a ledger in "
    "which every sack was entered twice, once when it arrived as grain and once when it left as "
    "meal, and the difference between the two columns was the only wage he ever took. One year "
    "the difference vanished. Sacks went out exactly as heavy as they had come in. He weighed "
    "the scales against a stone, and the stone against the scales of the next village, and "
    "found nothing wrong with either. His wife said that he should be glad of honest customers. "
    "His eldest son said that the mice had at last been caught. The miller said nothing, but "
    "sat up all night beside the hopper with a lantern under his coat, listening to the water. "
    "Towards morning the wheel stopped by itself, though the sluice was open, and in the "
    "silence he heard someone on the other side of the wall counting under his breath: "
    "nineteen, twenty, twenty-one. When he opened the door there was nobody there, only the wet "
    "prints of bare feet that led across the boards, down the steps and into the mill race, "
    "each a little smaller than the one before it. He followed them to the edge and"
)
PROMPTS = (  # (kind, text); the first ones are generated on both sides
    ("prose", "Once upon a time, there was a lighthouse keeper who"),
    ("code", "def fibonacci(n):\n    if n < 2:\n        return n\n    return"),
    ("digits", "17 + 25 = 42\n18 + 25 = 43\n19 + 25 ="),
    ("300 tokens", LONG_PROMPT),
    ("one token", "The"),
    ("one space", " "),
    ("white space", "a\n  5\n\n   6\t\t7\n"),
    ("fact", "The capital of France is"),
    ("list", "1. Wash the rice.\n2. Boil the water.\n3."),
    ("question", "Q: Why is the sky blue?\nA:"),
    ("dialogue", '"Where were you?" she asked. "We waited until'),
    ("JSON", '{"name": "Ada", "born": 1815, "fields": ['),
    ("HTML", '<ul>\n  <li><a href="/index.html">Home</a></li>\n'),
    ("C", "#include <stdio.h>\n\nint main(void) {\n    for (int i = 0; i < 10; i++)"),
    ("French", "Il était une fois, dans une forêt très éloignée,"),
    ("Greek", "Ἐν ἀρχῇ ἦν ὁ λόγος, καὶ"),
    ("Russian", "Жил-был в одной деревне старый"),
    ("Chinese", "从前有座山，山里有座庙，"),
    ("emoji", "Weather today: ☀️🌧️🌈 and tomorrow: "),
    ("markdown", "# Results\n\n| model | loss |\n|---|---|\n| ours |"),
)


@dataclass(frozen=True)
class Rung:
    """One claim: what was measured, the bound it must keep, and whether it does."""

    name: str
    figure: float | int
    sign: str  # "=" or "<="
    bound: float | int
    detail: str = ""

    @property
    def holds(self) -> bool:
        return self.figure == self.bound if self.sign == "=" else self.figure <= self.bound

    def __str__(self) -> str:
        figure = f"{self.figure:.2e}" if isinstance(self.figure, float) else str(self.figure)
        verdict = "holds" if self.holds else "FAILS"
        detail = f"  ({self.detail})" if self.detail else ""
        return (
            f"{self.name:<34}{figure:>12}  {self.sign + ' ' + str(self.bound):<14}{verdict}{detail}"
        )


@dataclass(frozen=True)
class PromptCheck:
    """One prompt on both sides, over the prompt and our greedy continuation."""

    kind: str
    tokens: int
    logit_difference: float  # largest, absolute
    agreeing: int  # of the continuation's tokens, those that the reference chooses too
    generated: bool  # whether the reference generated, too, rather than judged our continuation

    def __str__(self) -> str:
        way = "generated on both sides" if self.generated else "reference's argmax over ours"
        figures = f"{self.tokens:>4} tokens{self.logit_difference:>12.2e}{self.agreeing:>6}"
        return f"{self.kind:<12}{figures} identical, {way}"


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


def count(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


@torch.no_grad()
def verify(model: LlamaModel, reference: Reference, settings: ProofSettings) -> list[Rung]:
    """From counts to greedy text, stopping at nothing; both models in float32 on the CPU."""
    ours, theirs = hf_state_dict(model), reference.state_dict
    names = sorted(ours.keys() | theirs.keys())
    shared = [name for name in names if name in ours and name in theirs]
    equal = {name for name in shared if torch.equal(ours[name], theirs[name])}
    unequal = [name for name in names if name not in equal]
    checks = check_prompts(model, reference, settings)
    worst = max(checks, key=lambda check: check.logit_difference)
    largest = worst.logit_difference
    both = [check for check in checks if check.generated]
    judged = [check for check in checks if not check.generated]
    long = encode(reference, LONG_PROMPT)
    losses = [next_token_loss(side, long) for side in (model(long), reference.model(long).logits)]
    loss, length = abs(losses[0] - losses[1]), settings.new_tokens
    return [
        Rung("parameters", count(ours), "=", count(theirs)),
        Rung("tensors that differ", len(unequal), "=", 0, ", ".join(unequal[:3])),
        Rung("largest logit difference", largest, "<=", settings.max_logit_difference, worst.kind),
        Rung("loss difference", loss, "<=", MAX_LOSS_DIFFERENCE, "nats a token, 300 tokens"),
        greedy_rung("greedy, generated on both sides", both, length),
        greedy_rung("greedy, judged by the reference", judged, length),
    ]


def check_prompts(
    model: LlamaModel, reference: Reference, settings: ProofSettings
) -> list[PromptCheck]:
    """Every prompt on both sides, each printed when it is done.

    Ours continues the first prompts one by one, since the reference generates them too, and the
    others in one left-padded batch, which is faster and must come to the same.
    """
    alone, length = settings.generated_on_both_sides, settings.new_tokens
    prompts = [encode(reference, text) for _, text in PROMPTS]
    texts = [model.generate(prompt, length) for prompt in prompts[:alone]]
    texts += generate_together(model, prompts[alone:], length)
    checks = []
    for place, ((kind, _), prompt, text) in enumerate(zip(PROMPTS, prompts, texts, strict=True)):
        checks.append(check_prompt(model, reference, kind, prompt, text, place < alone))
        print(checks[-1])
    return checks


def generate_together(model: LlamaModel, prompts: list[Tensor], new_tokens: int) -> list[Tensor]:
    """The greedy texts (1, T + n) of prompts (1, T) of different lengths, as one batch."""
    longest = max((prompt.shape[1] for prompt in prompts), default=0)
    gaps = [longest - prompt.shape[1] for prompt in prompts]
    if not prompts:
        return []
    batch = torch.cat([F.pad(prompt, (gap, 0)) for prompt, gap in zip(prompts, gaps, strict=True)])
    mask = torch.arange(longest) >= torch.tensor(gaps)[:, None]
    texts = model.generate(batch, new_tokens, mask=mask)
    return [text[None, gap:] for text, gap in zip(texts, gaps, strict=True)]


def check_prompt(
    model: LlamaModel, reference: Reference, kind: str, prompt: Tensor, text: Tensor, generate: bool
) -> PromptCheck:
    """Compares logits and choices over `text` (1, T + n), our greedy continuation of `prompt`.

    That transformers' argmax equals our continuation at every place proves that it would have
    generated the same; with `generate` it does generate.
    """
    theirs = reference.model(text).logits
    difference = (model(text) - theirs).abs().nan_to_num(nan=math.inf).max().item()
    T, continuation = prompt.shape[1], text[:, prompt.shape[1] :]
    chosen = theirs[:, T - 1 : -1].argmax(dim=-1)
    if generate:  # without stop tokens, as ours
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": reference.end_of_text}
        mask, new_tokens = torch.ones_like(prompt), continuation.shape[1]
        full = reference.model.generate(
            prompt, attention_mask=mask, max_new_tokens=new_tokens, **options
        )
        chosen = full[:, T:]
    agreeing = int((chosen == continuation).sum()) if chosen.shape == continuation.shape else 0
    return PromptCheck(kind, T, difference, agreeing, generate)


def greedy_rung(name: str, checks: list[PromptCheck], new_tokens: int) -> Rung:
    agreeing, detail = sum(check.agreeing for check in checks), f"{len(checks)} prompts"
    return Rung(name, agreeing, "=", new_tokens * len(checks), f"tokens of {detail}")


def encode(reference: Reference, text: str) -> Tensor:
    """The prompt's ids, (1, T), at most 300."""
    ids = reference.tokenizer(text, add_special_tokens=False).input_ids[:MAX_PROMPT_TOKENS]
    return torch.tensor([ids])


def next_token_loss(logits: Tensor, ids: Tensor) -> float:
    """Mean cross entropy, in nats, of each token of `ids` (B, T) after those before it."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()).item()


@torch.no_grad()
def reference_loss(reference: Reference, inputs: Tensor, targets: Tensor) -> float:
    """transformers' loss on a batch of a run, inputs and targets (B, T)."""
    logits = reference.model(inputs).logits
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()


def table(rungs: list[Rung]) -> str:
    """The ladder as a table for people."""
    head = f"{'rung':<34}{'figure':>12}  {'bound':<14}verdict"
    return "\n".join([head, *map(str, rungs)])

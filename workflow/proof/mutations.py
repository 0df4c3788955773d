"""Break it on purpose: what the usual mistakes do, and which rung of the ladder finds each.

Every mistake was seen in public re-implementations that load cleanly, run, and print success. Each
replaces one part of the model, or of the loss, from outside and puts it back; `SmolLm3.py` has no
switch for any of them.
"""

from __future__ import annotations

import copy
import datetime
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import SmolLm3
from SmolLm3 import LlamaModel, LlamaRMSNorm
from workflow.analysis.states import hidden_states
from workflow.config.settings import BreakingSettings, Config, TrainSettings
from workflow.data.corpus import Corpus, batch_at
from workflow.files import write_text_atomic
from workflow.proof.bounds import Check
from workflow.proof.checks import computed, copied, loss_of
from workflow.reference.load import Reference
from workflow.training.origin import Origin, identify
from workflow.training.step import NextTokenLoss, make_optimizer

TRUTH, RANDOM_HEAD, TWICE = "nothing broken", "head left random", "targets shifted twice"

# --- the mistakes ---------------------------------------------------------------------------------


def interleaved_rotation(model: LlamaModel) -> AbstractContextManager:
    """Neighbouring channels are turned as pairs: right for the paper, wrong for these weights."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    return patch.object(SmolLm3, "rotate", rotate)


def positions_over_heads(model: LlamaModel) -> AbstractContextManager:
    """Angles by the number of the head: a transpose forgotten, and no position known at all."""
    right = SmolLm3.rotate

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        angles = model.rotary(torch.arange(x.shape[1], device=x.device))
        return right(x, *(part.transpose(1, 2) for part in angles))  # (1, H, 1, D / 2)

    return patch.object(SmolLm3, "rotate", rotate)


def other_theta(model: LlamaModel) -> AbstractContextManager:
    """theta 10000, as in SmolLM and in SmolLM2's pretraining recipe; if that is right, 100000."""
    theta = 100000.0 if model.rotary.theta == 10000.0 else 10000.0
    return patch.object(model.rotary, "theta", theta)


def unscaled_scores(model: LlamaModel) -> AbstractContextManager:
    """Attention scores are not divided by sqrt(D)."""

    def attention(*arguments, **options) -> Tensor:
        return F.scaled_dot_product_attention(*arguments, **options, scale=1.0)

    functions = SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": attention})
    return patch.object(SmolLm3, "F", functions)


def no_causal_mask(model: LlamaModel) -> AbstractContextManager:
    """Every position sees the whole text, the answer included."""

    def visible(mask: Tensor | None, start: int, T: int, device: torch.device) -> Tensor:
        return torch.ones(T, start + T, dtype=torch.bool, device=device)

    return patch.object(SmolLm3, "visible_positions", visible)


def random_head(model: LlamaModel) -> AbstractContextManager:
    """The head was not tied, and `strict=False` did not say that its weights are missing."""
    weight = model.embed_tokens.weight
    head = nn.Linear(*weight.T.shape, bias=False, device=weight.device)
    nn.init.normal_(
        head.weight,
        std=model.config.initializer_range,
        generator=torch.Generator(weight.device).manual_seed(0),
    )
    return patch.object(model, "lm_head", head)


def other_eps(model: LlamaModel) -> AbstractContextManager:
    """eps 1e-6, the default of many a config class, instead of 1e-5; if that is right, 1e-5."""
    stack = ExitStack()
    for module in model.modules():
        if isinstance(module, LlamaRMSNorm):
            eps = 1e-5 if module.eps == 1e-6 else 1e-6
            stack.enter_context(patch.object(module, "eps", eps))
    return stack


def targets_shifted_twice(model: LlamaModel) -> AbstractContextManager:
    """The data shifts the targets by one, and so does the loss: the token after the next."""
    right = NextTokenLoss.forward

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return right(self, inputs[:, :-1], targets[:, 1:])

    return patch.object(NextTokenLoss, "forward", forward)


MISTAKES: dict[str, Callable[[LlamaModel], AbstractContextManager]] = {
    TRUTH: lambda model: nullcontext(),
    "interleaved rotation": interleaved_rotation,
    "positions over the heads": positions_over_heads,
    "theta of the other release": other_theta,
    "no 1/sqrt(D)": unscaled_scores,
    "no causal mask": no_causal_mask,
    RANDOM_HEAD: random_head,
    "eps of another model": other_eps,
    TWICE: targets_shifted_twice,
}

# --- what each does -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Broken:
    """One mistake: the first rung that fails, where, by how much, and what the loss says."""

    name: str
    rung: str | None  # None: all of them hold
    where: str  # layer or tensor
    logit_error: float  # largest, absolute
    by_layer: list[float]  # relative error after each layer, as in the ladder
    loss: float  # nats a token, on held-out text, with the mistake in place


@dataclass(frozen=True)
class Curve:
    """Training with a mistake in place, at one constant rate."""

    name: str
    rate: float
    losses: list[float]  # nats a token, of each step's batch
    after: float  # on held-out text, at the end


@torch.no_grad()
def break_with(
    name: str, model: LlamaModel, reference: Reference, ids: Tensor, theirs: dict[str, Tensor]
) -> Broken:
    """Climbs the rungs up to the loss on ids (1, T) with one mistake in place.

    theirs: the reference's `states` for the same ids.
    """
    with MISTAKES[name](model):
        rungs = [*copied(model, reference), *computed(model, theirs, ids)]
        loss = loss_of(model, ids).item()
    told = {rung.name: rung for rung in rungs}
    failed: Check | None = next((rung for rung in rungs if rung.holds is False), None)
    named = failed and failed.name == "tensors missing or extra"
    where = (failed.first or (failed.detail if named else "")) if failed else ""
    layers = list(told["hidden state after each layer"].parts.values())
    return Broken(name, failed and failed.name, where, told["logits"].figure, layers, loss)


def study(
    model: LlamaModel, reference: Reference, config: Config
) -> tuple[list[Broken], list[Curve]]:
    """Every mistake in turn, and what training makes of it; `model` is as before afterwards.

    The curves take half an hour on a CPU: they are told from the record, unless `breaking.steps`
    asks for them. A record of other weights is not told.
    """
    own_text = config.data.model_copy(update={"source": str(config.data.text)})
    corpus, _ = identify(config.model_copy(update={"data": own_text}), Origin.of(reference))
    settings = config.breaking
    held_out = corpus.validation[: settings.tokens].astype(np.int64)
    ids = torch.from_numpy(held_out)[None]
    with torch.no_grad():
        theirs = hidden_states(reference.model, ids)
    broken = [break_with(name, model, reference, ids, theirs) for name in MISTAKES]
    made_of = {
        "weights_sha256": reference.provenance.weights_sha256,
        "text_sha256": corpus.text_sha256,
        "held_out_tokens": settings.tokens,
        "batch": [settings.batch_size, settings.sequence_length],
    }
    if not settings.steps:
        return broken, told(settings.record, made_of)
    shape = {"batch_size": settings.batch_size, "sequence_length": settings.sequence_length}
    train = config.train.model_copy(update={**shape, "eps": settings.eps})
    curves = []
    for name, rate in pairs(settings):
        how = {"rate": rate, "steps": settings.steps, "seed": config.run.seed}
        curves.append(train_with(name, model, corpus, ids, train, **how))
    keep(curves, settings.record, made_of)
    return broken, curves


def pairs(settings: BreakingSettings) -> list[tuple[str, float]]:
    """Every mistake at the plausible rate; what a curve that never falls could come from, at all.

    Those are the two mistakes that start high, and the truth.
    """
    high = [(name, rate) for name in (TRUTH, RANDOM_HEAD, TWICE) for rate in settings.other_rates]
    return [(name, settings.learning_rate) for name in MISTAKES] + high


def train_with(
    name: str,
    model: LlamaModel,
    corpus: Corpus,
    ids: Tensor,
    settings: TrainSettings,
    *,
    rate: float,
    steps: int,
    seed: int,
) -> Curve:
    """A plausible loop, on a copy of `model`: AdamW, clipping, a constant rate."""
    model = copy.deepcopy(model)
    loss_module, losses = NextTokenLoss(model), []
    with MISTAKES[name](model):
        optimizer = make_optimizer(model, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate
        bar = {"desc": f"{name}, rate {rate:g}", "mininterval": 5.0, "leave": False}
        for step in tqdm(range(steps), file=sys.stdout, **bar):
            shape = settings.batch_size, settings.sequence_length
            loss = loss_module(*batch_at(corpus.train, step, *shape, seed))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        with torch.no_grad():
            return Curve(name, rate, losses, loss_of(model, ids).item())


# --- the record -----------------------------------------------------------------------------------


def keep(curves: Sequence[Curve], file: Path, made_of: Mapping[str, Any]) -> None:
    """Keeps curves with what they were made of, when and where."""
    rows = [
        {**asdict(curve), "losses": [round(loss, 4) for loss in curve.losses]} for curve in curves
    ]
    where = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    record = {
        **made_of,
        "date": datetime.date.today().isoformat(),
        "machine": where,
        "curves": rows,
    }
    write_text_atomic(file, json.dumps(record) + "\n", "breaking.record")


def told(file: Path, made_of: Mapping[str, Any]) -> list[Curve]:
    """The kept curves, if they are of the same weights, text and batch."""
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any(record.get(key) != value for key, value in made_of.items()):
        print("No curves are kept for these weights and this text; breaking.steps=100 trains them")
        return []
    curves = [Curve(**curve) for curve in record["curves"]]
    print(f"Curves told from {file}: {len(curves[0].losses)} steps each, of {record['date']}")
    return curves


def table(broken: Sequence[Broken], curves: Sequence[Curve], settings: BreakingSettings) -> str:
    """One line for each mistake; the last column is the loss after the plausible loop."""
    plausible = [curve for curve in curves if curve.rate == settings.learning_rate]
    after = {curve.name: f"{curve.after:.3f}" for curve in plausible}
    lines = [
        f"{'mistake':<27}{'first rung that fails':<31}{'where':<16}{'logit error':>11}"
        f"{'loss':>8}{'trained':>9}"
    ]
    lines += [
        f"{row.name:<27}{row.rung or 'none':<31}{row.where:<16}{row.logit_error:>11.2e}"
        f"{row.loss:>8.3f}{after.get(row.name, '-'):>9}"
        for row in broken
    ]
    return "\n".join(lines)


def curve_table(curves: Sequence[Curve]) -> str:
    """Between which losses each curve ran."""
    head = f"{'mistake':<27}{'rate':>8}{'first':>9}{'least':>9}{'most':>9}{'last':>9}"
    return "\n".join(
        [head]
        + [
            f"{c.name:<27}{c.rate:>8g}{c.losses[0]:>9.3f}{min(c.losses):>9.3f}"
            f"{max(c.losses):>9.3f}{c.losses[-1]:>9.3f}"
            for c in curves
        ]
    )

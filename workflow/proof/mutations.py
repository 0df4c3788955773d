"""Mutations: common mistakes put into the model one at a time, and which check finds each.

Each was seen in public re-implementations that load cleanly, run, and print success.
"""

import copy
import datetime
import json
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import trange

import SmolLm3
from SmolLm3 import LlamaModel, LlamaRMSNorm
from workflow.analysis.states import hidden_states
from workflow.config import Config, MutationSettings
from workflow.data import Corpus, batch_at, from_path, load_corpus
from workflow.files import write_text_atomic
from workflow.proof.checks import computed, copied, training_loss
from workflow.reference import Reference
from workflow.training import NextTokenLoss, make_optimizer
from workflow.training.hardware import machine

BASELINE, RANDOM_HEAD, SHIFTED_TWICE = "no mutation", "random head", "targets shifted twice"


def interleaved_rotation(model: LlamaModel) -> AbstractContextManager:
    """Neighbouring channels are rotated as pairs: right for the paper, wrong for these weights."""

    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)

    return patch.object(SmolLm3, "rotate", rotate)


def positions_over_heads(model: LlamaModel) -> AbstractContextManager:
    """The angle depends on the head, not on the position: a transpose was forgotten."""
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
    attention = partial(F.scaled_dot_product_attention, scale=1.0)
    functions = SimpleNamespace(**vars(F) | {"scaled_dot_product_attention": attention})
    return patch.object(SmolLm3, "F", functions)


def no_causal_mask(model: LlamaModel) -> AbstractContextManager:
    """Every position sees the whole text, with the token that it should predict."""

    def visible(mask: Tensor | None, start: int, T: int, device: torch.device) -> Tensor:
        return torch.ones(T, start + T, dtype=torch.bool, device=device)

    return patch.object(SmolLm3, "visible_positions", visible)


def random_head(model: LlamaModel) -> AbstractContextManager:
    """The head was not tied, and `strict=False` hid that its weights are missing."""
    weight = model.embed_tokens.weight
    head = nn.Linear(*weight.T.shape, bias=False, device=weight.device)
    generator = torch.Generator(weight.device).manual_seed(0)
    nn.init.normal_(head.weight, std=model.config.initializer_range, generator=generator)
    return patch.object(model, "lm_head", head)


def other_eps(model: LlamaModel) -> AbstractContextManager:
    """eps 1e-6, the default of many config classes, instead of 1e-5; if that is right, 1e-5."""
    eps = 1e-5 if model.norm.eps == 1e-6 else 1e-6  # a class's property hides the modules' values
    return patch.object(LlamaRMSNorm, "eps", property(lambda module: eps), create=True)


def targets_shifted_twice(model: LlamaModel) -> AbstractContextManager:
    """The data shifts the targets by one, and so does the loss: the token after the next."""
    right = NextTokenLoss.forward

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        return right(self, inputs[:, :-1], targets[:, 1:])

    return patch.object(NextTokenLoss, "forward", forward)


MUTATIONS: dict[str, Callable[[LlamaModel], AbstractContextManager]] = {
    BASELINE: nullcontext,
    "interleaved rotation": interleaved_rotation,
    "positions over heads": positions_over_heads,
    "theta of another release": other_theta,
    "no 1/sqrt(D)": unscaled_scores,
    "no causal mask": no_causal_mask,
    RANDOM_HEAD: random_head,
    "eps of another model": other_eps,
    SHIFTED_TWICE: targets_shifted_twice,
}


@dataclass(frozen=True)
class MutationResult:
    """The first check that fails, where, and the size of the errors."""

    name: str
    failed_check: str | None  # None: all passed
    where: str | None  # layer or tensor
    logit_error: float  # largest, absolute
    layer_errors: list[float]  # after each layer, relative, as in the checks
    loss: float  # nats per token on held-out text, with the mutation


@dataclass(frozen=True)
class Curve:
    """Training with a mutation, at one constant learning rate."""

    name: str
    rate: float
    losses: list[float]  # nats per token, of each step's batch
    after: float  # on held-out text, after the last step


@torch.no_grad()
def check_mutation(
    name: str, model: LlamaModel, reference: Reference, ids: Tensor, theirs: dict[str, Tensor]
) -> MutationResult:
    """Runs the checks up to the loss on ids (1, T); theirs: the reference's `hidden_states`."""
    with MUTATIONS[name](model):
        checks = {c.name: c for c in (*copied(model, reference), *computed(model, theirs, ids))}
        loss = training_loss(model, ids).item()
    logit_error = checks["logits match"].value
    layer_errors = list(checks["hidden states match, layer by layer"].parts.values())
    check = next((check for check in checks.values() if check.passed is False), None)
    failed_check, where = (check.name, check.first_failure) if check else (None, None)
    return MutationResult(name, failed_check, where, logit_error, layer_errors, loss)


def study(
    model: LlamaModel, reference: Reference, config: Config
) -> tuple[list[MutationResult], list[Curve]]:
    """Checks and trains with every mutation in turn; `model` is unchanged afterwards.

    Training takes half an hour on a CPU; with 0 `mutations.steps`, `mutations.curves_file` is read.
    """
    settings = config.mutations
    tokenizer = reference.tokenizer.backend_tokenizer
    source = from_path(config.data.text, config.data.column)
    corpus = load_corpus(config, tokenizer, reference.end_of_text, source)
    ids = torch.tensor(corpus.validation[: settings.tokens], dtype=torch.long)[None]
    with torch.no_grad():
        theirs = hidden_states(reference.model, ids)
    results = [check_mutation(name, model, reference, ids, theirs) for name in MUTATIONS]
    origin = {
        "weights_sha256": reference.provenance.weights_sha256,
        "text_sha256": corpus.text_sha256,
        "held_out_tokens": settings.tokens,
        "batch": [settings.batch_size, settings.sequence_length],
    }
    if not settings.steps:
        return results, load_curves(settings.curves_file, origin)
    # other rates: could they explain a published curve that starts high and never falls?
    high = (BASELINE, RANDOM_HEAD, SHIFTED_TWICE)
    pairs = [(name, settings.learning_rate) for name in MUTATIONS]
    pairs += [(name, rate) for name in high for rate in settings.other_learning_rates]
    curves = [train_mutation(name, rate, model, corpus, ids, config) for name, rate in pairs]
    save_curves(curves, settings.curves_file, origin)
    return results, curves


def train_mutation(
    name: str, rate: float, model: LlamaModel, corpus: Corpus, ids: Tensor, config: Config
) -> Curve:
    """A plausible training loop on a copy of `model`: AdamW, clipping, a constant rate."""
    settings, model = config.mutations, copy.deepcopy(model)
    train = config.train.model_copy(update={"learning_rate": rate, "eps": settings.eps})
    size = settings.batch_size, settings.sequence_length
    loss_module, losses = NextTokenLoss(model), []
    with MUTATIONS[name](model):
        optimizer = make_optimizer(model, train)
        bar = {"desc": f"{name}, rate {rate:g}", "leave": False, "file": sys.stdout}
        for step in trange(settings.steps, **bar):
            loss = loss_module(*batch_at(corpus.train, step, *size, config.run.seed))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), train.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(round(loss.item(), 4))
        with torch.no_grad():
            return Curve(name, rate, losses, training_loss(model, ids).item())


def save_curves(curves: list[Curve], file: Path, origin: dict) -> None:
    """Writes curves with what they were made from, when and where."""
    record = origin | {
        "date": datetime.date.today().isoformat(),
        "machine": f"{machine(torch.device('cpu'))}, torch {torch.__version__}",
        "curves": [asdict(curve) for curve in curves],
    }
    write_text_atomic(file, json.dumps(record) + "\n", "mutations.curves_file")


def load_curves(file: Path, origin: dict) -> list[Curve]:
    """The recorded curves; none if they are of other weights, another text or another batch."""
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any(record.get(key) != value for key, value in origin.items()):
        print("No curves are recorded for these weights and this text: set mutations.steps=100")
        return []
    curves = [Curve(**curve) for curve in record["curves"]]
    print(f"Curves read from {file}: {len(curves[0].losses)} steps each, of {record['date']}")
    return curves


def table(results: list[MutationResult], curves: list[Curve], settings: MutationSettings):
    """A DataFrame with a row for each mutation; last, the held-out loss after training."""
    import pandas as pd  # 0.5 s that other commands do not need

    rows = pd.DataFrame(results).set_index("name").drop(columns="layer_errors")
    trained = {curve.name: curve.after for curve in curves if curve.rate == settings.learning_rate}
    rows["trained"] = pd.Series(trained)
    rows["logit_error"] = rows["logit_error"].map("{:.2g}".format)
    return rows.fillna({"failed_check": "none", "where": ""}).round(3)


def curve_table(curves: list[Curve]):
    """A DataFrame with the first, lowest, highest and last loss of each curve."""
    import pandas as pd

    columns = ["name", "rate", "first", "lowest", "highest", "last"]
    rows = [
        (c.name, f"{c.rate:g}", c.losses[0], min(c.losses), max(c.losses), c.losses[-1])
        for c in curves
    ]
    return pd.DataFrame(rows, columns=columns).set_index("name").round(3)

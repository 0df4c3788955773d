"""The mutation study: each common mistake in turn is put into our model. Which check finds it?"""

import copy
import datetime
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import trange

from SmolLm3 import LlamaModel
from workflow.analysis.states import state_names
from workflow.config import Config
from workflow.data import Corpus, batch_at, load_corpus, local_source
from workflow.errors import one_line_errors
from workflow.files import write_text_atomic
from workflow.proof.checks import (
    compare_losses,
    config_check,
    forward_pass_checks,
    weight_checks,
)
from workflow.proof.compared import Original, OurModel
from workflow.proof.mistakes import BASELINE, MUTATIONS, STARTS_HIGH, mutations_of
from workflow.reference import Reference
from workflow.training import NextTokenLoss, make_optimizer
from workflow.training.hardware import describe_device
from workflow.training.resume import code_sha256

CODE = ("workflow/proof/mistakes.py", "workflow/proof/mutations.py")


@dataclass(frozen=True)
class MutationResult:
    """The first check that fails with a mutation, and the size of the errors."""

    name: str
    failed_check: str | None  # None: all checks passed
    where: str | None  # the first layer or tensor
    logit_error: float  # largest, absolute
    layer_errors: list[float]  # relative, after each layer
    loss: float  # nats per token, on held-out text


@dataclass(frozen=True)
class LossCurve:
    """Training with a mutation, at a constant learning rate."""

    name: str
    rate: float
    losses: list[float]  # nats per token, at each step
    held_out_loss: float  # after the last step


@torch.no_grad()
def check_mutation(
    name: str,
    model: LlamaModel,
    reference: Reference,
    stored: dict[str, Tensor],
    ids: Tensor,
    theirs: dict[str, Tensor],
) -> MutationResult:
    """Runs the checks of config, weights and forward pass.

    stored: the weights in the reference's file. theirs: see `forward_pass_checks`.
    """
    subject = OurModel(model)
    with MUTATIONS[name](model):
        found = [*config_check(subject, reference), *weight_checks(subject, reference, stored)]
        found += forward_pass_checks(subject, theirs, ids, {})
        loss = subject.loss(ids).item()
    found.append(compare_losses(loss, theirs["loss"].item()))
    checks = {check.name: check for check in found}
    logit_error = checks["logits match"].value
    layer_errors = list(checks["hidden states match, layer by layer"].parts.values())
    failed = next((check for check in found if check.passed is False), None)
    failed_check, where = (failed.name, failed.first_failure) if failed else (None, None)
    return MutationResult(name, failed_check, where, logit_error, layer_errors, loss)


def run_mutations(
    model: LlamaModel, reference: Reference, config: Config
) -> tuple[list[MutationResult], list[LossCurve]]:
    """Checks and trains the model with every mutation; `model` is unchanged at the end.

    Training takes two hours on a CPU. If `mutations.steps` is 0, a file is read instead.
    """
    settings = config.mutations
    tokenizer = reference.tokenizer.backend_tokenizer
    source = local_source(config.data.fallback_text, config.data.column)
    corpus = load_corpus(config, tokenizer, reference.end_of_text, source)
    ids = torch.tensor(corpus.validation[: settings.tokens], dtype=torch.long)[None]
    with torch.no_grad():
        names = state_names(model.config.num_hidden_layers)
        theirs = Original(reference.model).states(ids, names)
    given = model, reference, reference.stored_weights(), ids, theirs
    names = mutations_of(model)
    results = [check_mutation(name, *given) for name in names]
    provenance = {
        "weights_sha256": reference.provenance.weights_sha256,
        "text_sha256": corpus.text_sha256,
        "held_out_tokens": settings.tokens,
        "batch": [settings.batch_size, settings.sequence_length],
    }
    if not settings.steps:
        return results, load_curves(settings.curves_file, provenance)
    # other rates: do they explain a published loss curve that stays between 9 and 12.5?
    compared = [name for name in names if name == BASELINE or name in STARTS_HIGH]
    pairs = [(name, settings.learning_rate) for name in names]
    pairs += [(name, rate) for name in compared for rate in settings.other_learning_rates]
    rates = [settings.learning_rate, *settings.other_learning_rates]
    provenance |= {"steps": settings.steps, "rates": rates, "code": code_sha256(*CODE)}
    provenance |= {"seed": config.run.seed, "eps": settings.eps}
    file = settings.curves_file
    partial = file.with_name(f"{file.name}.partial")  # after a stop, the same command continues
    curves = load_curves(partial, provenance) if partial.is_file() else []
    for name, rate in pairs[len(curves) :]:
        curves.append(train_mutation(name, rate, model, corpus, ids, config))
        save_curves(curves, partial, provenance)
    save_curves(curves, file, provenance)
    partial.unlink()
    return results, curves


def train_mutation(
    name: str, rate: float, model: LlamaModel, corpus: Corpus, ids: Tensor, config: Config
) -> LossCurve:
    """Trains a copy of `model` with AdamW and gradient clipping; ids: the held-out text (1, T)."""
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
            return LossCurve(name, rate, losses, OurModel(model).loss(ids).item())


def save_curves(curves: list[LossCurve], file: Path, provenance: dict) -> None:
    content = provenance | {
        "date": datetime.date.today().isoformat(),
        "machine": f"{describe_device(torch.device('cpu'))}, torch {torch.__version__}",
        "curves": [asdict(curve) for curve in curves],
    }
    write_text_atomic(file, json.dumps(content) + "\n", "mutations.curves_file")


def load_curves(file: Path, provenance: dict) -> list[LossCurve]:
    """The saved curves; none if they are for other weights, another text or other settings.

    Raises WorkflowError if the file is not JSON.
    """
    with one_line_errors(file, "remove it, or name another: --set mutations.curves_file=PATH"):
        content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if any(content.get(key) != value for key, value in provenance.items()):
        what = "no curves for these weights, this text and these settings"
        print(f"{file} has {what}: mutations.steps=100 computes them")
        return []
    curves = [LossCurve(**curve) for curve in content["curves"]]
    other = "" if content.get("code") == code_sha256(*CODE) else ", recorded by other code"
    steps = len(curves[0].losses)
    print(f"Curves read from {file}: {steps} steps each, of {content['date']}{other}")
    return curves


def result_table(results: list[MutationResult], curves: list[LossCurve], rate: float):
    """A DataFrame, one row per mutation; the last column is for training at `rate`."""
    import pandas as pd  # 0.5 s that other commands do not need

    table = pd.DataFrame(results).set_index("name").drop(columns="layer_errors")
    trained = {c.name: c.held_out_loss for c in curves if c.rate == rate}
    table["loss_after_training"] = pd.Series(trained)
    table["logit_error"] = table["logit_error"].map("{:.2g}".format)
    return table.fillna({"failed_check": "none", "where": ""}).round(3)


def curve_table(curves: list[LossCurve]):
    """A DataFrame, one row per curve: its first, lowest, highest and last loss."""
    import pandas as pd

    columns = ["name", "rate", "first", "lowest", "highest", "last"]
    rows = [
        (c.name, f"{c.rate:g}", c.losses[0], min(c.losses), max(c.losses), c.losses[-1])
        for c in curves
    ]
    return pd.DataFrame(rows, columns=columns).set_index("name").round(3)

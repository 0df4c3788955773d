"""A participant of `make bench-peers`, in an environment with its packages.

    python tests/peers/worker.py NAME TASK.json

After two calls it prints their results as JSON: the losses of training steps (the second depends on
the update of the first), or the generated tokens. Then, for each line of stdin, the seconds of one
more call. TASK.json: see `compare.py`.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[1:1] = [str(ROOT), str(ROOT / "tests" / "proof")]


class Turns:
    """Measures the time between two calls, without the time in which the other side works."""

    def __init__(self):
        self.out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what a library prints goes to stderr
        self.results, self.start = [], 0.0

    def __call__(self, result: Any) -> None:
        seconds = time.perf_counter() - self.start
        if len(self.results) == 2:
            self.say(seconds)
        else:
            self.results.append(result.item() if isinstance(result, Tensor) else result)
            if len(self.results) == 1:
                return
            self.say(self.results)
        if not sys.stdin.readline():
            os._exit(0)  # also out of the Trainer's loop
        self.start = time.perf_counter()

    def say(self, content: Any) -> None:
        print(json.dumps(content), file=self.out, flush=True)


# --- the participants: each calls `turn` with its result after each call --------------------------


def ours(task: dict, turn: Callable) -> None:
    from workflow.analysis import prepare_for_generation
    from workflow.config.settings import TrainSettings
    from workflow.reference import load_exported
    from workflow.training import TrainStep, hardware

    model, _, _ = load_exported(Path(task["folder"]))
    if task["new_tokens"]:
        model = prepare_for_generation(model, getattr(torch, task["precision"]))
        prompt = torch.tensor(task["ids"])
        while True:
            turn(torch.cat(list(model.stream(prompt, task["new_tokens"]))).tolist())
    hardware.prepare_device(device := torch.device("cpu"))
    settings = TrainSettings.model_validate_json(json.dumps(task["settings"]))  # lists to tuples
    step = TrainStep(model, settings, device)
    while True:
        step(0, *batch(task))
        turn(step.metrics()[0]["loss"])


def trainer(task: dict, turn: Callable) -> None:
    """The loop is transformers' own: it waits for its turn in a callback."""
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield from rows

    class Turns(TrainerCallback):
        def on_step_end(self, *_, **__):
            turn(losses.pop())

    settings, losses = task["settings"], []
    inputs, targets = batch(task)
    rows = [{"input_ids": x, "labels": x, "shift_labels": y} for x, y in zip(inputs, targets)]
    model = AutoModelForCausalLM.from_pretrained(task["folder"], dtype=torch.float32)
    model.register_forward_hook(lambda *call: losses.append(call[-1].loss.detach()))
    arguments = TrainingArguments(
        f"{task['folder']}/trainer",
        per_device_train_batch_size=len(inputs),
        max_steps=10**6,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        weight_decay=settings["weight_decay"],
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        adam_epsilon=settings["eps"],
        max_grad_norm=settings["max_grad_norm"],
        optim="adamw_torch_fused",
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model, arguments, train_dataset=Batches(), callbacks=[Turns()]).train()


def litgpt(task: dict, turn: Callable) -> None:
    """litgpt's model, converted by litgpt, in the plain loop."""
    model = load_litgpt(task["folder"])
    model.lm_head.weight = model.transformer.wte.weight  # tied, as in the original
    train(model, task, turn)


def plain_loop(task: dict, turn: Callable) -> None:
    train(load_plain(Path(task["folder"])), task, turn)


def load_litgpt(folder: str) -> nn.Module:
    """litgpt's model from an exported folder. It converts a copy, which it writes."""
    from litgpt import GPT, Config
    from litgpt.scripts.convert_hf_checkpoint import convert_hf_checkpoint

    with tempfile.TemporaryDirectory(dir=folder) as copy:
        for file in ("config.json", "model.safetensors"):
            os.link(Path(folder, file), Path(copy, file))
        convert_hf_checkpoint(Path(copy), model_name="SmolLM2-135M-Instruct")
        model = GPT(Config.from_name("SmolLM2-135M-Instruct"))
        weights = torch.load(Path(copy, "lit_model.pth"), weights_only=True)
        model.load_state_dict(weights)
    return model


def load_plain(folder: Path) -> nn.Module:
    from variants import NAMES, Fused

    from workflow.proof.names import load, match_names

    model = Fused(json.loads((folder / "config.json").read_text("utf-8")))
    weights, own = load_file(folder / "model.safetensors"), dict(model.named_parameters())
    load(match_names(weights, own, NAMES), weights, own)
    return model


def batch(task: dict) -> tuple[Tensor, Tensor]:
    """Inputs and targets, (B, T) each."""
    tokens = torch.tensor(task["ids"])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def train(model: nn.Module, task: dict, turn: Callable) -> None:
    """A training loop in nanoGPT's style: no micro-batches, no log, no checkpoint."""
    settings, (inputs, targets) = task["settings"], batch(task)
    parameters = list(model.parameters())  # a tied one appears once
    matrices = [p for p in parameters if p.ndim >= 2]
    scales = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices}, {"params": scales, "weight_decay": 0.0}]
    options = {key: settings[key] for key in ("weight_decay", "betas", "eps")}
    optimizer = torch.optim.AdamW(groups, lr=settings["learning_rate"], **options, fused=True)
    while True:
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, settings["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        turn(loss)


PARTICIPANTS = {
    "this project": ours,
    "this project, bfloat16": ours,
    "transformers' Trainer": trainer,
    "litgpt": litgpt,
    "plain loop": plain_loop,
}


def main(name: str, file: str) -> None:
    task = json.loads(Path(file).read_text("utf-8"))
    torch.set_num_threads(task["threads"])
    PARTICIPANTS[name](task, Turns())


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Other programs load the exported original and compute what ours does: `make check-clients`.

    python tests/peers/clients.py                starts each program in its environment
    python tests/peers/clients.py NAME FOLDER    is such a program

One line for each. The exit code is 1 if one differs.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import torch

import worker

BOUND = 1e-4  # of logits and log-likelihoods
PAIRS = [  # of lm-eval: a text and its continuation
    ("The capital of France is", " Paris."),
    ("Water boils at", " 100 degrees Celsius, at sea level."),
    ("def add(a, b):", "\n    return a + b"),
]


# --- in the environment of a program: its results -------------------------------------------------


def litgpt_logits(folder: str, ids: torch.Tensor) -> torch.Tensor:
    return worker.load_litgpt(folder)(ids)


def transformer_lens_logits(folder: str, ids: torch.Tensor) -> torch.Tensor:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(folder, device="cpu", dtype=torch.float32)(ids)


def lm_eval_log_likelihoods(folder: str, _: torch.Tensor) -> torch.Tensor:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=1)
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(PAIRS)]
    return torch.tensor([value for value, _ in model.loglikelihood(requests)])


CLIENTS = {  # package: its environment, what it computes, and what of ours that must equal
    "litgpt": ("litgpt", litgpt_logits, "logits"),
    "transformer-lens": ("clients", transformer_lens_logits, "logits"),
    "lm-eval": ("clients", lm_eval_log_likelihoods, "log-likelihoods"),
}


@torch.no_grad()
def compare_with_ours(name: str, folder: str) -> None:
    """Prints the largest difference. Exits with 1 if it is above the bound, or NaN."""
    _, compute, what = CLIENTS[name]
    ours = torch.load(Path(folder, "ours.pt"), weights_only=True)
    difference = (compute(folder, ours["ids"]) - ours[what]).abs().max().item()
    version = importlib.metadata.version(name)
    line = f"{name} {version}: {what} differ by at most {difference:.2e}, bound {BOUND}"
    if not difference <= BOUND:
        sys.exit(f"{line}: FAILED")
    print(f"{line}: passed")


# --- in our environment ---------------------------------------------------------------------------


@torch.no_grad()
def write_ours(space) -> None:
    """Writes our results into the exported folder."""
    from workflow.reference import load_exported

    model, tokenizer, _ = load_exported(space.folder)
    ids, sums = torch.tensor([space.ids[:300]]), []
    for text, continuation in PAIRS:
        start, both = (tokenizer(each).input_ids for each in (text, text + continuation))
        chances = model(torch.tensor([both]))[0].log_softmax(dim=-1)
        sums.append(sum(chances[i - 1, both[i]] for i in range(len(start), len(both))))
    ours = {"ids": ids, "logits": model(ids), "log-likelihoods": torch.stack(sums)}
    torch.save(ours, space.folder / "ours.pt")


def check(name: str, space) -> bool:
    """Prints the line of a program. False if it differs, or cannot load the folder."""
    from compare import PEERS

    environment = PEERS / CLIENTS[name][0]
    if not (environment / ".installed").is_file():
        print(f"{name}: skipped, pip could not install it")
        return True
    command = [environment / "bin" / "python", __file__, name, space.folder]
    done = subprocess.run(command, capture_output=True, text=True)
    *_, line = (done.stderr if done.returncode else done.stdout).splitlines()
    print(line if line.startswith(name) else f"{name}: failed: {line}")
    return done.returncode == 0


def main() -> int:
    from compare import workspace
    from workflow.config import load_config

    with workspace(load_config(profile="cpu")) as space:
        write_ours(space)
        return int(not all([check(name, space) for name in CLIENTS]))


if __name__ == "__main__":
    sys.exit(main() if len(sys.argv) == 1 else compare_with_ours(*sys.argv[1:]))

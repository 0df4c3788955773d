"""llama.cpp gives the same tokens from the exported file. `make llama-cpp` installs it with npm."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from workflow.proof.checks import PROMPTS, copy_reference, encode_prompt
from workflow.proof.external import official_token_ids, stored_values
from workflow.reference.export import export

NODE = ROOT / ".cache" / "node"
NEW_TOKENS = 32
NEAR_TIE = 0.05  # llama.cpp's cache has 16 bits: it may choose the other of two close tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(
        not (NODE / ".installed").is_file(), reason="node-llama-cpp is missing: make llama-cpp"
    ),
]


def run_llama_cpp(model: Path, folder: Path, **task) -> list[list[int]]:
    (folder / "task.json").write_text(json.dumps({"threads": 2, **task}))
    result = subprocess.run(
        ["node", ROOT / "tests/reference/llama_cpp.mjs", NODE, model, folder / "task.json"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_llama_cpp_generates_the_same_tokens_from_the_exported_file(smollm2, tmp_path):
    model, strings = copy_reference(smollm2), official_token_ids(smollm2)
    export(model, smollm2.tokenizer, tmp_path / "out", gguf="F32")
    prompts = [encode_prompt(smollm2, text) for _, text in PROMPTS[:5]]
    results = run_llama_cpp(
        tmp_path / "out" / "out-F32.gguf",
        tmp_path,
        texts=[text for text, _ in strings],
        ids=[prompt[0].tolist() for prompt in prompts],
        new_tokens=NEW_TOKENS,
    )
    assert results[: len(strings)] == [ids for _, ids in strings]
    for prompt, theirs in zip(prompts, results[len(strings) :], strict=True):
        ours = model.generate(prompt, NEW_TOKENS)[0, prompt.shape[1] :].tolist()
        assert len(theirs) == NEW_TOKENS
        if ours != theirs:
            place = next(i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b)
            text = torch.cat([prompt, torch.tensor([ours[:place]], dtype=torch.long)], dim=1)
            with torch.no_grad():
                best = model(text)[0, -1].topk(2)
            assert theirs[place] == best.indices[1]
            assert best.values[0] - best.values[1] < NEAR_TIE


def test_stored_argmax_is_the_one_of_llama_cpp(smollm2, tmp_path):
    """With the wheel's file. Another processor may choose differently where tokens are close."""
    from workflow.reference.wheel import find_in_package

    stored = stored_values(smollm2)["llama_cpp"]
    file = find_in_package(smollm2.entry.wheel.file)
    (argmax,) = run_llama_cpp(file, tmp_path, judge=[stored["ids"]])
    same = sum(a == b for a, b in zip(argmax, stored["argmax"], strict=True))
    assert same >= 0.95 * len(argmax)

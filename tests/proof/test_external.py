"""Figures from outside: what is told of them, and that a wrong file or text is not believed."""

import json

import pytest
import torch

from workflow.proof import external as absolute
from workflow.proof.checks import copy_reference


def test_facts_are_of_one_file_and_say_where_they_come_from(
    smollm2, reference, monkeypatch, tmp_path
):
    facts = absolute.facts_of(smollm2)
    assert all(facts[name]["origin"] for name in ("perplexity", "llama_cpp"))
    assert absolute.facts_of(reference) is None  # random weights
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.json").write_text(
        json.dumps(facts | {"weights_sha256": "0" * 64})
    )
    monkeypatch.setattr(absolute, "FACTS", tmp_path)
    assert absolute.facts_of(smollm2) is None
    assert absolute.hard_strings(smollm2) is None


def test_the_official_ids_of_hard_strings(smollm2, reference):
    strings = absolute.hard_strings(smollm2)
    ids = dict(strings)
    assert smollm2.tokenizer.convert_ids_to_tokens(ids["a\n  5"]) == ["a", "ĊĠĠ", "5"]
    assert absolute.strings_unlike(smollm2, strings) == []
    strings[0][1] = [1, 2, 3]
    assert absolute.strings_unlike(smollm2, strings) == ["a\n  5"]
    assert absolute.hard_strings(reference) is None  # another vocabulary


def test_llama_cpp_chooses_as_we_do(smollm2):
    facts, model = absolute.facts_of(smollm2), copy_reference(smollm2)
    told = facts["llama_cpp"]
    told["ids"], told["argmax"] = told["ids"][:128], told["argmax"][:128]
    with torch.no_grad():
        share, detail = absolute.argmax_share(model, facts)
        assert share >= 0.95 and detail.endswith("of 128 positions")
        told["argmax"] = [*told["argmax"][1:], 0]
        assert absolute.argmax_share(model, facts)[0] < 0.3


def test_one_changed_tensor_is_named(smollm2, monkeypatch):
    def some(path, config):
        for name, values in smollm2.state_dict.items():
            if ".layers." not in name:
                yield name, values + 1e-6 if name == "model.norm.weight" else values

    monkeypatch.setattr(absolute, "read_tensors", some)
    unlike = absolute.tensors_unlike_gguf(smollm2)
    assert unlike[0] == "model.norm.weight"
    assert len(unlike) == 1 + 270  # those that the file does not have, too


def test_perplexity_is_told_of_the_right_text_only(config, reference, tmp_path):
    model, text = copy_reference(reference), tmp_path / "text.txt"
    text.write_text("abc " * 100)
    told = {"text": "a text", "text_sha256": "0", "window": 64, "windows": 2, "perplexity": 257.0}
    off, why = absolute.perplexity_off(model, reference, {"perplexity": told}, text)
    assert off == float("inf") and why == f"{text} is not the text of the figure, a text"
    absent = tmp_path / "absent.txt"
    off, why = absolute.perplexity_off(model, reference, {"perplexity": told}, absent)
    assert off == float("inf") and why == f"there is no file {absent}"
    _, told["text_sha256"] = absolute.read_text(text)
    off, detail = absolute.perplexity_off(model, reference, {"perplexity": told}, text)
    assert off < 100 and detail.endswith("2 windows of 64")


@pytest.mark.slow
def test_all_tensors_are_as_gguf_reads_them(smollm2):
    assert absolute.tensors_unlike_gguf(smollm2) == []

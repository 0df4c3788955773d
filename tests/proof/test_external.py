"""External values: found for the right file of weights, text and vocabulary only."""

import json

import pytest
import torch

from workflow.errors import ConfigError, DataError
from workflow.proof import copy_reference, external


def test_stored_values_are_of_one_file_and_name_their_origin(
    smollm2, reference, monkeypatch, tmp_path
):
    facts = external.facts_of(smollm2)
    assert all(facts[name]["origin"] for name in ("perplexity", "llama_cpp"))
    assert external.facts_of(reference) is None  # random weights
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.json").write_text(
        json.dumps(facts | {"weights_sha256": "0" * 64})
    )
    monkeypatch.setattr(external, "FACTS", tmp_path)
    assert external.facts_of(smollm2) is None


def test_a_missing_file_of_stored_values_is_an_error(smollm2, monkeypatch, tmp_path):
    monkeypatch.setattr(external, "FACTS", tmp_path)
    for values in (external.facts_of, external.hard_strings):
        with pytest.raises(ConfigError, match=r"json: this file of the proof is missing; restore"):
            values(smollm2)
    monkeypatch.setattr(external, "KNOWN_WEIGHTS", ())
    assert external.facts_of(smollm2) is None


def test_the_official_ids_of_hard_strings(smollm2, reference):
    strings = external.hard_strings(smollm2)
    ids = dict(strings)
    assert smollm2.tokenizer.convert_ids_to_tokens(ids["a\n  5"]) == ["a", "ĊĠĠ", "5"]
    assert external.strings_check(smollm2, strings).value == 0
    strings[0][1] = [1, 2, 3]
    check = external.strings_check(smollm2, strings)
    assert (check.value, check.detail) == (1, r"'a\n  5'")
    assert external.hard_strings(reference) is None  # another vocabulary
    assert external.strings_check(reference, None).passed is None


def test_llama_cpp_chooses_as_we_do(smollm2):
    facts, model = external.facts_of(smollm2)["llama_cpp"], copy_reference(smollm2)
    facts = {name: facts[name][:128] for name in ("ids", "argmax")}
    with torch.no_grad():
        check = external.argmax_check(model, facts)
        assert check.passed and check.detail.endswith("of 128 positions")
        facts["argmax"] = [*facts["argmax"][1:], 0]
        assert external.argmax_check(model, facts).value < 0.3


def test_one_changed_tensor_is_named(smollm2, monkeypatch):
    def some(path, config):
        for name, values in smollm2.state_dict.items():
            if ".layers." not in name:
                yield name, values + 1e-6 if name == "model.norm.weight" else values

    monkeypatch.setattr(external, "read_tensors", some)
    check = next(external.external_checks(None, smollm2, None))
    assert check.detail.startswith("model.norm.weight, ")
    assert check.value == 1 + 270  # those that the file does not have, too


def test_perplexity_is_of_the_right_text_only(reference, tmp_path):
    model, text = copy_reference(reference), tmp_path / "text.txt"
    text.write_text("abc " * 100)
    facts = {"text": "a text", "text_sha256": "0", "window": 64, "windows": 2, "perplexity": 257.0}
    assert external.perplexity_check(model, reference, facts, None).passed is None
    with pytest.raises(DataError):
        external.perplexity_check(model, reference, facts, tmp_path / "absent.txt")
    check = external.perplexity_check(model, reference, facts, text)
    assert check.value == float("inf") and check.detail == f"{text} is another text than a text"
    _, facts["text_sha256"] = external.read_text(text)
    check = external.perplexity_check(model, reference, facts, text)
    assert check.value < 100 and check.detail.endswith("2 windows of 64")


@pytest.mark.slow
def test_all_tensors_are_as_gguf_reads_them(smollm2):
    check = next(external.external_checks(None, smollm2, None))
    assert (check.value, check.detail) == (0, "all dequantised by the gguf library")

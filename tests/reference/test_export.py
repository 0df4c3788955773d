"""Export: transformers loads the folder without our code."""

import json
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from SmolLm3 import LlamaModel, ModelConfig, hf_state_dict
from test_family import MODELS, shrunk
from workflow.errors import WorkflowError
from workflow.reference.export import export
from workflow.reference.gguf_file import read_gguf
from workflow.reference.load import load_exported
from workflow.reference.wheel import repair_tokenizer


def small_model(name: str, **changes) -> LlamaModel:
    torch.manual_seed(1)
    changes = {"vocab_size": 257, **changes}
    return LlamaModel(shrunk(MODELS[name].architecture, **changes)).eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SmolLM2-135M", {"tie_word_embeddings": False}),
        ("SmolLM3-3B", {}),
        ("Llama-3.2-1B", {}),
    ],
)
def test_exported_folder_gives_the_same_logits_in_transformers(name, changes, reference, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = small_model(name, **changes)
    export(model, reference.tokenizer, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(257, (2, 30))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids))
    assert ModelConfig.from_hf(loaded.config) == model.config
    old = json.loads((tmp_path / "out" / "config.json").read_text())
    del old["rope_parameters"]  # transformers 4 does not read it
    assert ModelConfig.from_hf(old) == model.config
    text = "def f(x):\n  return 1\n"
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows it
    assert config["model_input_names"] == ["input_ids", "attention_mask"]  # no token_type_ids
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text).input_ids == reference.tokenizer(text).input_ids
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight" in stored) == (not model.config.tie_word_embeddings)
    again, tokenizer, _ = load_exported(tmp_path / "out")
    assert torch.equal(again(ids), model(ids)) and again.config == model.config
    assert tokenizer(text).input_ids == reference.tokenizer(text).input_ids


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("absent")])
def test_an_empty_folder_or_a_link_is_written_into_and_the_umask_is_used(make, reference, tmp_path):
    make(tmp_path / "out")
    inode = (tmp_path / "out").lstat().st_ino
    export(small_model("SmolLM2-135M"), reference.tokenizer, tmp_path / "out")
    assert (tmp_path / "out").lstat().st_ino == inode  # a mount cannot be replaced
    files = {file.name: file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(files) == 6 and len(set(files.values())) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "absent"}


def test_existing_folder_is_not_overwritten(reference, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(WorkflowError, match="not an empty folder; name a new one"):
        export(small_model("SmolLM2-135M"), reference.tokenizer, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_failed_export_leaves_no_files(reference, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(sys.modules["workflow.reference.export"], "save_file", fails)
    with pytest.raises(WorkflowError, match="No space left on device") as caught:
        export(small_model("SmolLM2-135M"), reference.tokenizer, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


# --- GGUF ---


@pytest.mark.parametrize(
    ("kind", "changes", "bound"),
    [
        ("F32", {"tie_word_embeddings": False}, 0.0),
        ("F16", {}, 1e-3),
        ("Q8_0", {"intermediate_size": 80}, 1e-2),  # not a multiple of 32: these rows become F16
    ],
)
def test_transformers_and_read_gguf_load_the_gguf_file(kind, changes, bound, reference, tmp_path):
    from transformers import AutoModelForCausalLM

    model = small_model("SmolLM2-135M", **changes)
    export(model, repair_tokenizer(reference.tokenizer), tmp_path / "out", gguf=kind)
    file = tmp_path / "out" / f"out-{kind}.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    theirs = dict(loaded.named_parameters())
    for name, weight in hf_state_dict(model).items():
        torch.testing.assert_close(theirs[name].detach(), weight, rtol=0, atol=bound)
    read = dict(read_gguf(file, model.config))
    assert read.keys() == theirs.keys()
    assert all(torch.equal(read[name], theirs[name]) for name in theirs)
    vectors = [tensor for tensor in gguf.GGUFReader(file).tensors if len(tensor.shape) == 1]
    assert {tensor.tensor_type.name for tensor in vectors} == {"F32"}  # llama.cpp needs this


def test_gguf_contains_the_tokenizer_and_the_name_of_the_weights(reference, tmp_path):
    tokenizer, name = repair_tokenizer(reference.tokenizer), {"name": "a random model"}
    tokenizer.chat_template = "{{ messages }}"
    model = small_model("SmolLM2-135M", vocab_size=260)  # three rows have no token
    export(model, tokenizer, tmp_path / "x", name, gguf="F32")
    normal, unused = 256 * [gguf.TokenType.NORMAL], 3 * [gguf.TokenType.UNUSED]
    fields = gguf.GGUFReader(tmp_path / "x" / "x-F32.gguf").fields
    expected = {
        "general.name": "a random model",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.token_type": [gguf.TokenType.CONTROL, *normal, *unused],
        "tokenizer.chat_template": "{{ messages }}",
    }
    assert {key: fields[key].contents() for key in expected} == expected
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(set(tokens)) == 260 and tokens[257:] == ["[PAD257]", "[PAD258]", "[PAD259]"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("SmolLM3-3B", "a model with no_rope_layers"),
        ("Llama-3.2-1B", "a model with rope_scaling"),
        ("SmolLM2-135M", "it has no name for this tokenizer's pre-tokenizer"),
    ],
)
def test_what_gguf_cannot_describe_is_refused(name, message, reference, tmp_path):
    with pytest.raises(WorkflowError, match=message):
        export(small_model(name), reference.tokenizer, tmp_path / "out", gguf="F32")
    assert list(tmp_path.iterdir()) == []

"""Export: transformers loads the folder with no code of ours."""

import json
import sys

import gguf
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from SmolLm3 import LlamaModel, ModelConfig, hf_state_dict
from test_family import MODELS, shrunk
from workflow.errors import WorkflowError
from workflow.reference.export import export
from workflow.reference.gguf_file import permute, read_tensors, stored_type
from workflow.reference.load import repair_tokenizer

NAMES = {
    "README.md",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def model_of(name: str, **changes) -> LlamaModel:
    torch.manual_seed(1)
    return LlamaModel(shrunk(MODELS[name].architecture, vocab_size=257, **changes)).eval()


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("SmolLM2-135M", {}),
        ("SmolLM2-135M", {"tie_word_embeddings": False}),
        ("SmolLM3-3B", {}),
        ("Llama-3.2-1B", {}),
    ],
)
def test_transformers_gives_identical_logits(name, changes, reference, tmp_path):
    model = model_of(name, **changes)
    export(model, reference.tokenizer, tmp_path / "out", {"name": "a test", "step": 7})
    assert NAMES <= {file.name for file in (tmp_path / "out").iterdir()}
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(257, (2, 30))
    with torch.no_grad():
        assert torch.equal(back(ids).logits, model(ids))
    assert ModelConfig.from_hf(back.config) == model.config
    old = json.loads((tmp_path / "out" / "config.json").read_text())
    del old["rope_parameters"]  # as transformers 4 reads it
    assert ModelConfig.from_hf(old) == model.config
    text = "def f(x):\n  return 1\n"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(text).input_ids == reference.tokenizer(text).input_ids
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# a test\n" in card and "| step | 7 |" in card and "| weights sha256 | " in card


def test_a_tied_head_is_stored_once(reference, tmp_path):
    export(model_of("SmolLM2-135M"), reference.tokenizer, tmp_path / "out")
    raw = (tmp_path / "out" / "model.safetensors").read_bytes()
    names = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert "lm_head.weight" not in names
    assert names.keys() - {"__metadata__"} == hf_state_dict(model_of("SmolLM2-135M")).keys()


def test_an_existing_folder_is_not_overwritten(reference, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(WorkflowError, match="not an empty folder; name a new one"):
        export(model_of("SmolLM2-135M"), reference.tokenizer, tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_a_failure_leaves_nothing_half_written(reference, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(sys.modules["workflow.reference.export"], "save_file", fails)
    with pytest.raises(WorkflowError, match="No space left on device") as caught:
        export(model_of("SmolLM2-135M"), reference.tokenizer, tmp_path / "out")
    assert caught.value.exit_code == 6
    assert list(tmp_path.iterdir()) == []


# --- GGUF ---


@pytest.fixture
def smollm_tokenizer(reference):
    """The byte tokenizer with SmolLM's pre-tokenizer."""
    return repair_tokenizer(reference.tokenizer)


@pytest.mark.parametrize(("kind", "off"), [("F32", 0.0), ("F16", 1e-3), ("Q8_0", 1e-2)])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_reads_the_gguf_back(kind, off, tied, smollm_tokenizer, tmp_path):
    model = model_of("SmolLM2-135M", tie_word_embeddings=tied)
    export(model, smollm_tokenizer, tmp_path / "out", gguf=kind)
    file = tmp_path / "out" / f"out-{kind}.gguf"
    back = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    theirs = dict(back.named_parameters())
    for name, weight in hf_state_dict(model).items():
        torch.testing.assert_close(theirs[name].detach(), weight, rtol=0, atol=off)
    read = dict(read_tensors(file, model.config))
    assert read.keys() == theirs.keys()
    assert all(torch.equal(read[name], theirs[name]) for name in theirs)


def test_the_gguf_has_the_tokenizer_and_the_name_of_the_weights(smollm_tokenizer, tmp_path):
    name = {"name": "a random model"}
    smollm_tokenizer.chat_template = "{{ messages }}"
    export(model_of("SmolLM2-135M"), smollm_tokenizer, tmp_path / "x", name, gguf="F32")
    fields = gguf.GGUFReader(tmp_path / "x" / "x-F32.gguf").fields
    assert fields["general.name"].contents() == "a random model"
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert len(fields["tokenizer.ggml.tokens"].contents()) == 257
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    assert fields["tokenizer.ggml.token_type"].contents()[:2] == [
        gguf.TokenType.CONTROL,
        gguf.TokenType.NORMAL,
    ]


def test_rows_that_q8_0_cannot_divide_are_stored_as_f16():
    rows, odd = torch.ones(3, 64), torch.ones(3, 40)
    assert [stored_type("Q8_0", each) for each in (rows, odd, rows[0])] == ["Q8_0", "F16", "F32"]
    assert [stored_type("F16", each) for each in (rows, odd, rows[0])] == ["F16", "F16", "F32"]


def test_another_tokenizer_is_not_called_smollm(reference, tmp_path):
    with pytest.raises(WorkflowError, match="cannot name how this tokenizer cuts a text"):
        export(model_of("SmolLM2-135M"), reference.tokenizer, tmp_path / "out", gguf="F32")


def test_rows_of_q_and_k_come_back_in_order():
    config = model_of("SmolLM2-135M").config
    rows = config.num_attention_heads * config.head_dim
    weight = torch.arange(rows * 3.0).view(rows, 3).numpy()
    name = "model.layers.0.self_attn.q_proj.weight"
    there = permute(name, weight, config, inverse=False)
    assert (permute(name, there, config, inverse=True) == weight).all()
    half = config.head_dim // 2  # llama.cpp's second row is the half-split layout's first of b
    assert (there[1] == weight[half]).all() and (there[2] == weight[1]).all()
    assert permute("model.layers.0.mlp.up_proj.weight", weight, config, inverse=False) is weight


@pytest.mark.parametrize(
    ("name", "field"), [("SmolLM3-3B", "no_rope_layers"), ("Llama-3.2-1B", "rope_scaling")]
)
def test_an_architecture_that_gguf_cannot_describe_is_refused(name, field, reference, tmp_path):
    with pytest.raises(WorkflowError, match=field):
        export(model_of(name), reference.tokenizer, tmp_path / "out", gguf="F32")
    assert list(tmp_path.iterdir()) == []

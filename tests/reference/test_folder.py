"""A folder, the Hub or a wheel that is not the model it should be: one line, exit code 5."""

import hashlib
import json
import math
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from conftest import fork
from workflow.config.settings import ModelEntry, Wheel
from workflow.errors import DiskError, SourceError, WorkflowError
from workflow.proof.checks import copy_reference, run_checks
from workflow.proof.compared import Comparison, OurModel
from workflow.reference import export
from workflow.reference.folder import KNOWN_KEYS
from workflow.reference.load import load_reference
from workflow.reference.wheel import repair_tokenizer

NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-0000{part}-of-00002.safetensors" for part in (1, 2)]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("kind", ["llama", "smollm3"])
def test_the_keys_of_transformers_are_known(kind):
    assert AutoConfig.for_model(kind).to_dict().keys() <= KNOWN_KEYS


@pytest.fixture
def folder(reference, tmp_path) -> Path:
    """The tiny model of the ci profile, exported."""
    return export(copy_reference(reference), reference.tokenizer, tmp_path / "exported")


@pytest.fixture
def refusal(folder, config):
    """The message of loading `folder`, which must fail."""

    def load() -> str:
        with pytest.raises(SourceError, match=r"^[^;]+: [^;]+; ") as caught:
            load_reference(str(folder), config.model_entry)
        assert caught.value.exit_code == 5
        return str(caught.value)

    return load


def edit_tensors(folder: Path, **changes) -> None:
    """Replaces the norm, the head or other tensors; None deletes."""
    names = {"norm": NORM, "head": HEAD}
    tensors = load_file(folder / WEIGHTS) | {names.get(k, k): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# --- tensors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm": None}, f"{NORM} is missing"),
        ({"other": torch.zeros(32)}, "other is extra"),
        ({"norm": torch.ones(33)}, f"{NORM} has shape (33,), expected (32,)"),
        ({"norm": torch.ones(32).int()}, f"{NORM} has dtype torch.int32"),
        ({"norm": torch.tensor([1.0] * 31 + [math.nan])}, f"{NORM} has NaN or infinite values"),
        ({"norm": torch.tensor([-math.inf] + [1.0] * 31)}, f"{NORM} has NaN or infinite values"),
        ({"head": torch.zeros(257, 32)}, f"{HEAD} is tied, but differs from {EMBEDDING}"),
    ],
)
def test_tensors_that_are_not_the_models_are_named(folder, refusal, changes, words):
    edit_tensors(folder, **changes)
    assert words in refusal()


def test_of_many_wrong_names_the_first_are_in_the_message(folder, refusal):
    tensors = load_file(folder / WEIGHTS)
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    assert f"{folder}: {EMBEDDING} is missing, " in refusal()
    assert " and 37 more; get the files again, or choose another source" in refusal()


@pytest.mark.parametrize("words", [["generate", "x"], ["train"]])
def test_every_command_refuses_wrong_tensors_before_it_computes(refused, here, project, words):
    assert here("export", "reference", "model")[0] == 0
    edit_tensors(project / "model", norm=None)
    line = refused(5, *words, settings=["reference.source=model"])
    assert line == f"error: model: {NORM} is missing; get the files again, or choose another source"
    assert not list(project.glob("checkpoints/*/*.pt"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_tied_head_in_the_file_is_accepted_and_16_bits_are_read(folder, config, reference, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    edit_tensors(folder, **tensors, head=tensors[EMBEDDING].clone())
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


def test_what_transformers_loads_is_compared_with_the_file(refusal, other_weights):
    assert f"transformers loaded another {NORM}; install" in refusal()


@torch.no_grad()
def test_the_proof_compares_the_copy_with_the_file(folder, config):
    loaded = load_reference(str(folder), config.model_entry)
    model = copy_reference(loaded)
    for norm in (model.norm, loaded.model.model.norm):  # the same change in both
        norm.weight[0] += 1
    settings = config.proof.model_copy(update={"quick": True})
    comparison = Comparison(OurModel(model), loaded, model, settings, "Once upon a time")
    first = islice(run_checks(comparison), 8)
    checks = {check.name: check for check in first}
    assert checks["tensor values match"].detail == NORM


# --- files ----------------------------------------------------------------------------------------


def split(folder: Path) -> None:
    """Divides the weights into two shards with an index."""
    tensors = load_file(folder / WEIGHTS)
    places = {name: SHARDS[name == NORM] for name in tensors}
    for file in SHARDS:
        save_file({k: v for k, v in tensors.items() if places[k] == file}, folder / file)
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_shards_are_read(folder, config, reference):
    split(folder)
    loaded = load_reference(str(folder), config.model_entry)
    assert loaded.provenance.weights_sha256 == reference.provenance.weights_sha256


@pytest.mark.parametrize(
    ("name", "change", "words"),  # change: another content, a new length, or None: deleted
    [
        (WEIGHTS, POINTER, ": it is a git-LFS pointer, not the file itself; type: git lfs pull"),
        (WEIGHTS, 5000, ": it cannot be read ("),
        (WEIGHTS, None, "exported: there is no model.safetensors in this folder; name a"),
        (SHARDS[1], None, ": there is no such file"),
        (INDEX, "{", ": it cannot be read ("),
        ("generation_config.json", "[]", "exported: it cannot be read ('list' object"),
        ("tokenizer.json", None, ": there is no such file; get it again"),
        ("tokenizer.json", "{}", ": it cannot be read ("),
        ("config.json", "{", ": it cannot be read (Expecting property name"),
        ("config.json", "[]", ": it cannot be read (not an object)"),
        ("config.json", '{"model_type": "llama", "hidden_size": "x"}', ": it cannot be read ("),
        ("config.json", '{"model_type": "x"}', ": model_type is 'x': LlamaModel supports only"),
    ],
)
def test_bad_folder_is_one_line(folder, refusal, name, change, words):
    if name in (SHARDS[1], INDEX):
        split(folder)
    if isinstance(change, str):
        (folder / name).write_text(change)
    else:
        (folder / name).unlink() if change is None else os.truncate(folder / name, change)
    assert (words if words.startswith("exported") else f"{name}{words}") in refusal()


# --- keys of config.json --------------------------------------------------------------------------


# by SmolLM2-135M and -Instruct, besides the architecture
RELEASED = json.loads("""{"is_llama_config": true, "pretraining_tp": 1, "rope_interleaved": false,
"rope_scaling": null, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "use_cache": true}""")
OFF = {"attn_logit_softcapping": None, "num_experts": 0, "use_qk_norm": False, "logits_scaling": 1}
OFF["is_causal"] = True
REFUSED = json.loads("""{"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0,
"use_qk_norm": true, "norm_type": "layer", "logits_scaling": 8, "logit_scale": 0.1,
"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "attention_multiplier": 0.5,
"query_pre_attn_scalar": 256, "sliding_window": 4096, "use_sliding_window": true,
"attention_chunk_size": 8192, "num_experts": 2, "num_local_experts": 1, "resid_mult": 0.3,
"temperature_tuning": true, "partial_rotary_factor": 0.5, "rotary_pct": 0.25, "clip_qkv": 8.0,
"parallel_residual": true, "is_causal": false, "use_alibi": true, "rope_interleaved": true,
"quantization_config": {"quant_method": "gptq"}, "hidden_activation": "gelu",
"embedding_size": 64}""")
# other values of the keys that an exported config has
OTHER = json.loads("""{"vocab_size": 256, "hidden_size": 64, "intermediate_size": 32,
"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 4, "head_dim": 16,
"max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 500.0, "hidden_act": "gelu",
"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
"rope_scaling": {"type": "dynamic", "factor": 4.0}, "attention_bias": true, "mlp_bias": true,
"tie_word_embeddings": false, "attention_dropout": 0.5, "model_type": "qwen3",
"architectures": ["MistralForCausalLM"], "dtype": "bfloat16", "use_cache": false,
"initializer_range": 0.5, "pretraining_tp": 2, "eos_token_id": 7}""")


@pytest.mark.parametrize(
    ("keys", "unknown"),
    [(RELEASED | OFF, ""), ({"unsloth_version": "1", "author": "me"}, "unsloth_version, author")],
)
def test_harmless_keys_are_at_most_one_line(folder, config, capsys, keys, unknown):
    edit_config(folder, **keys)
    load_reference(str(folder), config.model_entry)
    note = f"Note: unknown keys in {folder}/config.json are ignored: {unknown}\n" * bool(unknown)
    assert capsys.readouterr().out.startswith(f"{note}Reference: exported")


def test_config_cannot_change_what_transformers_returns_and_which_attention_it_uses(folder, config):
    edit_config(folder, return_dict=False, _attn_implementation="eager")
    model = load_reference(str(folder), config.model_entry).model
    assert model.config._attn_implementation == "sdpa"
    assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 257)


@pytest.mark.parametrize(("key", "value"), REFUSED.items())
def test_key_of_a_computation_that_the_model_lacks_is_refused(folder, refusal, key, value):
    edit_config(folder, **{key: value})
    assert f"{key} is {value!r}: LlamaModel " in refusal()


def test_unknown_key_of_the_rotation_is_refused(folder, refusal):
    edit_config(folder, rope_parameters={"rope_type": "default", "mrope_section": [1, 2]})
    assert "mrope_section is [1, 2]: LlamaModel " in refusal()


@pytest.mark.slow
@torch.no_grad()
def test_a_changed_key_is_refused_or_changes_nothing(wide_reference, tmp_path):
    original, ids = copy_reference(wide_reference), torch.arange(40)[None]
    folder = export(original, wide_reference.tokenizer, tmp_path / "exported")
    file, expected = folder / "config.json", original(ids)
    values = json.loads(file.read_text())
    for key in values:
        for value in (..., OTHER.get(key, "other"), None, -1, "8"):  # ...: without this key
            changed = values | {key: value}
            file.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))
            try:
                loaded = load_reference(str(folder), wide_reference.entry)
            except WorkflowError as error:
                assert error.exit_code in (2, 5) and "\n" not in str(error)
                assert any(w in str(error) for w in (key, "config.json", "rope_type")), error
                continue
            theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for logits in (theirs(ids).logits, copy_reference(loaded)(ids)):
                torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


# --- converted weights ----------------------------------------------------------------------------


@pytest.fixture
def wheel(reference, tmp_path, monkeypatch):
    """Loads the tiny model from an installed package with a GGUF file."""
    folder, file = tmp_path / "tiny_wheel", "tiny_wheel/tiny_wheel-F32.gguf"
    export(copy_reference(reference), repair_tokenizer(reference.tokenizer), folder, gguf="F32")
    digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()
    (tmp_path / "tiny_wheel-1.0.dist-info").mkdir()
    metadata = tmp_path / "tiny_wheel-1.0.dist-info" / "METADATA"
    metadata.write_text("Name: tiny_wheel\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    row = {"package": "tiny_wheel", "version": "1.0", "name": "tiny, F32", "sha256": digest}
    entry = ModelEntry(architecture=reference.config, wheel=Wheel(file=file, **row))
    return lambda: load_reference("wheel", entry, cache=tmp_path / "cache")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)


def as_if_converted_to(folder: Path, name: str) -> None:
    file = folder / "sha256.json"
    file.write_text(file.read_text().replace(folder.name, name))


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: flip_a_bit(folder / WEIGHTS),
        lambda folder: (folder / "sha256.json").unlink(),
        lambda folder: (folder / INDEX).touch(),
        lambda folder: as_if_converted_to(folder, "another"),
    ],
)
def test_converted_files_that_changed_are_converted_again(wheel, damage, capsys):
    first, again = wheel(), "is damaged, incomplete or old: it is converted again\n"
    damage(first.folder)
    capsys.readouterr()
    assert wheel().provenance == first.provenance
    assert capsys.readouterr().out.count(again) == 1
    assert wheel().provenance == first.provenance
    assert capsys.readouterr().out.startswith("Reference: ")  # only read


@pytest.mark.parametrize("file_size", [None, 50_000])
def test_disk_that_cannot_be_written_is_one_line(wheel, tmp_path, resource, file_size):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, limits[1]))
    else:
        (tmp_path / "cache").touch()  # a file in the way
    try:
        with pytest.raises(DiskError, match=r"written \(.+\).*--set paths\.cache=PATH"):
            wheel()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.glob("cache/reference/*/"))  # a lock may be there


def test_file_of_the_wheel_with_another_hash_is_refused(wheel, tmp_path):
    flip_a_bit(tmp_path / "tiny_wheel" / "tiny_wheel-F32.gguf")
    with pytest.raises(SourceError, match=r"hash is not that of tiny_wheel 1\.0; type: pip"):
        wheel()


def test_what_transformers_reads_from_gguf_is_compared_with_the_file(wheel, other_weights):
    with pytest.raises(SourceError, match=f"gguf: transformers loaded another {NORM}; install"):
        wheel()


def test_processes_convert_a_file_only_once(wheel):
    processes = [fork(lambda: wheel() and None) for _ in range(3)]
    codes, outputs = zip(*(process.finish() for process in processes))
    assert codes == (0, 0, 0)
    assert "".join(outputs).count("Converting tiny") == 1
    assert "damaged" not in "".join(outputs)

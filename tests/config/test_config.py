"""The YAML file becomes settings, or one clear line."""

import re

import pytest

from conftest import ROOT
from SmolLm3 import ModelConfig
from workflow.config import load_config, parse_yaml
from workflow.errors import ConfigError, WorkflowError

YAML = ROOT / "SmolLm3_Config.yaml"


@pytest.mark.parametrize("profile", ["full", "pretrain", "cpu", "quick", "ci"])
def test_every_profile_is_complete(profile):
    config = load_config(YAML, profile)
    assert (config.train.steps, config.train.resume_steps) == (5000, 50)
    assert config.train.schedule_steps >= config.last_step
    assert isinstance(config.model_entry.architecture, ModelConfig)


def test_one_line_changes_architecture_and_source_together():
    for model, theta, context in (("SmolLM2-135M", 1e5, 8192), ("SmolLM-135M", 1e4, 2048)):
        changes = [f"model={model}", f"train.model={model}"]
        config = load_config(YAML, "cpu", changes)
        assert config.model_entry.hub_id == f"HuggingFaceTB/{model}"
        assert config.train_architecture.rope_theta == theta
        assert config.train_architecture.max_position_embeddings == context


def test_profile_comes_from_the_argument_then_the_environment_then_a_look_at_the_machine(
    monkeypatch,
):
    monkeypatch.setenv("SMOLLM_PROFILE", "cpu")
    assert load_config(YAML, "ci").profile == "ci"
    assert load_config(YAML).profile == "cpu"
    monkeypatch.delenv("SMOLLM_PROFILE")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    chosen = load_config(YAML)
    assert chosen.profile == "quick"
    assert "no CUDA GPU was found" in str(chosen)
    assert "PROFILE=cpu" in str(chosen)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert load_config(YAML).profile == "full"


def test_overrides_come_from_the_environment_then_from_the_argument_and_are_printed(monkeypatch):
    monkeypatch.setenv("SMOLLM_SET", "train.steps=7 'data.source=my texts'")
    config = load_config(YAML, "ci")
    assert (config.train.steps, config.data.source) == (7, "my texts")
    assert "changed: train.steps=7, data.source=my texts" in str(config)
    assert load_config(YAML, "ci", ["train.steps=9"]).train.steps == 9
    monkeypatch.setenv("SMOLLM_SET", "train.steps='7")
    with pytest.raises(WorkflowError, match="SMOLLM_SET: No closing quotation; write"):
        load_config(YAML, "ci")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", "train.stepz: there is no such key; did you mean steps?"),
        ("train.clip_norm=1", "there is no such key; did you mean max_grad_norm?"),
        ("breaking.steps=1", "breaking: there is no such key; did you mean mutations?"),
        ("models.tiny.architecture.hidden_sise=3", "key; did you mean hidden_size?"),
        ("train.steps=abc", "train.steps: 'abc' does not fit: Input should be a valid integer"),
        ("train.steps=1.5", "train.steps: 1.5 does not fit"),
        ("train.steps=!!binary aGk=", "train.steps: \"b'hi'\" does not fit"),
        ("train.steps='3'", "train.steps: '3' does not fit"),
        ("train.steps=-3", "train.steps: -3 does not fit"),
        ("train.steps=", "train.steps: None does not fit"),
        ("train.learning_rate=.nan", "train.learning_rate: nan does not fit"),
        ("train.warmup_steps=true", "train.warmup_steps: True does not fit"),
        ("train=3", "train: 3 does not fit"),
        ("run.device=tpu", "run.device: 'tpu' does not fit"),
        ("run.device=cuda", "run.device is cuda, but torch finds no CUDA GPU here"),
        ("models.tiny.architecture.hidden_size=33", "hidden_size 33 is not divisible"),
        ("train.model=nope", "train.model is 'nope', which is no row of models: SmolLM2-135M"),
        ("train.model=small", "vocab_size 49152, the tokenizer of 'tiny' has 257"),
        ("train.sequence_length=1024", "is 1024, more than max_position_embeddings = 512"),
        ("train.decay_steps=6000", "is 6000, more than schedule_steps - warmup_steps = 4950"),
        ("train.validation_tokens=10", "sequence_length is 32, more than validation_tokens = 10"),
        ("train.batch_size=999999999", "is 31999999968, more than 2^24 = 16777216"),
        ("smoke_test.save_at=10", "smoke_test.save_at is 10, more than smoke_test.steps - 1 = 9"),
        ("nonsense", "--set nonsense: this is not key=value"),
    ],
)
def test_a_wrong_setting_is_one_line_with_key_value_and_fix(override, words, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        load_config(YAML, "ci", [override])
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("010", 10),
        ("0o17", 15),
        ("no", "no"),
        ("true", True),
        ("-2", -2),
        (".5", 0.5),
        ("~", None),
    ],
)
def test_yaml_scalars_are_read_as_written(text, value):
    read = parse_yaml(text, "here")
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"a: 1\nb: 2\na: 3\n", 'line 3: this is not valid YAML here: found duplicate key "a"'),
        (b"a: [1, 2\n", "this is not valid YAML here"),
        (b"- 1\n- 2\n", "it holds a list, expected a table"),
        (b"", "it holds nothing"),
        (b"a: \xff\n", "it cannot be read: 'utf-8' codec can't decode byte 0xff in position 3"),
        (b"profiles: {ci: 3}\n", "there is no profile 'ci'; choose one of ci; each is a table"),
        (b"profiles: [1]\n", "there is no profile 'ci'"),
        (b"profiles: {ci: {}}\n? [b]\n: 2\n", "keys are words"),
        (b"profiles: {ci: {}}\na: &a [*a]\n", "no table contains itself"),
        (b"a: !!python/object:os.system {}\n", "this is not valid YAML here"),
    ],
)
def test_a_file_that_is_no_table_of_settings_is_refused(tmp_path, content, words):
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(WorkflowError, match=re.escape(words)):
        load_config(tmp_path / "config.yaml", "ci")


def test_an_absent_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"it cannot be read: .*No such file.*; run from the"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["!!int a", "!!float ''", "!!bool x", "9" * 5000, "[" * 3000])
def test_a_value_that_is_not_what_its_tag_says_is_refused(text):
    with pytest.raises(ConfigError, match=r"^here: this is not valid YAML here: .*; fix that line"):
        parse_yaml(text, "here")


def test_anchors_and_merge_keys_are_understood():
    assert parse_yaml("a: &a {b: 1}\nc: *a\nd: {<<: *a, e: 2}", "here")["d"] == {"b": 1, "e": 2}


def test_a_run_is_named_after_all_that_determines_it():
    name = load_config(YAML, "ci").run_name("data")
    assert re.fullmatch(r"ci-[0-9a-f]{8}", name)
    assert load_config(YAML, "ci", ["paths.runs=elsewhere"]).run_name("data") == name
    assert load_config(YAML, "ci", ["train.learning_rate=1e-4"]).run_name("data") != name
    assert load_config(YAML, "ci", ["run.seed=2"]).run_name("data") != name
    assert load_config(YAML, "ci").run_name("other data") != name
    assert load_config(YAML, "ci", ["run.name=mine"]).run_name("data") == "mine"


def test_fresh_starts_a_run_beside_the_old_one(monkeypatch):
    name = load_config(YAML, "ci").run_name("data")
    monkeypatch.setenv("FRESH", "1")
    config = load_config(YAML, "ci")
    assert config.run_name("data").startswith(f"{name}-")
    assert config.run_name("data") == config.run_name("data")

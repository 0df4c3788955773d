"""Loading the settings: the YAML, a profile and overrides."""

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


def test_model_selects_architecture_and_hub_id():
    for model, theta, context in (("SmolLM2-135M", 1e5, 8192), ("SmolLM-135M", 1e4, 2048)):
        config = load_config(YAML, "cpu", [f"model={model}"])
        assert config.model_entry.hub_id == f"HuggingFaceTB/{model}"
        assert config.train_architecture.rope_theta == theta
        assert config.train_architecture.max_position_embeddings == context


def test_profile_is_chosen_by_argument_then_environment_then_gpu(monkeypatch):
    monkeypatch.setenv("SMOLLM_PROFILE", "cpu")
    assert load_config(YAML, "ci").profile == "ci"
    assert load_config(YAML).profile == "cpu"
    monkeypatch.delenv("SMOLLM_PROFILE")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    config = load_config(YAML)
    assert config.profile == "quick"
    assert "no CUDA GPU was found" in str(config) and "PROFILE=cpu" in str(config)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert load_config(YAML).profile == "full"


def test_overrides_come_from_environment_then_argument_and_are_printed(monkeypatch):
    monkeypatch.setenv("SMOLLM_SET", "train.steps=7 'data.source=my texts'")
    config = load_config(YAML, "ci")
    assert (config.train.steps, config.data.source) == (7, "my texts")
    assert "changed: train.steps=7, data.source=my texts" in str(config)
    assert load_config(YAML, "ci", ["train.steps=9"]).train.steps == 9
    monkeypatch.setenv("SMOLLM_SET", "train.steps='7")
    with pytest.raises(WorkflowError, match="SMOLLM_SET: No closing quotation; write"):
        load_config(YAML, "ci")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "train.stepz: there is no such key; did you mean steps?"),
        ("breaking.steps=1", "breaking: there is no such key; did you mean mutations?"),
        ("models.tiny.architecture.hidden_sise=3", "key; did you mean hidden_size?"),
        ("train.steps=abc", "train.steps: 'abc' does not fit: Input should be a valid integer"),
        ("train.steps='3'", "train.steps: '3' does not fit"),
        ("train.steps=-3", "train.steps: -3 does not fit"),
        ("train.learning_rate=.inf", "train.learning_rate: inf does not fit"),
        ("train=3", "train: 3 does not fit"),
        ("run.device=tpu", "run.device: 'tpu' does not fit"),
        ("run.device=cuda", "run.device is cuda, but torch finds no CUDA GPU here"),
        ("models.tiny.architecture.hidden_size=33", "hidden_size 33 is not divisible"),
        ("train.model=nope", "train.model is 'nope', which is not a row of models: SmolLM2-135M"),
        ("train.model=small", "vocab_size 49152, the tokenizer of 'tiny' has 257"),
        ("train.sequence_length=1024", "is 1024, more than max_position_embeddings = 512"),
        ("train.decay_steps=6000", "is 6000, more than schedule_steps - warmup_steps = 4950"),
        ("train.validation_tokens=10", "sequence_length is 32, more than validation_tokens = 10"),
        ("train.batch_size=999999999", "is 31999999968, more than 2^24 = 16777216"),
        ("smoke_test.save_at=10", "smoke_test.save_at is 10, more than smoke_test.steps - 1 = 9"),
        ("nonsense", "--set nonsense: this is not key=value"),
    ],
)
def test_invalid_setting_is_one_line_with_key_value_and_fix(override, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(YAML, "ci", [override])
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_yaml_is_read_as_version_1_2():
    assert parse_yaml("[1e-3, 010, no, true]", "here") == [0.001, 10, "no", True]


INVALID = "this is not valid YAML here"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it cannot be read: "),
        (b"a: \xff\n", "it cannot be read: 'utf-8' codec can't decode byte 0xff in position 3"),
        (b"", "it contains nothing"),
        (b"a: 1\nb: 2\na: 3\n", f'line 3: {INVALID}: found duplicate key "a"'),
        (b"a: !!python/object:os.system {}\n", INVALID),
        (b"a: !!bool x\n", INVALID),
        (b"a: " + b"9" * 5000, INVALID),
        (b"a: " + b"[" * 600, INVALID),
        (b"profiles: {ci: 3}\n", "there is no profile 'ci'; choose one of ci; each is a table"),
        (b"profiles: [1]\n", "there is no profile 'ci'"),
        (b"profiles: {ci: {}}\n? [b]\n: 2\n", "use text as keys"),
        (b"profiles: {ci: {}}\na: &a [*a]\n", "no table that contains itself"),
    ],
)
def test_invalid_yaml_file_is_refused(tmp_path, content, message):
    file = tmp_path / "config.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(WorkflowError, match=re.escape(message)):
        load_config(file, "ci")


def test_run_name_depends_on_everything_that_changes_numbers_and_on_fresh(monkeypatch):
    def name(*overrides: str, data: str = "data") -> str:
        return load_config(YAML, "ci", overrides).run_name(data)

    assert re.fullmatch(r"ci-[0-9a-f]{8}", name())
    assert name("paths.runs=elsewhere") == name()
    others = {name("train.learning_rate=1e-4"), name("run.seed=2"), name(data="other data")}
    assert len(others | {name()}) == 4
    assert name("run.name=mine") == "mine"
    monkeypatch.setenv("FRESH", "1")
    assert re.fullmatch(r"mine-\d{8}-\d{6}", name("run.name=mine"))

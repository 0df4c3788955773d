"""Loading the settings: the YAML, a profile and overrides."""

import re
import shlex
from pathlib import Path

import pytest

from conftest import ROOT
from workflow.config import load_config, parse_yaml
from workflow.errors import ConfigError, WorkflowError

YAML = ROOT / "SmolLm3_Config.yaml"


@pytest.mark.parametrize("profile", ["full", "pretrain", "cpu", "quick", "ci"])
def test_every_profile_is_complete(profile):
    train = load_config(YAML, profile).train
    assert (train.steps, train.resume_steps, train.schedule_steps) == (5000, 50, 5050)


def test_the_schedule_is_a_share_of_the_run_or_a_number():
    train = load_config(YAML, "pretrain", ["train.steps=1000", "train.resume_steps=100"]).train
    assert (train.warmup_steps, train.schedule_steps, train.decay_steps) == (1, 1100, 220)
    changes = "train.steps=60", "train.warmup_steps=12.5%", "train.schedule_steps=200"
    train = load_config(YAML, "ci", [*changes, "train.decay_steps=50", "train.decay=linear"]).train
    assert (train.warmup_steps, train.schedule_steps, train.decay_steps) == (8, 200, 50)


def test_the_header_has_the_values_in_force_and_what_the_profile_overrides(monkeypatch):
    header = str(load_config(YAML, "quick", ["train.steps=60", "train.decay_steps=20%"]))
    assert "It overrides the YAML's base section in proof.quick, train.model, train.init" in header
    assert "; 60 + 50 steps of 1 × 64 tokens train small from random weights on " in header
    rates = "up to 0.002 at step 1, then cosine from step 88 to 0.0002 at step 110"
    assert f"Learning rate: {rates}" in header


def test_settings_of_a_run_replace_the_profile_but_overrides_come_last(monkeypatch):
    run = load_config(YAML, "quick", ["train.steps=60", "data.source=a #1", "paths.runs=/r"])
    saved = run.model_dump(mode="json")
    monkeypatch.setenv("SMOLLM_PROFILE", "ci")
    assert load_config(YAML, None, (), saved).model_dump() == run.model_dump()
    longer = load_config(YAML, "quick", ["train.steps=90"], saved).train
    assert (longer.steps, longer.warmup_steps, longer.schedule_steps) == (90, 1, 110)
    with pytest.raises(ConfigError, match="--profile ci: this run has the profile quick; omit it"):
        load_config(YAML, "ci", (), saved)


@pytest.mark.parametrize(
    ("key", "typed", "value"),
    [
        ("data.source", "~/$NAME/a: b", "/home/me/texts/a: b"),
        ("sample.prompt", "Issue # 5, ~", "Issue # 5, ~"),
        ("data.name", "null", None),
        ("proof.wikitext_file", "~/test.txt", Path("/home/me/test.txt")),
        ("evaluation.texts", "a #1.txt", (Path("a #1.txt"),)),
        ("evaluation.texts", "[a.txt, ~/b.txt]", (Path("a.txt"), Path("/home/me/b.txt"))),
        ("train.learning_rate", "1e-3", 1e-3),
        ("train.betas", "[0.5, 0.6]", (0.5, 0.6)),
        ("models.tiny.architecture.rope_theta", "5e4", 5e4),
        ("run.name", "1e5", "1e5"),
    ],
)
def test_an_override_is_taken_as_it_was_typed(key, typed, value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("NAME", "texts")
    found = load_config(YAML, "ci", [f"{key}={typed}"])
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == value


def test_paths_of_the_yaml_are_expanded_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "my.yaml").write_text(YAML.read_text().replace("cache: .cache", "cache: ~/cache"))
    assert load_config(tmp_path / "my.yaml", "ci").paths.cache == Path("/home/me/cache")


def test_a_key_that_only_the_profile_has_can_have_shares(tmp_path):
    text = YAML.read_text("utf-8").replace("  learning_rate: 2e-5", "  # learning_rate", 1)
    (tmp_path / "changed.yaml").write_text(text, "utf-8")
    settings = load_config(tmp_path / "changed.yaml", "ci").train
    assert (settings.learning_rate, settings.min_learning_rate) == (3e-3, pytest.approx(3e-4))
    with pytest.raises(ConfigError, match=r"train\.learning_rate: this key is missing"):
        load_config(tmp_path / "changed.yaml", "cpu")


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
    with pytest.raises(ConfigError, match=r"^--set train=null: this key is missing"):
        load_config(YAML, "ci", ["train=null", "train.steps=9"])  # the second keeps the first
    monkeypatch.setenv("SMOLLM_SET", "train.steps='7")
    with pytest.raises(WorkflowError, match="SMOLLM_SET: No closing quotation; write"):
        load_config(YAML, "ci")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", ": there is no such key; did you mean train.steps?"),
        ("learning_rate=1e-3", ": there is no such key; did you mean train.learning_rate?"),
        ("train.new_token=3", ": there is no such key; did you mean sample.new_tokens?"),
        ("train.beta=[0.5, 0.6]", ": there is no such key; did you mean train.betas?"),
        ("models.tiny.architecture.hidden_sise=3", "mean models.tiny.architecture.hidden_size?"),
        ("zzz=3", ": there is no such key; remove it"),
        ("train.steps=abc", ": 'abc' does not fit: Input should be a valid integer"),
        ("train.steps=-3", ": -3 does not fit"),
        ("train.warmup_steps=2 %", ": '2 %' does not fit"),
        ("train.learning_rate=.inf", ": inf does not fit"),
        ("run.device=tpu", ": 'tpu' does not fit"),
        ("run.name=exp/1", ": 'exp/1' does not fit: String should match pattern"),
        ("paths.runs=", ": it is empty; write a path"),
        ("evaluation.texts=[3]", ": 3 does not fit"),
        ("run.device=cuda", "run.device is cuda, but torch finds no CUDA GPU here"),
        ("models.tiny.architecture.hidden_size=33", "hidden_size 33 is not divisible"),
        ("model=SmolLM2-135", "there is no such model; did you mean SmolLM2-135M?"),
        ("train.model=smal", "train.model is 'smal', there is no such model; did you mean small?"),
        ("train.model=small", "vocab_size 49152, the tokenizer of model 'tiny' has 257"),
        ("train.sequence_length=1024", "is 1024, more than the context of model tiny = 512"),
        ("proof.new_tokens=213", "is 213, more than the context of model tiny - 300 = 212"),
        ("mutations.tokens=513", "is 513, more than the context of model tiny = 512"),
        ("train.decay_steps=6000", "more than train.schedule_steps - train.warmup_steps = 4950"),
        ("train.min_learning_rate=1", "is 1.0, more than train.learning_rate = 0.003; change one"),
        ("train.validation_tokens=10", "is 32, more than train.validation_tokens = 10; change one"),
        ("train.micro_batch_size=2", "batch_size 1 is not a multiple of train.micro_batch_size 2"),
        ("smoke_test.save_at=10", "smoke_test.save_at is 10, more than smoke_test.steps - 1 = 9"),
        ("nonsense", ": this is not key=value"),
    ],
)
def test_invalid_setting_is_one_line_with_key_value_and_fix(override, message, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_config(YAML, "ci", [override])
    assert str(caught.value).startswith(f"--set {override}: ") and "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    monkeypatch.setenv("SMOLLM_SET", shlex.quote(override))
    with pytest.raises(ConfigError, match=re.escape(f"SMOLLM_SET {override}: ")):
        load_config(YAML, "ci")


def test_yaml_is_read_as_version_1_2():
    assert parse_yaml("[1e-3, 010, no, true]", "here") == [0.001, 10, "no", True]


INVALID = "this is not valid YAML here"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "it cannot be read: "),
        (b"a: \xff\n", "it cannot be read: 'utf-8' codec can't decode byte 0xff in position 3"),
        (b"", "it is no table of settings"),
        (b"a: 1\nb: 2\na: 3\n", f'line 3: {INVALID}: found duplicate key "a"'),
        (b"a: !!bool x\n", INVALID),
        (b"a: " + b"[" * 600, INVALID),
        (b"profiles: [ci]\n", "config.yaml: profiles: it is no table; see the project's own YAML"),
        (b"profiles: {ci: 3}\n", "profile ci (as requested): there is no such profile; choose one"),
        (b"profiles: {ci: {}}\n5: a\n6: b\n", "config.yaml: 5: there is no such key; remove it"),
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

"""Sampling equals that of transformers; text comes in pieces, and ends where it should."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from SmolLm3 import LlamaModel, token_probabilities
from workflow.analysis import prepare_for_generation, prompt_ids, sampling_options, stream_text
from workflow.errors import WorkflowError


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (1.0, None, 1.0, 0.0),
        (0.3, None, 1.0, 0.0),
        (1.7, 5, 1.0, 0.0),
        (1.0, 1, 1.0, 0.0),
        (1.0, 1000, 1.0, 0.0),  # more than there are
        (1.0, None, 0.9, 0.0),
        (1.0, None, 1e-9, 0.0),
        (2.0, None, 1.0, 0.05),
        (1.0, None, 1.0, 1.0),
        (0.8, 50, 0.95, 0.02),
    ],
)
def test_probabilities_are_those_of_transformers(temperature, top_k, top_p, min_p):
    logits = 4 * torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    logits[0] = 0.0  # all alike
    logits[1, :50] = logits[1].max()  # ties at the top
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(None, logits.clone()).softmax(dim=-1)
    ours = token_probabilities(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert torch.equal(ours > 0, expected > 0)


@pytest.fixture
def model(config):
    torch.manual_seed(0)
    return LlamaModel(config.model_entry.architecture)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0, it must be 1 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0, it must be above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p is -0.1, it must be from 0 to 1"),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(model, options, words):
    with pytest.raises(ValueError, match=words):
        model.generate(torch.tensor([[1, 2]]), 3, **options)


def test_same_seed_same_text_with_every_filter(model):
    prompt = torch.tensor([[5, 6, 7]])
    options = {"temperature": 1.5, "top_k": 100, "top_p": 0.99, "min_p": 0.001}
    texts = [
        model.generate(prompt, 30, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (3, 3, 4)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])


def test_top_k_of_one_is_greedy(model):
    prompt = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.generate(prompt, 20, 1.0, top_k=1), model.generate(prompt, 20))


def pieces(model, tokenizer, prompt: str, ids: list[int]) -> list[str]:
    """What is shown of a model that generates exactly `ids`."""
    model.stream = lambda *_, **options: iter(torch.tensor(ids)[:, None])
    prompt = prompt_ids(tokenizer, prompt, chat=False)
    return list(stream_text(model, tokenizer, prompt, len(ids), {}))


@pytest.mark.parametrize("prompt", ["x", "é", "\ufffd"])
def test_an_incomplete_character_waits_for_the_rest(model, reference, prompt):
    ids = reference.tokenizer.backend_tokenizer.encode("né!").ids
    assert len(ids) == 4
    assert pieces(model, reference.tokenizer, prompt, ids) == ["n", "é", "!"]


@pytest.mark.parametrize(("kept", "shown"), [(2, ["n"]), (1, [])])
def test_an_incomplete_character_at_the_end_does_not_hide_those_before_it(
    model, reference, kept, shown
):
    backend = reference.tokenizer.backend_tokenizer
    joined = backend.encode("né").ids[:2]
    assert pieces(model, reference.tokenizer, "x", joined[2 - kept :]) == shown


def test_a_token_that_ends_within_a_character_shows_its_whole_ones(model, reference):
    ids = reference.tokenizer.backend_tokenizer.encode("né").ids
    shown = pieces(model, reference.tokenizer, "x", [ids[1], ids[0], ids[1]])
    assert shown == ["\ufffdn"]


def test_a_filter_without_a_temperature_samples_at_one():
    greedy = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}
    assert sampling_options(None, None, 1.0, 0.0) == greedy
    assert sampling_options(None, 5, 1.0, 0.0)["temperature"] == 1.0
    assert sampling_options(0.3, None, 0.9, 0.0)["temperature"] == 0.3
    assert sampling_options(0.0, 5, 1.0, 0.0)["temperature"] == 0.0


def test_no_temperature_is_too_low():
    shares = token_probabilities(torch.tensor([[1.0, 3.0, 2.0]]), 1e-39)
    assert shares.tolist() == [[0.0, 1.0, 0.0]]


def test_the_text_ends_before_a_stop_token(model, reference):
    backend = reference.tokenizer.backend_tokenizer
    ids = [*backend.encode("ab").ids, reference.end_of_text, *backend.encode("c").ids]
    assert "".join(pieces(model, reference.tokenizer, "x", ids)) == "ab"


def test_a_chat_needs_a_template(reference):
    with pytest.raises(WorkflowError, match="no chat template; choose an Instruct model"):
        prompt_ids(reference.tokenizer, "Hello", chat=True)


def test_a_chat_uses_the_tokenizers_own_template(reference):
    reference.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = prompt_ids(reference.tokenizer, "Hi", chat=True)
    assert reference.tokenizer.decode(ids) == "<user>Hi<assistant>"


def test_a_prepared_model_is_the_same_model_stored_by_columns(model):
    prompt = torch.tensor([[3, 5, 7, 11], [2, 4, 6, 8]])
    text, logits = model.generate(prompt, 20), model(prompt)
    before = model.embed_tokens.weight.clone()
    prepared = prepare_for_generation(model)
    assert torch.equal(prepared.generate(prompt, 20), text)
    assert (prepared(prompt) - logits).abs().max() < 1e-5  # rounding only
    assert torch.equal(prepared.embed_tokens.weight, before)
    assert prepared.embed_tokens.weight.stride() == (1, before.shape[0])
    assert prepared.lm_head.weight is prepared.embed_tokens.weight


@pytest.mark.parametrize("length", [1, 2, 5])
def test_in_bfloat16_a_copy_generates(model, length):
    prompt = torch.arange(3, 3 + length)[None]
    rounded, exact = prepare_for_generation(model, torch.bfloat16), model(prompt)
    logits = rounded(prompt)
    assert logits.dtype == torch.bfloat16 and model.embed_tokens.weight.dtype == torch.float32
    assert rounded.lm_head.weight is rounded.embed_tokens.weight
    assert 0 < (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert len(list(rounded.stream(prompt, 6))) == 6

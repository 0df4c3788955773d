"""Sampling is transformers' own; text comes piece by piece, and ends where it should."""

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
from workflow.analysis.generation import Decoder, prompt_ids, sampling, text_pieces
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
    return LlamaModel(config.member.architecture)


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


def scripted(model, ids):
    """A decoder that says exactly `ids`."""
    decoder = Decoder(model)
    decoder.stream = lambda *_, **options: iter(torch.tensor(ids)[:, None])
    return decoder


def test_half_a_character_waits_for_the_rest(model, reference):
    backend = reference.tokenizer.backend_tokenizer
    ids = backend.encode("né!").ids
    assert len(ids) == 4
    pieces = list(text_pieces(scripted(model, ids), reference.tokenizer, [3], 4, {}))
    assert pieces == ["n", "é", "!"]


def test_half_a_character_at_the_end_does_not_hide_the_whole_ones_before_it(model, reference):
    backend = reference.tokenizer.backend_tokenizer
    ids = backend.encode("né").ids[:2]
    assert list(text_pieces(scripted(model, ids), reference.tokenizer, [3], 2, {})) == ["n"]


def test_asking_for_a_filter_is_asking_for_draws():
    greedy = {"temperature": 0.0, "top_k": None, "top_p": 1.0, "min_p": 0.0}
    assert sampling(None, None, 1.0, 0.0) == greedy
    assert sampling(None, 5, 1.0, 0.0)["temperature"] == 1.0
    assert sampling(0.3, None, 0.9, 0.0)["temperature"] == 0.3
    assert sampling(0.0, 5, 1.0, 0.0)["temperature"] == 0.0


def test_no_temperature_is_too_low():
    shares = token_probabilities(torch.tensor([[1.0, 3.0, 2.0]]), 1e-39)
    assert shares.tolist() == [[0.0, 1.0, 0.0]]


def test_the_text_ends_before_a_stop_token(model, reference):
    backend = reference.tokenizer.backend_tokenizer
    ids = [*backend.encode("ab").ids, reference.end_of_text, *backend.encode("c").ids]
    assert "".join(text_pieces(scripted(model, ids), reference.tokenizer, [3], 9, {})) == "ab"


def test_a_chat_needs_a_template(reference):
    with pytest.raises(WorkflowError, match="no chat template; take an Instruct member"):
        prompt_ids(reference.tokenizer, "Hello", chat=True)


def test_a_chat_is_told_in_the_tokenizers_own_template(reference):
    reference.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = prompt_ids(reference.tokenizer, "Hi", chat=True)
    assert reference.tokenizer.decode(ids) == "<user>Hi<assistant>"


def test_a_decoder_says_what_the_model_says(model):
    prompt = torch.tensor([[3, 5, 7, 11], [2, 4, 6, 8]])
    expected, before = model.generate(prompt, 20), model.embed_tokens.weight.clone()
    new = list(Decoder(model).stream(prompt, 20))
    assert torch.equal(torch.cat([prompt, torch.stack(new, dim=1)], dim=1), expected)
    assert torch.equal(model.embed_tokens.weight, before)  # laid out in another way only
    assert model.embed_tokens.weight.stride() == (1, before.shape[0])
    assert model.lm_head.weight is model.embed_tokens.weight


@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_decoder_in_bfloat16_takes_the_prompt_in_float32(model, length, monkeypatch):
    decoder = Decoder(model, torch.bfloat16)
    prompt = torch.arange(3, 3 + length)[None]
    first = model(prompt)[:, -1]
    seen = []
    monkeypatch.setattr(
        decoder.low.lm_head,
        "forward",
        lambda x: (seen.append(y := x @ decoder.low.lm_head.weight.T), y)[1],
    )
    assert len(list(decoder.stream(prompt, 6))) == 6
    assert seen[0].dtype == torch.bfloat16
    assert 0 < (seen[0].float() - first).abs().max() < 0.05 * first.abs().max()
    assert model.embed_tokens.weight.dtype == torch.float32

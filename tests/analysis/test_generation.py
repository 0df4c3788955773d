"""Sampling equals that of transformers; text appears in pieces and ends at a stop token."""

import pytest
import torch

from SmolLm3 import token_probabilities
from workflow.analysis import prepare_for_generation, prompt_ids, sampling_options, stream_text
from workflow.errors import WorkflowError


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.3, None, 1.0, 0.0),
        (1.7, 5, 1.0, 0.0),
        (1.0, 1000, 1.0, 0.0),  # more than the vocabulary has
        (1.0, None, 0.9, 0.0),
        (1.0, None, 1e-9, 0.0),
        (2.0, None, 1.0, 0.05),
        (0.8, 50, 0.95, 0.02),
    ],
)
def test_probabilities_equal_those_of_transformers(temperature, top_k, top_p, min_p):
    import transformers  # takes seconds

    logits = 4 * torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    logits[0] = 0.0  # all equal
    logits[1, :50] = logits[1].max()  # 50 equal largest values
    warpers = transformers.LogitsProcessorList()
    warpers.append(transformers.TemperatureLogitsWarper(temperature))
    if top_k is not None:
        warpers.append(transformers.TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(transformers.TopPLogitsWarper(top_p))
    if min_p > 0:
        warpers.append(transformers.MinPLogitsWarper(min_p))
    expected = warpers(None, logits.clone()).softmax(dim=-1)
    ours = token_probabilities(logits, temperature, top_k, top_p, min_p)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    assert torch.equal(ours > 0, expected > 0)


def test_a_tiny_temperature_is_greedy():
    probabilities = token_probabilities(torch.tensor([[1.0, 3.0, 2.0]]), 1e-39)
    assert probabilities.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is 0, it must be 1 or more"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0, it must be above 0"),
        ({"temperature": 1.0, "min_p": -0.1}, "min_p is -0.1, it must be from 0 to 1"),
    ],
)
def test_sampling_options_out_of_range_are_refused(model, options, words):
    with pytest.raises(ValueError, match=words):
        model.generate(torch.tensor([[1, 2]]), 3, **options)


def test_a_filter_without_a_temperature_samples_at_1():
    for options, temperature in (
        ((None, None, 1.0, 0.0), 0.0),
        ((None, 5, 1.0, 0.0), 1.0),
        ((None, None, 0.9, 0.0), 1.0),
        ((0.3, None, 0.9, 0.0), 0.3),
    ):
        assert sampling_options(*options)["temperature"] == temperature


@pytest.mark.parametrize(
    ("tokens", "pieces"),  # 1, 2: the two bytes of é; E: end of text
    [
        ("n12!", ["n", "é", "!"]),
        ("n1", ["n"]),  # without the incomplete last character
        ("1", []),
        ("1n1", ["\ufffdn"]),
        ("nE!", ["n"]),
    ],
)
def test_text_appears_in_complete_characters_up_to_a_stop_token(model, reference, tokens, pieces):
    ids = dict(zip("n12!", reference.tokenizer.backend_tokenizer.encode("né!").ids, strict=True))
    ids["E"] = reference.end_of_text
    generated = torch.tensor([[ids[token]] for token in tokens])
    model.stream = lambda *_, **options: iter(generated)
    prompt = prompt_ids(reference.tokenizer, "é", chat=False)
    assert list(stream_text(model, reference.tokenizer, prompt, len(tokens), {})) == pieces


def test_a_chat_uses_the_template_of_the_tokenizer(reference):
    reference.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    ids = prompt_ids(reference.tokenizer, "Hi", chat=True)
    assert reference.tokenizer.decode(ids) == "<user>Hi<assistant>"
    reference.tokenizer.chat_template = "{% for"
    with pytest.raises(WorkflowError, match=r"chat template cannot be used .*; omit --chat"):
        prompt_ids(reference.tokenizer, "Hi", chat=True)


def test_in_float32_the_model_is_stored_by_columns_and_generates_the_same_text(model):
    prompt = torch.tensor([[3, 5, 7, 11], [2, 4, 6, 8]])
    text, before = model.generate(prompt, 20), model.embed_tokens.weight.clone()
    prepared = prepare_for_generation(model)
    assert torch.equal(prepared.generate(prompt, 20), text)
    assert torch.equal(prepared.embed_tokens.weight, before)
    assert prepared.embed_tokens.weight.stride() == (1, before.shape[0])
    assert prepared.lm_head.weight is prepared.embed_tokens.weight


def test_in_bfloat16_a_copy_generates(model):
    prompt = torch.arange(3, 8)[None]
    rounded, exact = prepare_for_generation(model, torch.bfloat16), model(prompt)
    logits = rounded(prompt)
    assert logits.dtype == torch.bfloat16 and model.embed_tokens.weight.dtype == torch.float32
    assert rounded.lm_head.weight is rounded.embed_tokens.weight
    assert 0 < (logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert len(list(rounded.stream(prompt, 6))) == 6

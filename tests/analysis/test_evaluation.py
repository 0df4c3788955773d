"""Loss and perplexity follow their definitions."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from workflow.analysis import evaluate, evaluate_models, evaluation, unigram_loss
from workflow.proof import copy_reference


@pytest.mark.parametrize(
    ("tokens", "stride", "windows"),  # windows: start, end, how many of its last tokens are scored
    [
        (50, None, [(0, 20, 19), (20, 40, 19), (40, 50, 9)]),
        (41, None, [(0, 20, 19), (20, 40, 19)]),  # the last token has no context
        (47, 8, [(0, 20, 19), (8, 28, 8), (16, 36, 8), (24, 44, 8), (32, 47, 3)]),
        (15, 8, [(0, 15, 14)]),
    ],
)
def test_each_token_is_scored_once_with_the_most_context(model, tokens, stride, windows):
    ids = np.random.default_rng(0).integers(257, size=tokens)
    expected = []
    for start, end, scored in windows:
        part = torch.tensor(ids[start:end])
        losses = F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="none")
        expected += losses[-scored:].tolist()
    result = evaluate(model, ids, window=20, stride=stride)
    assert result.tokens == len(expected)
    assert result.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(np.exp(np.mean(expected)), rel=1e-5)
    assert f"windows of 20 tokens every {stride or 20}" in str(result)


def test_the_model_of_transformers_has_the_same_loss_with_any_batch_size(reference, monkeypatch):
    tokens = np.random.default_rng(2).integers(257, size=3000)
    theirs = evaluate(reference.model, tokens, window=128, stride=48)
    model = copy_reference(reference)
    for max_tokens, max_logits in ((1, 10**6), (300, 7), (10**6, 64)):
        monkeypatch.setattr(evaluation, "MAX_TOKENS", max_tokens)
        monkeypatch.setattr(evaluation, "MAX_LOGITS", max_logits)
        ours = evaluate(model, tokens, window=128, stride=48)
        assert ours.tokens == theirs.tokens == 2999
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)


def test_values_per_word_and_per_byte_follow_their_definitions(model):
    text = "some words of é text, " * 9
    tokens = np.frombuffer(text.encode(), dtype=np.uint8)
    result = evaluate(model, tokens, window=64, text=text)
    assert result.bits_per_byte == pytest.approx(result.loss / np.log(2), rel=1e-9)
    words_per_token = 45 / len(tokens)
    assert result.word_perplexity == pytest.approx(np.exp(result.loss / words_per_token), rel=1e-9)
    one_word = evaluate(model, np.full(400, ord("a")), 20, text="a" * 400)  # e^(5 × 400)
    assert one_word.word_perplexity == math.inf and 0 < one_word.bits_per_byte < 20
    shown = dataclasses.replace(result, word_perplexity=50.0)
    assert "word" not in str(one_word) and ", word perplexity 50.0000, " in str(shown)
    assert math.isnan(evaluate(model, tokens, 20).word_perplexity)  # without a text


@pytest.mark.parametrize(
    ("tokens", "window", "stride", "words"),
    [
        (1, 20, None, "the window has 1 tokens, it needs 2 or more"),
        (50, 20, 21, "stride 21 must be between 1 and window 20"),
        (50, 20, 0, "stride 0 must be between 1 and window 20"),
    ],
)
def test_tokens_or_windows_that_do_not_fit_are_refused(model, tokens, window, stride, words):
    with pytest.raises(ValueError, match=words):
        evaluate(model, np.arange(tokens), window, stride)


def test_the_unigram_loss_uses_the_counts_of_the_training_text():
    train, held_out = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    probabilities = np.array([3.05, 1.05, 0.05]) / 4.15
    assert unigram_loss(train, held_out, 3) == pytest.approx(-np.log(probabilities).mean())


def test_the_table_has_one_row_per_text_and_model(model, reference):
    ids = reference.tokenizer("some words of a text " * 9, add_special_tokens=False).input_ids
    texts = {"long": ids, "one word": [ord("a")] * 64}
    models = {"before": model, "after": copy_reference(reference)}
    found, table = evaluate_models(models, texts, reference.tokenizer, 16)
    alone = evaluate(models["after"], ids, 16, text=reference.tokenizer.decode(ids))
    assert found["long", "after"] == alone
    assert list(table.index) == list(found) == [(text, name) for text in texts for name in models]
    assert float(table.loc[("long", "after"), "loss"]) == pytest.approx(alone.loss, rel=1e-4)
    assert set(table.loc["one word", "word_perplexity"]) == {"–"}  # a number with many digits

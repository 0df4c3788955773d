"""Loss and perplexity against their definitions."""

import math

import numpy as np
import pytest
import torch

from SmolLm3 import LlamaModel
from workflow.analysis import compare_models, evaluate, evaluation, unigram_loss
from workflow.proof import copy_reference


@pytest.fixture
def model(config) -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(config.train_architecture)


def token_losses(model, ids: list[int]) -> list[float]:
    """The loss of each token after the first, given all before it in `ids`."""
    with torch.no_grad():
        logs = torch.log_softmax(model(torch.tensor([ids[:-1]])), dim=-1)[0]
    return [-logs[place, token].item() for place, token in enumerate(ids[1:])]


def test_windows_without_overlap_score_all_but_their_first_token(model):
    ids = list(np.random.default_rng(0).integers(257, size=50))
    expected = token_losses(model, ids[:20]) + token_losses(model, ids[20:40])
    expected += token_losses(model, ids[40:])
    result = evaluate(model, np.array(ids), window=20)
    assert result.tokens == 47
    assert result.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert result.perplexity == pytest.approx(np.exp(np.mean(expected)), rel=1e-5)


def test_overlapping_windows_score_each_token_once_with_the_most_context(model):
    ids = list(np.random.default_rng(1).integers(257, size=47))
    expected = token_losses(model, ids[:20])
    expected += token_losses(model, ids[8:28])[-8:]
    expected += token_losses(model, ids[16:36])[-8:]
    expected += token_losses(model, ids[24:44])[-8:]
    expected += token_losses(model, ids[32:47])[-3:]
    result = evaluate(model, np.array(ids), window=20, stride=8)
    assert result.tokens == 46
    assert result.loss == pytest.approx(np.mean(expected), rel=1e-5)
    assert "windows of 20 tokens every 8" in str(result)


def test_transformers_model_gives_the_same_figure(reference):
    tokens = np.random.default_rng(2).integers(257, size=3000)
    ours = evaluate(copy_reference(reference), tokens, window=128, stride=48)
    theirs = evaluate(reference.model, tokens, window=128, stride=48)
    assert ours.tokens == theirs.tokens == 2999
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)


def test_batches_and_parts_of_the_logits_change_nothing(model, monkeypatch):
    tokens = np.random.default_rng(3).integers(257, size=1000)
    figures = []
    for at_once, rows in ((1, 10**6), (300, 7), (10**6, 64)):
        monkeypatch.setattr(evaluation, "TOKENS_AT_ONCE", at_once)
        monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", rows)
        figures.append(evaluate(model, tokens, window=50, stride=20).loss)
    assert figures == [pytest.approx(figures[0], rel=1e-6)] * 3


def test_figures_by_word_and_byte_follow_their_definitions(model):
    text = "some words of é text, " * 9
    tokens = np.frombuffer(text.encode(), dtype=np.uint8)
    result = evaluate(model, tokens, window=64, stride=64, text=text)
    assert result.bits_per_byte == pytest.approx(result.loss / np.log(2), rel=1e-9)
    words_a_token = 45 / len(tokens)
    assert result.word_perplexity == pytest.approx(np.exp(result.loss / words_a_token), rel=1e-9)


@pytest.mark.parametrize(
    ("total", "window", "stride"), [(47, 20, 8), (40, 20, 20), (41, 20, 20), (5, 9, 3), (9, 2, 1)]
)
def test_windows_score_every_token_that_has_context_once(total, window, stride):
    seen = []
    for batch, new in evaluation.windows(torch.arange(total), window, stride):
        assert batch.shape[1] <= window and (batch.diff() == 1).all()
        seen += batch[:, -new:].flatten().tolist()
    unscored = range(0, total, window) if stride == window else [0]
    assert seen == [place for place in range(total) if place not in unscored]


def test_what_cannot_be_scored_is_refused(model):
    for tokens, window in ((np.array([3]), 20), (np.arange(50), 1)):
        with pytest.raises(ValueError, match="1 tokens are too few"):
            evaluate(model, tokens, window)
    with pytest.raises(ValueError, match="stride 21 must lie between 1 and window 20"):
        evaluate(model, np.arange(50), window=20, stride=21)


def test_the_unigram_model_is_counts_and_nothing_else():
    train, held_out = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    shares = np.array([3.05, 1.05, 0.05]) / 4.15
    assert unigram_loss(train, held_out, 3) == pytest.approx(-np.log(shares).mean())


def test_a_comparison_has_a_row_for_each_model_on_each_text_with_its_protocol(model, reference):
    ids = reference.tokenizer("some words of a text " * 9, add_special_tokens=False).input_ids
    texts = {"one": ids, "two": ids[:50]}
    models = {"before": model, "after": copy_reference(reference)}
    found, table = compare_models(models, texts, reference.tokenizer, 16)
    assert found["two", "after"] == evaluate(
        models["after"], ids[:50], 16, text=reference.tokenizer.decode(ids[:50])
    )
    assert list(table.index) == list(found) == [(t, m) for t in texts for m in models]
    assert float(table.loc[("one", "after"), "bits_per_byte"]) == pytest.approx(
        found["one", "after"].bits_per_byte, rel=1e-4
    )
    assert list(table.columns[:3]) == ["tokens", "loss", "perplexity"]
    assert set(table["protocol"]) == {"windows of 16 tokens every 16"}


def test_a_text_of_endless_words_or_none_has_figures_all_the_same(model):
    tokens = np.full(400, ord("a"))  # one word, of e^(5 × 400)
    endless = evaluate(model, tokens, 20, text="a" * 400)
    assert endless.word_perplexity == math.inf and "word perplexity inf" in str(endless)
    assert 0 < endless.bits_per_byte < 20
    without = evaluate(model, tokens, 20)
    assert math.isnan(without.word_perplexity) and math.isnan(without.bits_per_byte)
    assert without.perplexity == endless.perplexity


def test_an_absurd_figure_is_short_in_the_table(model, reference):
    ids = np.zeros(64, dtype=np.int64)  # one word of 64 tokens
    _, table = compare_models({"m": model}, {"t": ids}, reference.tokenizer, 16)
    assert len(table["word_perplexity"].item()) < 12

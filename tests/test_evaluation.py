"""Loss and perplexity against their definitions."""

import numpy as np
import pytest
import torch

from SmolLm3 import LlamaModel
from workflow.evaluation import evaluate, unigram_loss


@pytest.fixture
def model(config) -> LlamaModel:
    torch.manual_seed(0)
    return LlamaModel(config.trained)


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


def test_what_cannot_be_scored_is_refused(model):
    with pytest.raises(ValueError, match="1 tokens are too few"):
        evaluate(model, np.array([3]), window=20)
    with pytest.raises(ValueError, match="stride 21 must lie between 1 and window 20"):
        evaluate(model, np.arange(50), window=20, stride=21)


def test_the_unigram_model_is_counts_and_nothing_else():
    train, held_out = np.array([0, 0, 0, 1]), np.array([0, 1, 2])
    shares = np.array([3.05, 1.05, 0.05]) / 4.15
    assert unigram_loss(train, held_out, 3) == pytest.approx(-np.log(shares).mean())

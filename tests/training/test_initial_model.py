"""The model before training, as the notebook looks at it, is the one that a run starts with."""

import pytest
import torch

from workflow.data import load_corpus
from workflow.training import initial_model, open_run


@pytest.mark.parametrize("init", ["scratch", "reference"])
def test_the_initial_model_is_that_of_the_first_step(config, reference, init):
    train = config.train.model_copy(update={"init": init})
    config = config.model_copy(update={"train": train})
    state = torch.get_rng_state()
    model = initial_model(config, reference)
    assert torch.equal(state, torch.get_rng_state())
    tokenizer = reference.tokenizer.backend_tokenizer
    run = open_run(config, reference, load_corpus(config, tokenizer, reference.end_of_text))
    assert all(map(torch.equal, model.parameters(), run.trainer.model.parameters()))
    run.close()

"""Analysis of a model: evaluation, generated text, states, interpretability, figures."""

from workflow.analysis.evaluation import Evaluation, evaluate, evaluate_models, unigram_loss
from workflow.analysis.generation import (
    prepare_for_generation,
    prompt_ids,
    sampling_options,
    stream_text,
)

"""Looking at a model: evaluation, generated text, states, interpretability, figures."""

from workflow.analysis.evaluation import Evaluation, compare_models, evaluate, unigram_loss
from workflow.analysis.generation import (
    prepare_for_generation,
    prompt_ids,
    sampling_options,
    stream_text,
)

__all__ = ["Evaluation", "compare_models", "evaluate", "prepare_for_generation", "prompt_ids"]
__all__ += ["sampling_options", "stream_text", "unigram_loss"]

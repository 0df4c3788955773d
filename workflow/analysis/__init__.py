"""Looking at a model: evaluation, generated text, states, interpretability, figures."""

"""Values that are valid alone, but not together. Each is refused before anything starts."""

import difflib


def problem(config) -> str | None:
    """The first problem of a `Config`, as `WHAT` or `WHAT; HOW to fix it`; None if there is none.

    Keys are written in full: an error then names the `--set` that changed one of them.
    """
    if found := model_problem(config) or device_problem(config.run.device):
        return found
    for name, value, limit, maximum in limits(config):
        if value > maximum:
            return f"{name} is {value}, more than {limit} = {maximum}; change one of the two"
    size, micro_size = config.train.batch_size, config.train.micro_batch_size or 1
    if size % micro_size:
        return f"train.batch_size {size} is not a multiple of train.micro_batch_size {micro_size}"
    return None


def model_problem(config) -> str | None:
    for key, row in (("model", config.model), ("train.model", config.train_model)):
        if row not in config.models:
            (near,) = difflib.get_close_matches(row, config.models, n=1, cutoff=0)
            return f"{key} is {row!r}, there is no such model; did you mean {near}?"
    if config.train.init == "reference" and config.train_model != config.model:
        return f"train.init is reference, but train.model is not {config.model!r}"
    trained = config.train_architecture.vocab_size
    original = config.model_entry.architecture.vocab_size
    if trained != original:
        size = f"train.model {config.train_model!r} has vocab_size {trained}"
        return f"{size}, the tokenizer of model {config.model!r} has {original}"
    return None


def device_problem(device: str) -> str | None:
    """device: `run.device`."""
    import torch  # takes seconds, and only this function needs it

    kind, _, number = device.partition(":")
    if kind == "cuda" and not torch.cuda.is_available():
        return f"run.device is {device}, but torch finds no CUDA GPU here"
    if kind == "mps" and not torch.backends.mps.is_available():
        return "run.device is mps, but torch finds no Apple GPU here"
    if number and int(number) >= (count := torch.cuda.device_count()):
        return f"run.device is {device}, but the last of the {count} GPUs here is cuda:{count - 1}"
    return None


def limits(config) -> list[tuple[str, float, str, float]]:
    """A key, its value, the name of its limit, and the limit."""
    train, smoke_test, mutations = config.train, config.smoke_test, config.mutations
    original = config.model_entry.architecture.max_position_embeddings
    trained = config.train_architecture.max_position_embeddings
    of_original = f"the context of model {config.model}"
    of_trained = f"the context of {'train.model' if train.model else 'model'} {config.train_model}"
    length, steps = train.sequence_length, train.schedule_steps
    lowest = train.min_learning_rate
    after_warmup = "train.schedule_steps - train.warmup_steps"
    return [
        ("train.sequence_length", length, of_trained, trained),
        ("evaluation.window", config.evaluation.window or 0, of_trained, trained),
        ("smoke_test.sequence_length", smoke_test.sequence_length, of_original, original),
        ("mutations.sequence_length", mutations.sequence_length, of_original, original),
        ("mutations.tokens", mutations.tokens, of_original, original),
        # the longest prompt has 300
        ("proof.new_tokens", config.proof.new_tokens, f"{of_original} - 300", original - 300),
        ("train.sequence_length", length, "train.validation_tokens", train.validation_tokens),
        ("train.warmup_steps", train.warmup_steps, "train.schedule_steps", steps),
        ("train.decay_steps", train.decay_steps or 0, after_warmup, steps - train.warmup_steps),
        ("train.min_learning_rate", lowest, "train.learning_rate", train.learning_rate),
        ("smoke_test.save_at", smoke_test.save_at, "smoke_test.steps - 1", smoke_test.steps - 1),
    ]

"""Hidden states, logits and gradients of our model or of transformers, and their differences.

If a value is NaN, or the shapes differ, the difference is infinite: no check passes.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from SmolLm3 import LlamaModel, hf_name


def max_difference(ours: Tensor, theirs: Tensor, size: Tensor | float = 1.0) -> float:
    """The largest absolute difference, divided by `size`."""
    if ours.shape != theirs.shape:
        return math.inf
    difference = (ours.float() - theirs.float()).abs() / size
    return difference.nan_to_num(nan=math.inf).max().item()


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, divided by the largest value of `theirs`."""
    difference, size = max_difference(ours, theirs), theirs.float().abs().max().item()
    return difference / size if size else difference


def relative_difference_by_position(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference of states (B, T, C), divided by the largest value at its position.

    By position, because in the middle layers the states of the first token are 10,000 times larger
    than all others: they would hide every other error.
    """
    size = theirs.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    return max_difference(ours, theirs, size)


def kl_divergence(ours: Tensor, theirs: Tensor) -> float:
    """KL(theirs || ours) of logits (B, T, V), nats per token."""
    p, q = theirs.float().log_softmax(dim=-1), ours.float().log_softmax(dim=-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1).mean().item()


def hidden_states(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    """The outputs for `ids` (B, T), by name: embed_tokens, layers.0 …, norm, logits.

    For a model of transformers, also `loss`: its next-token loss.
    """
    ours, found = isinstance(model, LlamaModel), {}
    base = model if ours else model.model
    names = ["embed_tokens", *(f"layers.{index}" for index in range(len(base.layers))), "norm"]
    with ExitStack() as hooks:  # removes the hooks at the end
        for name in names:
            hook = base.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: found.update({name: output})
            )
            hooks.enter_context(hook)
        if ours:
            return found | {"logits": model(ids)}
        output = model(ids, labels=ids)
        return found | {"logits": output.logits, "loss": output.loss}


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (B, T, V) of either model."""
    return model(ids) if isinstance(model, LlamaModel) else model(ids).logits


def hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """The states (B, T, C) of either model after the final norm."""
    if isinstance(model, LlamaModel):
        return model.hidden(ids)
    return model.model(ids, use_cache=False).last_hidden_state


def logits_in_chunks(model: nn.Module, ids: Tensor) -> Iterator[Tensor]:
    """Yields the logits (1, up to 256, V) of a long text, to save memory."""
    for part in hidden(model, ids).split(256, dim=1):
        yield model.lm_head(part)


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradient of `loss` for each parameter, by Hugging Face's names."""
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()))
    names = map(hf_name, parameters) if isinstance(model, LlamaModel) else parameters
    return dict(zip(names, found, strict=True))


def in_bf16(model: nn.Module) -> nn.Module:
    """A copy with bf16 weights; the rotation angles of transformers (buffers) stay float32."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():  # `.bfloat16()` would round the angles too
        parameter.data = parameter.data.bfloat16()
    return rounded

"""Hidden states of a model, by name, and the differences of states and logits.

If a value is NaN, or the shapes differ, the difference is infinite: no check passes.
"""

import copy
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from SmolLm3 import LlamaModel

INPUT = "input of "  # before the name of a module: its first input, not its output


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


def difference_by_position(ours: Tensor, theirs: Tensor) -> Tensor:
    """The differences of states (…, T, C), each divided by the largest value at its position.

    By position, because in the middle layers the states of the first token are 10,000 times larger
    than all others: they would hide every other error.
    """
    size = theirs.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    return ((ours.float() - theirs.float()).abs() / size).nan_to_num(nan=math.inf)


def relative_difference_by_position(ours: Tensor, theirs: Tensor) -> float:
    """The largest of `difference_by_position`."""
    same_shape = ours.shape == theirs.shape
    return difference_by_position(ours, theirs).max().item() if same_shape else math.inf


def kl_divergence(ours: Tensor, theirs: Tensor) -> float:
    """KL(theirs || ours) of logits (B, T, V), nats per token."""
    p, q = theirs.float().log_softmax(dim=-1), ours.float().log_softmax(dim=-1)
    return F.kl_div(q, p, log_target=True, reduction="none").sum(dim=-1).mean().item()


def record(
    modules: Mapping[str, nn.Module], run: Callable[[], Any]
) -> tuple[Any, dict[str, Tensor]]:
    """Calls `run`. Returns its result and, by name, the output of each module.

    For a name that starts with `input of `, it is the module's input. A module is left out if it is
    called more than once or never, or if it gives no tensor.
    """
    calls = {name: [] for name in modules}
    with ExitStack() as hooks:  # removes the hooks at the end
        for name, module in modules.items():
            # a copy, because `x += …` in a later module would change the state
            keep = partial(keep_copy, calls[name])
            if name.startswith(INPUT):
                hook = module.register_forward_pre_hook(
                    lambda _, inputs, named, keep=keep: keep([*inputs, *named.values()]),
                    with_kwargs=True,
                )
            else:
                hook = module.register_forward_hook(lambda _, inputs, out, keep=keep: keep(out))
            hooks.enter_context(hook)
        result = run()
    once = {name: states[0] for name, states in calls.items() if len(states) == 1}
    return result, {name: state for name, state in once.items() if state is not None}


def keep_copy(states: list[Tensor | None], value: Any) -> None:
    """Appends what a module gave, or the first part of its tuple; None if it is no tensor."""
    while isinstance(value, (tuple, list)) and value:
        value = value[0]
    states.append(value.clone() if isinstance(value, Tensor) else None)


def state_names(layers: int) -> list[str]:
    """The modules whose outputs are the states of a model, from embedding to final norm."""
    return ["embed_tokens", *(f"layers.{index}" for index in range(layers)), "norm"]


def hidden_states(model: LlamaModel, ids: Tensor) -> dict[str, Tensor]:
    """The outputs for `ids` (B, T), by name: embed_tokens, layers.0 …, norm, logits."""
    modules = {name: model.get_submodule(name) for name in state_names(len(model.layers))}
    logits, found = record(modules, lambda: model(ids))
    return found | {"logits": logits}


def hidden(model: nn.Module, ids: Tensor) -> Tensor:
    """The states (B, T, C) of either model after the final norm."""
    if isinstance(model, LlamaModel):
        return model.hidden(ids)
    return model.model(ids, use_cache=False).last_hidden_state


def in_bf16(model: nn.Module) -> nn.Module:
    """A copy with bf16 weights; the rotation angles of transformers (buffers) stay float32."""
    rounded = copy.deepcopy(model)
    for parameter in rounded.parameters():  # `.bfloat16()` would round the angles too
        parameter.data = parameter.data.bfloat16()
    return rounded

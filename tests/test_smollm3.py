"""`SmolLm3.py` against transformers, and against itself."""

import pytest
import torch
from transformers import LlamaForCausalLM

from conftest import ROOT
from SmolLm3 import KVCache, LlamaModel, ModelConfig, hf_state_dict, load_hf_weights
from workflow.config import load_config
from workflow.files import weights_sha256
from workflow.reference.load import hf_config

TINY = load_config(ROOT / "SmolLm3_Config.yaml", "ci").model_entry.architecture


def changed(**changes) -> ModelConfig:
    """A tiny architecture with large weights, so that each layer changes the logits."""
    return ModelConfig(**vars(TINY) | {"initializer_range": 0.2} | changes)


def pair(**changes) -> tuple[LlamaModel, LlamaForCausalLM]:
    """Ours and transformers', with the same random weights."""
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(hf_config(changed(**changes))).eval()
    ours = LlamaModel(changed(**changes))
    load_hf_weights(ours, theirs.state_dict())
    return ours, theirs


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(257, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 1},
        {"head_dim": 16},
        {"tie_word_embeddings": False},
    ],
)
def test_logits_equal_those_of_transformers(changes):
    ours, theirs = pair(**changes)
    tokens = ids(2, 40)  # more positions than heads: rotating over the head axis would show
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_cached_logits_equal_uncached_ones_in_any_split():
    ours, _ = pair()
    tokens = ids(2, 30)
    cache = KVCache(ours.config, 2, 30, like=ours.embed_tokens.weight)
    with torch.no_grad():
        pieces = [ours(piece, cache=cache) for piece in tokens.split([7, 1, 12, 10], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), ours(tokens), rtol=0, atol=1e-5)


def test_a_full_cache_is_refused_and_stays_as_it_was():
    ours, _ = pair()
    cache = KVCache(ours.config, 2, 8, like=ours.embed_tokens.weight)
    ours(ids(2, 8), cache=cache)
    with pytest.raises(ValueError, match="9 positions do not fit: the cache has 8"):
        ours(ids(2, 1), cache=cache)
    assert cache.length == 8


def test_generation_continues_a_padded_cache_as_if_it_were_one_prompt():
    ours, _ = pair()
    prompt, mask = ids(2, 12), torch.arange(12) >= torch.tensor([[0], [3]])
    cache = KVCache(ours.config, 2, 22, like=ours.embed_tokens.weight)
    ours(prompt[:, :7], mask=mask[:, :7], cache=cache)
    continued = ours.generate(prompt[:, 7:], 10, mask=mask, cache=cache)
    assert torch.equal(continued[:, 5:], ours.generate(prompt, 10, mask=mask)[:, 12:])


def test_the_model_is_one_graph_with_the_same_logits_at_any_length():
    ours, _ = pair()
    length = torch.export.Dim("T", min=2, max=512)
    shapes = ({1: length},)
    graph = torch.export.export(ours, (ids(2, 9),), dynamic_shapes=shapes, strict=True).module()
    with torch.no_grad():
        for T in (2, 9, 40):
            assert torch.equal(graph(ids(2, T)), ours(ids(2, T)))


def test_a_row_repeats_its_stop_token_and_the_stream_ends_with_the_last_row():
    ours, _ = pair()
    prompt = ids(2, 8)
    free = ours.generate(prompt, 20)[:, 8:]
    stop = free[0, 3].item()
    text = ours.generate(prompt, 20, stop_ids=[stop])[:, 8:]
    first = (free[0] == stop).nonzero()[0].item()
    assert (text[0, first:] == stop).all()
    assert torch.equal(text[1], free[1, : text.shape[1]])
    alone = ours.generate(prompt[:1], 20, stop_ids=[stop])[:, 8:]
    assert alone.shape[1] == first + 1


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        ([], {}, "the prompt is empty"),
        ([1, 257], {}, "token ids go from 1 to 257, the vocabulary from 0 to 256"),
        ([-1, 3], {}, "token ids go from -1 to 3"),
        ([1] * 503, {}, "10 new tokens do not fit: the context is 512, the prompt 503"),
        ([1] * 3, {"new_tokens": -1}, "-1 new tokens do not fit"),
        ([1] * 3, {"mask": [1, 1, 0]}, "padding must be on the left"),
        ([1] * 3, {"mask": [1, 0, 1]}, "padding must be on the left"),
        ([1] * 3, {"mask": [1, 1]}, r"the mask must be \(1, 3\), not \(1, 2\)"),
        ([1] * 3, {"cached": 2, "mask": [1] * 3}, r"the mask must be \(1, 5\), not \(1, 3\)"),
        ([1] * 3, {"cached": 15}, "10 new tokens do not fit: .*, the cache has 15 of 25 positions"),
        ([1] * 3, {"cached": 500, "room": 600}, "the context is 512, the prompt 3, the cache"),
    ],
)
def test_generation_refuses_what_it_cannot_do(prompt, options, words):
    prompt, mask, cache = torch.tensor([prompt], dtype=torch.long), options.get("mask"), None
    if "cached" in options:
        cache = KVCache(TINY, 1, options.get("room", 25), like=torch.zeros(1))
        cache.length = options["cached"]
    count, mask = options.get("new_tokens", 10), mask and torch.tensor([mask]).bool()
    with pytest.raises(ValueError, match=words):
        LlamaModel(TINY).generate(prompt, count, mask=mask, cache=cache)


def test_rotation_keeps_float32_angles_in_a_bfloat16_model():
    ours, _ = pair()
    exact = ours.rotary(torch.arange(5000))
    rounded = ours.to(torch.bfloat16).rotary(torch.arange(5000))
    assert all(map(torch.equal, exact, rounded))


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded():
    ours, _ = pair()
    state = {name: tensor.clone() + 1 for name, tensor in hf_state_dict(ours).items()}
    state["model.layers.0.self_attn.q_norm.weight"] = state.pop("model.norm.weight")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(64, 31)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1e-3
    before = weights_sha256(hf_state_dict(ours))
    with pytest.raises(ValueError, match="weights do not fit the model: ") as caught:
        load_hf_weights(ours, state)
    message = str(caught.value)
    assert "model.norm.weight is missing" in message
    assert "model.layers.0.self_attn.q_norm.weight is extra" in message
    assert "mlp.up_proj.weight has shape (64, 31), expected (64, 32)" in message
    assert "lm_head.weight is tied, but differs" in message
    assert weights_sha256(hf_state_dict(ours)) == before


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"head_dim": None, "num_attention_heads": 7}, "hidden_size 32 is not divisible by num"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not divisible by num_key_value"),
        ({"head_dim": 7}, "head_dim 7 is not even"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_both(changes, words):
    with pytest.raises(ValueError, match=words):
        changed(**changes)

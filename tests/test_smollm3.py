"""`SmolLm3.py` against transformers, and against itself."""

import pytest
import torch
from transformers import LlamaForCausalLM

import SmolLm3
from SmolLm3 import KVCache, LlamaModel, ModelConfig, hf_state_dict, load_hf_weights
from workflow.files import weights_sha256
from workflow.reference.load import hf_config

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "initializer_range": 0.2,
}


def pair(**changes) -> tuple[LlamaModel, LlamaForCausalLM]:
    """Ours and transformers', with the same random weights."""
    config = ModelConfig(**SHAPE | changes)
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(hf_config(config)).eval()
    ours = LlamaModel(config)
    load_hf_weights(ours, theirs.state_dict())
    return ours, theirs


def ids(batch: int, length: int, vocabulary: int = 97) -> torch.Tensor:
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 6},
        {"num_key_value_heads": 1},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
        {"tie_word_embeddings": False},
        {"rope_theta": 500.0, "rms_norm_eps": 1e-2},
    ],
)
def test_logits_equal_those_of_transformers(changes):
    ours, theirs = pair(**changes)
    tokens = ids(2, 40)  # more positions than heads: rotating over the head axis would show
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-5)


def test_gradients_equal_those_of_transformers():
    ours, theirs = pair()
    tokens = ids(2, 20)
    theirs(tokens, labels=tokens).loss.backward()
    logits = ours(tokens)[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten()).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[SmolLm3.hf_name(name)], rtol=1e-4, atol=1e-6
        )


def test_no_position_sees_a_later_one():
    ours, _ = pair()
    tokens = ids(1, 30)
    changed = tokens.clone()
    changed[0, 20:] = (changed[0, 20:] + 1) % 97
    with torch.no_grad():
        before, after = ours(tokens), ours(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_cached_logits_equal_uncached_ones_in_any_split():
    ours, _ = pair()
    tokens = ids(2, 30)
    cache = KVCache(ours.config, 2, 30, like=ours.embed_tokens.weight)
    with torch.no_grad():
        pieces = [ours(piece, cache=cache) for piece in tokens.split([7, 1, 12, 10], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), ours(tokens), rtol=0, atol=1e-5)


def test_left_padded_rows_equal_rows_alone():
    ours, _ = pair()
    long, short = ids(1, 12), ids(1, 12)[:, 5:]
    batch = torch.cat([long, torch.nn.functional.pad(short, (5, 0))])
    mask = torch.ones_like(batch, dtype=torch.bool)
    mask[1, :5] = False
    text = ours.generate(batch, 10, mask=mask)
    assert torch.equal(text[0], ours.generate(long, 10)[0])
    assert torch.equal(text[1, 5:], ours.generate(short, 10)[0])


def test_greedy_generation_equals_that_of_transformers():
    ours, theirs = pair()
    prompt = ids(2, 8)
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, **options
    )
    assert torch.equal(ours.generate(prompt, 24), expected)
    assert torch.equal(torch.stack(list(ours.stream(prompt, 24)), dim=1), expected[:, 8:])


def test_same_seed_same_text_and_no_other_random_state_is_touched():
    ours, _ = pair()
    before = torch.get_rng_state()
    texts = [
        ours.generate(ids(2, 4), 20, 1.0, generator=torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_row_repeats_its_stop_token_and_the_stream_ends_with_the_last_row():
    ours, _ = pair()
    prompt = ids(2, 8)
    free = ours.generate(prompt, 20)[:, 8:]
    stop = free[0, 3].item()
    text = ours.generate(prompt, 20, stop_ids=[stop])[:, 8:]
    first = (free[0] == stop).nonzero()[0].item()
    assert (text[0, first:] == stop).all()
    assert torch.equal(text[1], free[1, : text.shape[1]])


@pytest.mark.parametrize(
    ("prompt", "options", "words"),
    [
        (torch.zeros(1, 0, dtype=torch.long), {}, "the prompt is empty"),
        (torch.tensor([[1, 97]]), {}, "run from 1 to 97, the vocabulary from 0 to 96"),
        (torch.tensor([[-1, 3]]), {}, "run from -1 to 3"),
        (
            torch.ones(1, 120, dtype=torch.long),
            {},
            "10 new tokens do not fit",
        ),
        (torch.ones(1, 3, dtype=torch.long), {"temperature": -1.0}, "temperature is -1.0"),
        (
            torch.ones(1, 3, dtype=torch.long),
            {"mask": torch.tensor([[True, True, False]])},
            "padding must stand on the left",
        ),
        (
            torch.ones(1, 3, dtype=torch.long),
            {"mask": torch.tensor([[True, False, True]])},
            "padding must stand on the left",
        ),
        (
            torch.ones(1, 3, dtype=torch.long),
            {"mask": torch.tensor([[True, True]])},
            r"mask \(1, 2\) is not of prompt \(1, 3\)",
        ),
    ],
)
def test_generation_refuses_what_it_cannot_do(prompt, options, words):
    with pytest.raises(ValueError, match=words):
        pair()[0].generate(prompt, 10, **options)


def test_rotation_keeps_float32_angles_in_a_bfloat16_model():
    ours, _ = pair()
    positions = torch.arange(5000)
    exact = ours.rotary(positions)
    rounded = ours.to(torch.bfloat16).rotary(positions)
    assert torch.equal(exact[0], rounded[0])
    assert torch.equal(exact[1], rounded[1])


# --- weights by name ---


def test_weights_come_back_as_they_went_in():
    ours, theirs = pair()
    back = hf_state_dict(ours)
    assert back.keys() == dict(theirs.named_parameters()).keys()
    assert all(torch.equal(back[name], p) for name, p in theirs.named_parameters())


def test_weights_that_do_not_fit_are_named_and_nothing_is_loaded():
    ours, _ = pair()
    state = {name: tensor.clone() + 1 for name, tensor in hf_state_dict(ours).items()}
    state["model.layers.0.self_attn.q_norm.weight"] = state.pop("model.norm.weight")
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 47)
    before = weights_sha256(hf_state_dict(ours))
    with pytest.raises(ValueError) as caught:
        load_hf_weights(ours, state)
    message = str(caught.value)
    assert "model.norm.weight is missing" in message
    assert "model.layers.0.self_attn.q_norm.weight is extra" in message
    assert "mlp.up_proj.weight has shape (80, 47), expected (80, 48)" in message
    assert weights_sha256(hf_state_dict(ours)) == before


def test_a_tied_head_must_equal_the_embedding():
    ours, theirs = pair()
    state = dict(theirs.state_dict())
    load_hf_weights(ours, state)
    state["lm_head.weight"] = state["lm_head.weight"] + 1e-3
    with pytest.raises(ValueError, match="is tied, but differs"):
        load_hf_weights(ours, state)


# --- config ---


def test_config_survives_the_way_through_transformers():
    config = ModelConfig(**SHAPE)
    assert ModelConfig.from_hf(hf_config(config)) == config
    old_style = {**hf_config(config).to_dict(), "rope_theta": 1234.0}
    del old_style["rope_parameters"]
    assert ModelConfig.from_hf(old_style).rope_theta == 1234.0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": 7}, "hidden_size 48 is not divisible by num_attention_heads 7"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 is not divisible by num_key_value"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ],
)
def test_numbers_that_do_not_fit_are_refused_with_both(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelConfig(**SHAPE | changes)

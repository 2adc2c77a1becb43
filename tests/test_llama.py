"""The Llama decoder alone: its cache, padding, rotary positions, number types, files and settings.

That its logits are Llama's is shown in test_references.py, against transformers.
"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import small_llama
from llama import Int8Linear, KVCache, Llama, LlamaConfig, RMSNorm, published_name, recorded_attention, rotary_angles, rotate


def logits_from_pieces(llama, ids, lengths, padding=None):
    """The logits of ids (B, T) that are read into the cache a piece at a time."""
    cache = KVCache(llama.config, *ids.shape, "cpu", torch.float32)
    pieces = [llama(piece, cache=cache, padding=padding) for piece in ids.split(lengths, dim=1)]
    assert cache.length == ids.shape[1]
    return torch.cat(pieces, dim=1)


# ---- Positions, cache and padding ----

@pytest.mark.parametrize("changes", [
    pytest.param({}, id="grouped-query attention"),
    pytest.param({"num_key_value_heads": 4}, id="multi-head attention"),
    pytest.param({"tie_word_embeddings": True}, id="tied embeddings"),
])
def test_logits_from_the_cache_are_those_of_one_pass(changes):
    torch.manual_seed(0)
    llama = small_llama(**changes)
    ids = torch.randint(0, 768, (2, 20))
    logits = logits_from_pieces(llama, ids, [2, 8, 2, 5, 1, 1, 1])
    torch.testing.assert_close(logits, llama(ids), rtol=0, atol=1e-5)


@pytest.fixture
def padded():
    """A Llama, ids (1, 12), and the same ids with 5 positions of padding at their left (1, 17)."""
    torch.manual_seed(0)
    llama = small_llama()
    ids = torch.randint(3, 768, (1, 12))
    padded_ids = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    return llama, ids, padded_ids


def test_padding_at_the_left_changes_no_logits(padded):
    llama, ids, padded_ids = padded
    logits = llama(padded_ids, padding=torch.tensor([5]))
    torch.testing.assert_close(logits[:, 5:], llama(ids), rtol=0, atol=1e-5)


def test_padding_at_the_left_changes_no_logits_from_the_cache(padded):
    llama, ids, padded_ids = padded
    logits = logits_from_pieces(llama, padded_ids, [10, 6, 1], padding=torch.tensor([5]))
    torch.testing.assert_close(logits[:, 5:], llama(ids), rtol=0, atol=1e-5)


def test_later_tokens_do_not_change_earlier_logits():
    torch.manual_seed(0)
    llama = small_llama()
    ids = torch.randint(0, 768, (1, 10))
    changed = ids.clone()
    changed[0, 7:] = 5
    assert torch.equal(llama(ids)[:, :7], llama(changed)[:, :7])


def test_rotary_scores_depend_on_the_distance_of_two_positions():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_position, key_position):
        turned_q = rotate(q, *rotary_angles(torch.tensor([query_position]), 16, theta=1e4))
        turned_k = rotate(k, *rotary_angles(torch.tensor([key_position]), 16, theta=1e4))
        return (turned_q * turned_k).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-3


# ---- Recorded attention ----

def test_each_pass_adds_the_last_positions_weights_to_every_layer():
    """Of a prompt of two rows, of a piece of two and of one token, read into the cache."""
    llama, ids = small_llama(), torch.randint(0, 768, (2, 8))
    with recorded_attention(llama) as layers:
        logits_from_pieces(llama, ids, [5, 2, 1])
    assert len(layers) == 2
    for tokens in layers:
        assert [weights.shape for weights in tokens] == [(2, 4, 5), (2, 4, 7), (2, 4, 8)]  # (B, heads, keys)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_recorded_weights_are_those_of_the_fused_call(kv_heads):
    """Weights times values is the last position of what attend returns, with and without a mask, to 1e-6."""
    torch.manual_seed(0)
    llama = small_llama(num_key_value_heads=kv_heads)
    attention = llama.layers[0].self_attn
    q = torch.randn(2, 4, 6, 8)  # (B, heads, T, head_dim)
    k, v = torch.randn(2, 2, kv_heads, 6, 8)  # (B, kv_heads, T, head_dim) each
    mask = torch.rand(2, 1, 6, 6) < 0.5
    mask |= torch.eye(6, dtype=torch.bool)
    v_of_heads = v.repeat_interleave(4 // kv_heads, dim=1)
    for settings in ((None, True), (mask, False)):
        with recorded_attention(llama) as layers:
            y = attention.attend(q, k, v, *settings)
        (weights,), _ = layers
        expected = (weights[:, :, None] @ v_of_heads)[:, :, 0]
        torch.testing.assert_close(y[:, :, -1], expected, rtol=0, atol=1e-6)


def test_padding_is_not_looked_at(padded):
    llama, ids, padded_ids = padded
    with recorded_attention(llama) as layers:
        llama(padded_ids, padding=torch.tensor([5]))
        llama(ids)
    for with_padding, without in layers:
        assert not with_padding[..., :5].any()
        torch.testing.assert_close(with_padding[..., 5:], without, rtol=0, atol=1e-5)


def test_recording_changes_no_bit_of_the_logits(padded):
    llama, _, padded_ids = padded
    expected = llama(padded_ids, padding=torch.tensor([5]))
    with recorded_attention(llama):
        assert torch.equal(llama(padded_ids, padding=torch.tensor([5])), expected)


def test_recorded_weights_are_float32_without_a_graph_and_hold_no_other_positions():
    llama, ids = small_llama().bfloat16(), torch.randint(0, 768, (1, 20))
    with recorded_attention(llama) as layers:
        llama(ids)
    (weights,), _ = layers
    assert (weights.dtype, weights.requires_grad) == (torch.float32, False)
    assert weights.untyped_storage().nbytes() == 4 * 20 * 4  # 4 heads, 20 keys, 4 bytes each
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4))


def test_attention_is_as_before_after_an_error():
    llama = small_llama()
    before = [dict(vars(layer.self_attn)) for layer in llama.layers]
    with pytest.raises(KeyError), recorded_attention(llama) as layers:
        raise KeyError
    llama(torch.tensor([[1, 5]]))
    assert [vars(layer.self_attn) for layer in llama.layers] == before
    assert layers == [[], []]


# ---- Number types and memory ----

def test_rms_norm_under_autocast_has_autocasts_type():
    """Rounded to bf16, whose numbers are 2 ** -7 apart: within that of the float32 result."""
    torch.manual_seed(0)
    norm, x = RMSNorm(64, eps=1e-5), torch.randn(5, 64)
    torch.nn.init.normal_(norm.weight)
    exact = norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = norm(x)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert (rounded - exact).abs().max() <= 2 ** -7 * exact.abs().max()


def test_attention_under_a_processors_autocast_computes_in_float32():
    torch.manual_seed(0)
    attention = small_llama().layers[0].self_attn
    q = torch.randn(2, 4, 5, 8).bfloat16()  # (B, heads, T, head_dim)
    k, v = torch.randn(2, 2, 2, 5, 8).bfloat16()  # (B, kv_heads, T, head_dim) each
    exact = attention.attend(q.float(), k.float(), v.float(), mask=None, causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = attention.attend(q, k, v, mask=None, causal=True)
    assert result.dtype == torch.float32
    assert torch.equal(result, exact)


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    llama, ids = small_llama(), torch.randint(0, 768, (2, 8))
    gradients = []
    for llama.checkpointing in (False, True):
        llama.zero_grad()
        llama(ids).square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in llama.parameters()])
    for stored, recomputed in zip(*gradients):
        assert torch.equal(stored, recomputed)


@torch.inference_mode()
def test_a_model_that_recomputes_activations_still_has_its_cache():
    torch.manual_seed(0)
    llama, ids = small_llama(), torch.randint(0, 768, (2, 8))
    llama.checkpointing = True
    logits = logits_from_pieces(llama, ids, [8])
    torch.testing.assert_close(logits, llama(ids), rtol=0, atol=1e-5)


# ---- Files ----

@pytest.mark.parametrize("name, published", [
    ("layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
    ("norm.weight", "model.norm.weight"),
    ("lm_head.weight", "lm_head.weight"),
])
def test_published_names_of_weights(name, published):
    assert published_name(name) == published


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_saved_llama_is_loaded_again(tmp_path, tied):
    torch.manual_seed(0)
    llama, ids = small_llama(tie_word_embeddings=tied), torch.randint(0, 768, (1, 8))
    llama.save_pretrained(tmp_path)
    loaded = Llama.from_pretrained(str(tmp_path))
    assert loaded.config == llama.config
    assert torch.equal(loaded(ids), llama(ids))
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied


def test_tied_weights_are_written_once():
    tensors = small_llama(tie_word_embeddings=True).published_tensors()
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors


def test_a_file_may_hold_tied_weights_twice(tmp_path):
    torch.manual_seed(0)
    llama, ids = small_llama(tie_word_embeddings=True), torch.randint(0, 768, (1, 8))
    llama.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": llama.lm_head.weight.detach().clone()}, file)
    loaded = Llama.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids), llama(ids))
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


# ---- 8 bits ----

@pytest.fixture
def matrix():
    torch.manual_seed(0)
    return torch.randn(24, 64).bfloat16()


def test_a_matrix_of_8_bits_is_rounded_to_the_nearest_step(matrix):
    """A step is 1/127 of a row's largest value, as bf16 holds it."""
    linear = Int8Linear(matrix)
    assert linear.weight.dtype == torch.int8 and linear.scale.shape == (24,)
    difference = linear.weight * linear.scale.float()[:, None] - matrix.float()
    within_range = difference.abs() <= 0.5001 * linear.scale.float()[:, None]
    is_largest = linear.weight.abs() == 127  # where a scale that was rounded down leaves a little more
    assert (within_range | is_largest).all()
    torch.testing.assert_close(linear.scale.float() * 127, matrix.abs().amax(dim=1).float(), rtol=2 ** -8, atol=0)


def test_a_row_of_zeros_stays_zeros(matrix):
    matrix[3] = 0
    assert not Int8Linear(matrix)(torch.ones(1, 64).bfloat16())[0, 3]


@pytest.mark.parametrize("shape, rows", [((1, 1, 64), ...), ((4, 64), ...), ((3, 5, 64), (slice(None), -1)),
                                         ((2, 9, 64), ...)], ids=["one", "four", "apart in memory", "many"])
def test_a_product_of_8_bits_is_that_of_the_rounded_matrix(matrix, shape, rows):
    """In few rows and in many, against float64: to bf16's rounding of the result."""
    linear, x = Int8Linear(matrix), torch.randn(shape).bfloat16()[rows]
    expected = x.double() @ (linear.weight.double() * linear.scale.double()[:, None]).T
    assert linear(x).dtype == torch.bfloat16
    torch.testing.assert_close(linear(x).double(), expected, rtol=2 ** -7, atol=0.02)


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_of_8_bits_differs_by_its_rounding(tmp_path, tied):
    """Its logits from those in float32: by less than 3% of the largest. Only its matrices are rounded."""
    torch.manual_seed(0)
    llama, ids = small_llama(tie_word_embeddings=tied), torch.randint(0, 768, (1, 8))
    llama.save_pretrained(tmp_path)
    rounded = Llama.from_pretrained(tmp_path, dtype=torch.int8)
    assert isinstance(rounded.lm_head, torch.nn.Linear) == tied
    assert rounded.layers[0].mlp.up_proj.weight.dtype == torch.int8
    assert torch.equal(rounded.embed_tokens.weight, llama.embed_tokens.weight.bfloat16())
    expected = llama(ids)
    assert (rounded(ids).float() - expected).abs().max() < 0.03 * expected.abs().max()
    with pytest.raises(ValueError, match="a model of int8 is not saved"):
        rounded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_file_that_does_not_fit_is_refused_in_8_bits_too(tmp_path):
    small_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, file)
    with pytest.raises(ValueError, match="1 missing: model.layers.0.mlp.up_proj.weight"):
        Llama.from_pretrained(tmp_path, dtype=torch.int8)


# ---- Settings ----

@pytest.mark.parametrize("field, value", [
    ("hidden_act", "gelu"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}),
    ("attention_bias", True),
    ("rope_parameters", [1]),
    ("rope_parameters", {"rope_type": "default", "partial_rotary_factor": 0.5}),
    ("quantization_config", {"load_in_8bit": True}),
    ("hidden_size", 30),  # 4 heads do not divide it
    ("num_hidden_layers", 1000),
])
def test_a_config_of_another_model_is_refused(tmp_path, field, value):
    small_llama().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {field: value}
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=field):
        LlamaConfig.from_json(file)


VICUNA = dict(  # the published config.json of vicuna-7b-v1.5, which has no rope_theta
    hidden_act="silu", hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
    num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-5,
    rope_scaling=None, tie_word_embeddings=False, vocab_size=32000)


def test_vicunas_config_gives_the_defaults(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(VICUNA))
    config = LlamaConfig.from_json(tmp_path / "config.json")
    assert config == LlamaConfig()
    assert config.rope_theta == 10_000


def test_a_config_without_an_epsilon_is_refused(tmp_path):
    """transformers would take 1e-6 for it, and Vicuna has 1e-5."""
    config = {name: value for name, value in VICUNA.items() if name != "rms_norm_eps"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks 'rms_norm_eps'"):
        LlamaConfig.from_json(tmp_path / "config.json")


def test_vicuna_has_its_published_size():
    with torch.device("meta"):
        llama = Llama(LlamaConfig())
        logits = llama(torch.zeros(1, 5, dtype=torch.long))
    assert sum(parameter.numel() for parameter in llama.parameters()) == 6_738_415_616
    assert logits.shape == (1, 5, 32000)

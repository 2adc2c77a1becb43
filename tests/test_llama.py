import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import small_llama
from llama import KVCache, Llama, LlamaConfig, RMSNorm, rotary_angles, rotate


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}])
def test_cache_in_pieces_equals_the_whole(changes):
    """A first piece, others and single tokens give the whole's logits: 1e-5 absolute in float32."""
    torch.manual_seed(0)
    llama, ids = small_llama(**changes), torch.randint(0, 768, (2, 20))
    whole, cache = llama(ids), KVCache(llama.config, 2, 20, "cpu", torch.float32)
    pieces = torch.cat([llama(part, cache=cache) for part in ids.split([2, 8, 2, 5, 1, 1, 1], dim=1)], dim=1)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    assert cache.length == 20


def test_padding_at_the_left_changes_nothing():
    torch.manual_seed(0)
    llama, ids = small_llama(), torch.randint(3, 768, (1, 12))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    padding, cache = torch.tensor([5]), KVCache(llama.config, 1, 17, "cpu", torch.float32)
    torch.testing.assert_close(llama(padded, padding=padding)[:, 5:], llama(ids), rtol=0, atol=1e-5)
    pieces = torch.cat([llama(part, cache=cache, padding=padding) for part in padded.split([10, 6, 1], dim=1)], dim=1)
    torch.testing.assert_close(pieces[:, 5:], llama(ids), rtol=0, atol=1e-5)


def test_later_tokens_change_nothing_before():
    torch.manual_seed(0)
    llama, ids = small_llama(), torch.randint(0, 768, (1, 10))
    other = ids.clone()
    other[0, 7:] = 5
    assert torch.equal(llama(ids)[:, :7], llama(other)[:, :7])


def test_rotary_scores_depend_on_distance_only():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    score = lambda i, j: (rotate(q, *rotary_angles(torch.tensor([i]), 16, 1e4)) *
                          rotate(k, *rotary_angles(torch.tensor([j]), 16, 1e4))).sum()
    torch.testing.assert_close(score(7, 3), score(107, 103), rtol=1e-4, atol=1e-4)
    assert abs(score(7, 3) - score(7, 5)) > 1e-3


def test_a_norm_under_autocast_has_its_type():
    torch.manual_seed(0)
    norm, x = RMSNorm(64, 1e-5), torch.randn(5, 64)
    torch.nn.init.normal_(norm.weight)
    exact = norm(x)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = norm(x)
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert (rounded - exact).abs().max() <= 2 ** -7 * exact.abs().max()


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    llama, ids, gradients = small_llama(), torch.randint(0, 768, (2, 8)), []
    for llama.checkpointing in (False, True):
        llama.zero_grad()
        llama(ids).square().mean().backward()
        gradients.append([p.grad.clone() for p in llama.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    with torch.inference_mode():  # a model in training answers too
        cached = llama(ids, cache=KVCache(llama.config, 2, 8, "cpu", torch.float32))
        torch.testing.assert_close(cached, llama(ids), rtol=0, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
def test_saved_and_loaded_is_the_same(tmp_path, tied):
    torch.manual_seed(0)
    llama, ids = small_llama(tie_word_embeddings=tied), torch.randint(0, 768, (1, 8))
    llama.save_pretrained(tmp_path)
    if tied:  # some files hold the tied head too
        file = tmp_path / "model.safetensors"
        save_file(load_file(file) | {"lm_head.weight": llama.lm_head.weight.detach().clone()}, file)
    loaded = Llama.from_pretrained(str(tmp_path))
    assert loaded.config == llama.config and torch.equal(loaded(ids), llama(ids))
    assert (loaded.lm_head.weight is loaded.embed_tokens.weight) == tied


@pytest.mark.parametrize("field, value", [("hidden_act", "gelu"), ("rope_scaling", {"type": "linear", "factor": 2.0}),
                                          ("attention_bias", True), ("rope_parameters", [1]),
                                          ("hidden_size", 30), ("num_hidden_layers", 1000)])
def test_configs_of_other_models_are_refused(tmp_path, field, value):
    small_llama().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ValueError, match=field):
        LlamaConfig.from_json(tmp_path / "config.json")


def test_vicunas_config_gives_the_defaults(tmp_path):
    published = dict(  # vicuna-7b-v1.5's: it does not say rope_theta
        hidden_act="silu", hidden_size=4096, intermediate_size=11008, max_position_embeddings=4096,
        num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=32, rms_norm_eps=1e-5, rope_scaling=None,
        tie_word_embeddings=False, vocab_size=32000)
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = LlamaConfig.from_json(tmp_path / "config.json")
    assert config == LlamaConfig() and config.rope_theta == 10_000
    del published["rms_norm_eps"]  # for which transformers would take another than Vicuna's
    (tmp_path / "config.json").write_text(json.dumps(published))
    with pytest.raises(ValueError, match="lacks 'rms_norm_eps'"):
        LlamaConfig.from_json(tmp_path / "config.json")


def test_vicuna_has_its_published_size():
    with torch.device("meta"):
        llama = Llama(LlamaConfig())
        shape = llama(torch.zeros(1, 5, dtype=torch.long)).shape
    assert sum(p.numel() for p in llama.parameters()) == 6_738_415_616 and shape == (1, 5, 32000)


def test_text_never_becomes_a_control_token(tokenizer):
    for text in ("</s>", "<s>", "a </s> b<unk>", "<image>"):
        ids = tokenizer.encode(text)
        assert not {1, 2} & set(ids) and tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", ["USER: What?", "été 你好 🙂", "two  spaces", "a\nb\n", "12.50", ""])
def test_without_the_dummy_prefix_the_text_is_the_same(tokenizer, text):
    with_prefix, without = tokenizer.encode(text), tokenizer.encode(text, prefix=False)
    assert tokenizer.decode(with_prefix) == text
    assert tokenizer.pieces.decode([tokenizer.pieces.piece_to_id("▁")] + without) == text


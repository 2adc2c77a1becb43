"""The Llama decoder: ConvLLaVA's language model is a Vicuna, which is a fine-tuned Llama (paper, section 3.1).

    llama = Llama.from_pretrained("vicuna-7b-v1.5", dtype=torch.bfloat16)
    logits = llama(torch.tensor([[1, 15043]]))              # (1, 2, 32000)
"""
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.conversation import Tokenizer
from data.weights import check_fit, find_tensors, load_into, read_json, replacing, require, write_json, write_tensors


@dataclass
class LlamaConfig:
    """The sizes of a Llama, under the names of config.json; the defaults are Vicuna-7B v1.5's."""
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path):
        """Reads a config.json. Raises ValueError where it asks for what this Llama does not compute."""
        values = read_json(path)

        # Newer versions of transformers keep theta and scaling in an object of their own.
        rope = values.get("rope_parameters") or {}
        scaling = values.get("rope_scaling") or {}
        for key, part in (("rope_parameters", rope), ("rope_scaling", scaling)):
            if not isinstance(part, dict):
                raise ValueError(f"{path}: {key} should be a JSON object")
            known = dict(rope_type="default", type="default", rope_theta=part.get("rope_theta"))
            if any(name not in known or value != known[name] for name, value in part.items()):
                raise ValueError(f"{path}: {key} is {part}, and only the default rotary embedding is supported")
        theta = values.setdefault("rope_theta", rope.get("rope_theta", cls.rope_theta))
        if "rope_theta" in rope and rope["rope_theta"] != theta:
            raise ValueError(f"{path}: rope_theta is {theta}, and in rope_parameters {rope['rope_theta']}: remove the "
                             "wrong one")
        require(path, values, hidden_act="silu", attention_bias=False, mlp_bias=False, quantization_config=None)

        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "rms_norm_eps")
        for key in required:
            if key not in values:
                raise ValueError(f"{path} lacks {key!r}: it is not the config.json of a Llama")
        if values.get("num_key_value_heads") is None:  # files from before grouped-query attention
            values["num_key_value_heads"] = values["num_attention_heads"]
        config = cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})
        config.check(path)
        if values.get("head_dim") not in (None, config.head_dim):
            raise ValueError(f"{path}: head_dim is {values['head_dim']}, and only hidden_size / num_attention_heads "
                             "is supported")
        return config

    def check(self, path):
        """Raises ValueError where a value has another type, is out of range, or does not divide."""
        for field in fields(self):
            value = getattr(self, field.name)
            # Limits, so that a damaged config does not ask for all of the memory.
            limit = 1000 if field.name == "num_hidden_layers" else 2 ** 30
            if field.type is bool:
                valid = isinstance(value, bool)
            else:
                valid = type(value) in (int, field.type) and 0 < value < limit
            if not valid:
                raise ValueError(f"{path}: {field.name} is {value!r}, expected {field.type.__name__} above 0 "
                                 f"and below {limit}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % kv_heads:
            raise ValueError(f"{path}: hidden_size {self.hidden_size}, num_attention_heads {heads} and "
                             f"num_key_value_heads {kv_heads} do not divide")


class RMSNorm(nn.Module):
    """Scales each position to a root mean square of one, computed in float32.

    Under autocast its result has autocast's type: it is converted once here, and not by each matrix that reads it.
    """

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        device, dtype = x.device.type, x.dtype
        if device != "meta" and torch.is_autocast_enabled(device):  # the meta device has no autocast
            dtype = torch.get_autocast_dtype(device)
        y = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.weight.to(dtype) * y.to(dtype)


def rotary_angles(positions, head_dim, theta):
    """Positions (T,) -> cosines and sines (T, head_dim), in float32."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = torch.outer(positions.float(), frequencies)  # (T, head_dim/2)
    angles = torch.cat((angles, angles), dim=-1)  # the "rotate half" layout: pairs are head_dim/2 apart
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turns queries or keys (B, heads, T, head_dim) by their positions' angles."""
    left, right = x.chunk(2, dim=-1)
    rotated = torch.cat((-right, left), dim=-1)
    return (x * cos + rotated * sin).to(x.dtype)


class KVCache:
    """Preallocated keys and values of every layer: (B, kv_heads, capacity, head_dim), filled up to `length`."""

    def __init__(self, config, batch, capacity, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer, k, v):
        """Writes a layer's k and v from `length` on; returns all so far. `Llama.hidden` moves `length` at its end."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Int8Linear(nn.Module):
    """x W^T with a W of 8-bit whole numbers and a scale for each of its rows: half of bf16's bytes.

    Each token of an answer needs every matrix, and reading them takes most of the time. Training needs more bits.
    """

    def __init__(self, weight):
        """weight: (N, K), of which each row is divided by its scale and rounded to nearest."""
        super().__init__()
        largest = weight.abs().amax(dim=1).float()  # of each row
        scale = (largest / 127).clamp(min=1e-20).bfloat16()  # (N,)
        # the scale in bf16 may be a little smaller, so that the largest number would become 128
        rounded = weight.float().div_(scale[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("weight", rounded.to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, x):
        """x: (..., K), bf16 -> (..., N)"""
        rows = x.flatten(0, -2).contiguous()  # (R, K)
        if len(rows) <= 4 and x.device.type == "cpu":  # torch's product for 8 bits is fast for few rows only
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)).mul_(self.scale)
        return y.unflatten(0, x.shape[:-1])

    def _save_to_state_dict(self, *_):
        raise ValueError("a model of int8 is not saved, as its weights have been rounded: load it in another type")


class Attention(nn.Module):
    """Causal self-attention with rotary positions; with fewer key-value heads than heads it is grouped-query."""

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.num_key_value_heads < config.num_attention_heads
        q_dim = config.num_attention_heads * self.head_dim
        kv_dim = config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_dim, bias=False)
        self.o_proj = nn.Linear(q_dim, config.hidden_size, bias=False)

    def forward(self, x, rotary, mask, extend):
        """rotary: (cosines, sines), each (T, head_dim); mask: True where a query may look, None: causal.

        extend: puts k and v into the cache and returns all of them; None without a cache.
        """
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, heads, T, head_dim)
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, kv_heads, T, head_dim)
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, kv_heads, T, head_dim)
        q = rotate(q, *rotary)
        k = rotate(k, *rotary)
        if extend is not None:
            k, v = extend(k, v)  # (B, kv_heads, past + T, head_dim)

        # A single new token may attend to everything in the cache, so it needs no causal mask. The question is not
        # asked without a cache, as torch.compile would then make a second program for T = 1.
        causal = mask is None and (extend is None or q.shape[2] > 1)
        y = self.attend(q, k, v, mask, causal)
        y = y.transpose(1, 2).flatten(2)  # (B, heads, T, head_dim) -> (B, T, C)
        return self.o_proj(y)

    def attend(self, q, k, v, mask, causal):
        """softmax(q k^T / sqrt(head_dim)) v, each position over those that the mask or causality lets it see."""
        settings = dict(attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)
        if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # The gradient of bf16 attention is slow on processors, so it is computed in float32.
            with torch.autocast("cpu", enabled=False):
                return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **settings)
        return F.scaled_dot_product_attention(q, k, v, **settings)


class MLP(nn.Module):
    """SwiGLU feed-forward network."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention and a feed-forward network, each on a normalised copy of the residual stream (B, T, C)."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask, extend=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, extend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token ids (B, T), or embeddings (B, T, C), to logits (B, T, V)."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.checkpointing = False  # recompute each layer in the backward pass instead of storing its activations

    def init_weights(self, std=0.02):
        """Random weights; a standard deviation of 0.02 is Llama's."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)

    def forward(self, input_ids=None, embeds=None, cache=None, padding=None):
        if embeds is None:
            embeds = self.embed_tokens(input_ids)
        return self.lm_head(self.hidden(embeds, cache, padding))

    def hidden(self, embeds, cache=None, padding=None):
        """Embeddings (B, T, C) -> the final norm's output (B, T, C).

        cache: a KVCache to read and extend. padding: (B,) how many positions at each row's left are
        padding, counted from the cache's start.
        """
        T = embeds.shape[1]
        past = cache.length if cache else 0
        positions = torch.arange(past + T, device=embeds.device)

        # A mask is needed for rows with padding, and for a prompt that is read in several pieces.
        mask = None
        if padding is not None or (past and T > 1):
            queries = positions[past:, None]
            mask = positions <= queries  # (T, past + T)
            if padding is not None:
                is_content = positions >= padding[:, None, None]  # (B, 1, past + T)
                # Padding still sees itself, as a softmax over nothing would be NaN.
                mask = mask & (is_content | (positions == queries))
                mask = mask[:, None]  # (B, 1, T, past + T)

        # Padding shifts all positions of a row alike, which changes nothing: attention depends on distances only.
        rotary = rotary_angles(positions[past:], self.config.head_dim, self.config.rope_theta)

        x = embeds
        for i, layer in enumerate(self.layers):
            extend = partial(cache.extend, i) if cache else None
            if self.checkpointing:
                x = checkpoint(layer, x, rotary, mask, extend, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, extend)
        if cache:
            cache.length += T
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None):
        """Loads a Llama folder: config.json and the weights, safetensors or .bin, one file or shards."""
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(LlamaConfig.from_json(folder / "config.json"))
        model.assign_published(find_tensors(folder), folder, device, dtype)
        return model

    def assign_published(self, tensors, source, device="cpu", dtype=None):
        """Assigns {published name: Stored}. Raises ValueError, which names `source`, where they do not fit.

        With torch.int8 the matrices become Int8Linear, and all else bf16.
        """
        tied = self.config.tie_word_embeddings
        names = {name: published_name(name) for name in self.state_dict()}
        unused = r".*\.rotary_emb\.inv_freq"  # older files hold the rotary frequencies, which are computed here
        if tied:
            names["lm_head.weight"] = names["embed_tokens.weight"]
            unused += r"|lm_head\.weight"
            check_tied(tensors, source)
        tensors = {name: stored for name, stored in tensors.items() if not re.fullmatch(unused, name)}
        if dtype == torch.int8:
            check_fit(self, tensors, names, source)
            matrices = [name for name, part in self.named_modules() if isinstance(part, nn.Linear)]
            for name in matrices[:-1] if tied else matrices:  # the last is lm_head, which is the embedding then
                stored = tensors.pop(names.pop(name + ".weight"))
                self.set_submodule(name, Int8Linear(stored.load(device)))
            dtype = torch.bfloat16
        load_into(self, tensors, names, source, device, dtype)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def published_tensors(self):
        """All weights under their published names; tied ones stand there once."""
        tensors = self.state_dict()
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        return {published_name(name): value for name, value in tensors.items()}

    def save_pretrained(self, folder, dtype=None, tokenizer=None):
        """Writes a Llama folder, with the tokenizer's files where one is given."""
        with replacing(folder) as new:
            write_tensors(new, self.published_tensors(), dtype)
            self.write_configs(new, dtype)
            if tokenizer:
                tokenizer.save(new)

    def write_configs(self, folder, dtype=None, extra=()):
        """Writes config.json, where fields of `extra` replace or join the model's, and generation_config.json."""
        special = dict(bos_token_id=Tokenizer.bos, eos_token_id=Tokenizer.eos, pad_token_id=0)
        dtype = str(dtype or self.norm.weight.dtype).removeprefix("torch.")
        config = dict(architectures=["LlamaForCausalLM"], model_type="llama", **asdict(self.config),
                      hidden_act="silu", **special, torch_dtype=dtype, use_cache=True)
        write_json(folder / "config.json", config | dict(extra))
        write_json(folder / "generation_config.json", special)


@contextmanager
def recorded_attention(llama):
    """Records where new tokens look: the attention of the last position, from which each of them is predicted.

        with recorded_attention(model.llama) as layers:
            model.answer("cat.jpg", "What is this?")
        layers[3][0]    # layer 3, first token: weights (B, heads, keys), float32, on the processor
    """
    layers = [[] for _ in llama.layers]

    def record(attention, tokens, q, k, v, mask, causal):
        # The fused call does this for every position and returns weights @ v. The last one may see all but padding.
        k_of_heads = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # (B, heads, keys, head_dim)
        scores = q[:, :, -1:].float() @ k_of_heads.mT / attention.head_dim ** 0.5  # (B, heads, 1, keys)
        if mask is not None:
            scores = scores.masked_fill(~mask[..., -1:, :], float("-inf"))
        tokens.append(scores.softmax(dim=-1)[:, :, 0].detach().cpu())
        return Attention.attend(attention, q, k, v, mask, causal)

    for layer, tokens in zip(llama.layers, layers):
        layer.self_attn.attend = partial(record, layer.self_attn, tokens)  # goes before the class's method
    try:
        yield layers
    finally:
        for layer in llama.layers:
            del layer.self_attn.attend


def check_tied(tensors, source):
    """Raises ValueError where tied embeddings come with an lm_head of other values."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if head and embedding and not torch.equal(head.load(), embedding.load()):
        raise ValueError(f"{source}: tie_word_embeddings is true, and its lm_head differs from its embedding: set "
                         "it to false")


def published_name(name):
    """Our parameter name as Llama's files have it.

    "layers.3.mlp.up_proj.weight" is "model.layers.3.mlp.up_proj.weight" there; only lm_head stands outside of "model.".
    """
    return name if name.startswith("lm_head.") else "model." + name

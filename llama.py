"""The Llama decoder and its tokenizer: ConvLLaVA's language model is a Vicuna (paper, section 3.1).

    llama = Llama.from_pretrained("vicuna-7b-v1.5", dtype=torch.bfloat16)
    logits = llama(torch.tensor([[1, 15043]]))              # (1, 2, 32000)
"""
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.weights import assign, find_tensors, read_json, replacing, require, write_json, write_tensors


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
        """Reads a config.json; refuses what would make another model of it."""
        found = read_json(path)
        rope = found.get("rope_parameters") or {}  # where newer transformers keep theta and scaling
        if not isinstance(rope, dict):
            raise ValueError(f"{path}: rope_parameters should be a JSON object")
        found.setdefault("rope_theta", rope.get("rope_theta", cls.rope_theta))
        found.setdefault("rope_scaling", None if rope.get("rope_type", "default") == "default" else rope)
        require(path, found, hidden_act="silu", rope_scaling=None, attention_bias=False, mlp_bias=False)
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                    "rms_norm_eps")
        if missing := [key for key in required if key not in found]:
            raise ValueError(f"{path} lacks {missing[0]!r}: it is not the config.json of a Llama")
        if found.get("num_key_value_heads") is None:  # as in files older than grouped-query attention
            found["num_key_value_heads"] = found["num_attention_heads"]
        config = cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})
        for field in fields(cls):
            value = getattr(config, field.name)
            most = 1000 if field.name == "num_hidden_layers" else 2 ** 30
            if not (isinstance(value, bool) if field.type is bool
                    else type(value) in (int, field.type) and 0 < value < most):
                raise ValueError(f"{path}: {field.name} is {value!r}, expected {field.type.__name__} above 0 "
                                 f"and below {most}")
        heads, shared = config.num_attention_heads, config.num_key_value_heads
        if config.hidden_size % heads or heads % shared:
            raise ValueError(f"{path}: hidden_size {config.hidden_size}, num_attention_heads {heads} and "
                             f"num_key_value_heads {shared} do not divide")
        if found.get("head_dim") not in (None, config.head_dim):
            raise ValueError(f"{path}: head_dim is {found['head_dim']}, and only hidden_size / num_attention_heads "
                             "is supported")
        return config


class RMSNorm(nn.Module):
    """Scales each position to a root mean square of one, computed in float32.

    Under autocast its result has autocast's type: one conversion in place of one for each matrix that reads it.
    """

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        device, dtype = x.device.type, x.dtype
        if device != "meta" and torch.is_autocast_enabled(device):
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
    return (x * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class KVCache:
    """Preallocated keys and values of every layer: (B, kv heads, capacity, head_dim), filled up to `length`."""

    def __init__(self, config, batch, capacity, device, dtype):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer, k, v):
        """Appends one layer's k and v; returns all that the layer has so far."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length:end] = k
        self.values[layer, :, :, self.length:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    attend = staticmethod(F.scaled_dot_product_attention)  # train.py takes it out of autocast on processors

    def __init__(self, config):
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x, rotary, mask, extend):
        heads = lambda y: y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, C) -> (B, heads, T, head_dim)
        q, k, v = rotate(heads(self.q_proj(x)), *rotary), rotate(heads(self.k_proj(x)), *rotary), heads(self.v_proj(x))
        if extend is not None:
            k, v = extend(k, v)
        # one query after others sees all; without a cache their number is not asked: torch.compile's graph would break
        causal = mask is None and (extend is None or q.shape[2] > 1)
        y = self.attend(q, k, v, attn_mask=mask, is_causal=causal,
                        enable_gqa=self.q_proj.out_features != self.k_proj.out_features)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, heads, T, head_dim) -> (B, T, C)


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
        self.checkpointing = False  # recompute each layer in the backward pass instead of keeping its activations

    def init_weights(self, std=0.02):
        """Random weights; a standard deviation of 0.02 is Llama's."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=std)

    def forward(self, input_ids=None, embeds=None, cache=None, padding=None):
        return self.lm_head(self.hidden(self.embed_tokens(input_ids) if embeds is None else embeds, cache, padding))

    def hidden(self, embeds, cache=None, padding=None):
        """Embeddings (B, T, C) -> the final norm's output (B, T, C).

        cache: a KVCache to read and extend. padding: (B,) how many positions at each row's left are
        padding, counted from the cache's start.
        """
        t, past = embeds.shape[1], cache.length if cache else 0
        columns = torch.arange(past + t, device=embeds.device)
        mask = None  # causal, or one query that sees all
        if padding is not None or (past and t > 1):
            mask = columns <= columns[past:, None]  # (T, past + T)
            if padding is not None:  # a padding query still sees itself, as softmax needs one key
                mask = mask & ((columns >= padding[:, None, None]) | (columns == columns[past:, None]))
                mask = mask[:, None]  # (B, 1, T, past + T)
        # a row's padding moves all its positions alike, and attention depends on their distances only
        rotary = rotary_angles(columns[past:], self.config.head_dim, self.config.rope_theta)
        x = embeds
        for i, layer in enumerate(self.layers):
            extend = (lambda k, v, i=i: cache.extend(i, k, v)) if cache else None
            given = x, rotary, mask, extend
            x = checkpoint(layer, *given, use_reentrant=False) if self.checkpointing else layer(*given)
        if cache:
            cache.length += t
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=None):
        """Loads a Llama folder: config.json and the weights, safetensors or .bin, one file or shards."""
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(LlamaConfig.from_json(folder / "config.json"))
        model.load_named(find_tensors(folder), folder, device, dtype)
        return model

    def load_named(self, stored, source, device="cpu", dtype=None):
        """Assigns tensors named as published; older files also hold the rotary frequencies, which are not used."""
        tied = self.config.tie_word_embeddings
        unused = re.compile(r".*\.rotary_emb\.inv_freq" + (r"|lm_head\.weight" if tied else ""))
        names = {name: theirs(name) for name in self.state_dict()}
        if tied:
            names["lm_head.weight"] = names["embed_tokens.weight"]
        assign(self, {k: v for k, v in stored.items() if not unused.fullmatch(k)}, names, source, device, dtype)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def named_tensors(self):
        """All weights under their published names."""
        tied = self.config.tie_word_embeddings
        return {theirs(k): v for k, v in self.state_dict().items() if not (tied and k == "lm_head.weight")}

    def save_pretrained(self, folder, dtype=None, tokenizer=None):
        """Writes a Llama folder, with the tokenizer's files where one is given."""
        with replacing(folder) as new:
            write_tensors(new, self.named_tensors(), dtype)
            self.write_configs(new, dtype)
            if tokenizer:
                tokenizer.save(new)

    def write_configs(self, folder, dtype=None, more=()):
        """config.json, with the fields of `more` in place of its own, and generation_config.json."""
        special = dict(bos_token_id=Tokenizer.bos, eos_token_id=Tokenizer.eos, pad_token_id=0)
        dtype = str(dtype or self.norm.weight.dtype).removeprefix("torch.")
        fields = dict(architectures=["LlamaForCausalLM"], model_type="llama", **asdict(self.config), hidden_act="silu",
                      **special, torch_dtype=dtype, use_cache=True)
        write_json(folder / "config.json", fields | dict(more))
        write_json(folder / "generation_config.json", special)


def theirs(name):
    """Our parameter name as it is published: all but the head lie behind "model."."""
    return name if name.startswith("lm_head.") else "model." + name


class Tokenizer:
    """SentencePiece with Llama's special tokens; text never becomes a control token."""
    bos, eos = 1, 2

    def __init__(self, path):
        if not Path(path).is_file():
            raise ValueError(f"{path} is missing: a Llama folder needs its SentencePiece tokenizer")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        self.newline = self.pieces.encode("\n")  # the dummy prefix and a byte, which merge with nothing

    @classmethod
    def of(cls, folder):
        """The tokenizer of a Llama folder; one of another size than its embedding is refused."""
        path, size = Path(folder) / "tokenizer.model", LlamaConfig.from_json(Path(folder) / "config.json").vocab_size
        tokenizer = cls(path)
        if len(tokenizer) != size:
            raise ValueError(f"{path} has {len(tokenizer)} pieces, and config.json says {size}")
        return tokenizer

    def __len__(self):
        return self.pieces.vocab_size()

    def encode(self, text, prefix=True):
        """Text -> ids, with or without the dummy prefix, the space that SentencePiece puts first."""
        return self.pieces.encode(text) if prefix else self.pieces.encode("\n" + text)[len(self.newline):]

    def decode(self, ids):
        return self.pieces.decode(ids)

    def save(self, folder, max_length=2048):
        """Writes tokenizer.model and tokenizer_config.json."""
        (folder / "tokenizer.model").write_bytes(self.pieces.serialized_model_proto())
        write_json(folder / "tokenizer_config.json", dict(
            tokenizer_class="LlamaTokenizer", legacy=False, add_bos_token=True, add_eos_token=False, bos_token="<s>",
            eos_token="</s>", unk_token="<unk>", pad_token="<unk>", model_max_length=max_length))

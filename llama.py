"""The Llama decoder and its tokenizer: ConvLLaVA's language model is a Vicuna (paper, section 3.1).

    llama = Llama.from_pretrained("vicuna-7b-v1.5", dtype=torch.bfloat16)
    logits = llama(torch.tensor([[1, 15043]]))              # (1, 2, 32000)
"""
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint


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
        for key, supported in (("hidden_act", "silu"), ("rope_scaling", None), ("attention_bias", False),
                               ("mlp_bias", False)):
            if found.get(key, supported) != supported:
                raise ValueError(f"{path}: {key} is {found[key]!r}, and only {supported!r} is supported")
        required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        if missing := [key for key in required if key not in found]:
            raise ValueError(f"{path} lacks {missing[0]!r}: it is not the config.json of a Llama")
        found.setdefault("num_key_value_heads", found["num_attention_heads"])
        return cls(**{f.name: found[f.name] for f in fields(cls) if f.name in found})


class RMSNorm(nn.Module):
    """Scales each position to a root mean square of one, computed in float32."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rotary_angles(positions, head_dim, theta):
    """Positions (B, T) -> cosines and sines (B, 1, T, head_dim), in float32."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim)
    angles = positions[:, None, :, None].float() * frequencies  # (B, 1, T, head_dim/2)
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
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
                                           enable_gqa=q.shape[1] != k.shape[1])
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
        padding, counted from the cache's start; a row's positions count from its first real token.
        """
        b, t, _ = embeds.shape
        past = cache.length if cache else 0
        columns = torch.arange(past + t, device=embeds.device)
        positions = columns[past:].expand(b, t)
        mask = None  # causal, or one query that sees all
        if padding is not None:
            positions = (positions - padding[:, None]).clamp(min=0)
        if padding is not None or (past and t > 1):
            mask = columns <= columns[past:, None]  # (T, past + T)
            if padding is not None:  # a padding query still sees itself, as softmax needs one key
                mask = mask & ((columns >= padding[:, None, None]) | (columns == columns[past:, None]))
                mask = mask[:, None]  # (B, 1, T, past + T)
        rotary = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
        x = embeds
        for i, layer in enumerate(self.layers):
            extend = (lambda k, v, i=i: cache.extend(i, k, v)) if cache else None
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, mask, use_reentrant=False)
            else:
                x = layer(x, rotary, mask, extend)
        if cache:
            cache.length += t
        return self.norm(x)

    @classmethod
    def from_pretrained(cls, folder, dtype=None):
        """Loads a Llama folder: config.json and the weights, safetensors or .bin, one file or shards."""
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(LlamaConfig.from_json(folder / "config.json"))
        model.load_named(read_tensors(folder), folder, dtype)
        return model

    def load_named(self, tensors, source, dtype=None):
        """Assigns tensors named as published ("model.layers…", "lm_head…"); refuses missing and unexpected keys."""
        shapes = {theirs(name): (name, value.shape) for name, value in self.state_dict().items()}
        tensors = {k: v for k, v in tensors.items() if not k.endswith("rotary_emb.inv_freq")}
        if self.config.tie_word_embeddings:
            tensors.setdefault("lm_head.weight", tensors.get("model.embed_tokens.weight"))
        missing, unexpected = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
        if missing or unexpected:
            raise ValueError(f"{source} does not fit its config.json: missing {missing[:3]}, unexpected {unexpected[:3]}")
        for key, (_, shape) in shapes.items():
            if tensors[key].shape != shape:
                raise ValueError(f"{source}: {key} has shape {list(tensors[key].shape)}, expected {list(shape)}")
        self.load_state_dict({name: tensors[key].to(dtype or tensors[key].dtype) for key, (name, _) in shapes.items()},
                             assign=True)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def named_tensors(self):
        """All weights under their published names."""
        tied = self.config.tie_word_embeddings
        return {theirs(k): v for k, v in self.state_dict().items() if not (tied and k == "lm_head.weight")}

    def save_pretrained(self, folder, dtype=None):
        """Writes a Llama folder: config.json and model.safetensors; the tokenizer is the caller's to copy."""
        folder, dtype = Path(folder), dtype or self.norm.weight.dtype
        folder.mkdir(parents=True, exist_ok=True)
        config = published_config(self.config, dtype)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = {name: value.detach().to("cpu", dtype).contiguous() for name, value in self.named_tensors().items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def theirs(name):
    """Our parameter name as it is published: all but the head lie behind "model."."""
    return name if name.startswith("lm_head.") else "model." + name


def published_config(config, dtype):
    """The fields of a Llama's config.json."""
    return dict(architectures=["LlamaForCausalLM"], model_type="llama", **asdict(config), hidden_act="silu",
                bos_token_id=1, eos_token_id=2, pad_token_id=0, torch_dtype=str(dtype).removeprefix("torch."), use_cache=True)


def read_json(path):
    try:
        found = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold a JSON object")
    return found


def read_tensors(folder):
    """All tensors of a folder's weights: {published name: tensor}, one file or the shards that its index names."""
    folder = Path(folder)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            files = [folder / name]
            break
        if (folder / f"{name}.index.json").is_file():
            index = read_json(folder / f"{name}.index.json").get("weight_map", {})
            files = [folder / file for file in sorted(set(index.values()))]
            break
    else:
        raise ValueError(f"{folder} holds no weights: expected model.safetensors or an index of shards")
    tensors = {}
    for file in files:
        if file.resolve().parent != folder.resolve():
            raise ValueError(f"{folder}: the index names {file}, which is not in the folder")
        try:
            tensors |= (load_file(file) if file.suffix == ".safetensors"
                        else torch.load(file, map_location="cpu", weights_only=True, mmap=True))
        except FileNotFoundError:
            raise ValueError(f"{file} is missing: the index beside it names it") from None
        except Exception as error:  # safetensors and torch raise many kinds on broken files
            raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    return tensors


class Tokenizer:
    """SentencePiece with Llama's special tokens; text never becomes a control token."""
    bos, eos = 1, 2

    def __init__(self, path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{path} is missing: a Llama folder needs its SentencePiece tokenizer")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{path} is not a SentencePiece model: {error}") from None
        self.newline = self.pieces.encode("\n")  # the dummy prefix and a byte, which merge with nothing

    def __len__(self):
        return self.pieces.vocab_size()

    def encode(self, text, prefix=True):
        """Text -> ids, with or without the dummy prefix, the space that SentencePiece puts first."""
        return self.pieces.encode(text) if prefix else self.pieces.encode("\n" + text)[len(self.newline):]

    def decode(self, ids):
        return self.pieces.decode(ids)

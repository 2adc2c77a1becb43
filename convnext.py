"""ConvNeXt with four or five stages, the visual encoder of ConvLLaVA (paper, section 3.1).

    encoder = ConvNeXt(**CONVNEXT_L_DAGGER)                 # five stages, random weights
    encoder = ConvNeXt.from_pretrained("open_clip_model.safetensors")
    features = encoder(torch.zeros(1, 3, 1536, 1536))       # (1, 3072, 24, 24): 576 visual tokens
"""
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.images import preprocessor_config
from data.weights import assign, find_tensors, read_json, replacing, require, write_json, write_tensors

NANO = dict(depths=(1, 1, 4, 2), dims=(24, 48, 128, 256))
CONVNEXT_L = dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536))  # compresses 32x
CONVNEXT_L_DAGGER = dict(depths=(3, 3, 27, 3, 6), dims=(192, 384, 768, 1536, 3072))  # with stage 5: 64x

# Our parameter names in the words of the two published formats: these pairs are replaced in this
# order, one that begins with a dot wherever it stands in the name, another at the name's start.
TRUNK = "visual.trunk."  # before every OpenCLIP name
OPENCLIP_NAMES = (
    ("stages.0.downsample.", "stem."),
    (".fc", ".mlp.fc"),
)
HF_NAMES = (
    ("stages.0.downsample.0", "embeddings.patch_embeddings"),
    ("stages.0.downsample.1", "embeddings.layernorm"),
    ("stages.", "encoder.stages."),
    (".downsample.", ".downsampling_layer."),
    (".blocks.", ".layers."),
    (".conv_dw.", ".dwconv."),
    (".norm.", ".layernorm."),
    (".fc1.", ".pwconv1."),
    (".fc2.", ".pwconv2."),
    (".gamma", ".layer_scale_parameter"),
)
UNUSED = ("head.norm.", "layernorm.")  # the norm before CLIP's pooled output, in the two formats


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """Depthwise 7x7 convolution, then a feed-forward network on every position; (B, C, H, W) to the same."""

    def __init__(self, dim):
        super().__init__()
        self.conv_dw = nn.Conv2d(dim, dim, kernel_size=7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))  # layer scale

    def forward(self, x):
        y = self.conv_dw(x).permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C), no copy in channels-last memory
        y = self.gamma.to(y.dtype) * self.fc2(F.gelu(self.fc1(self.norm(y))))
        return x + y.permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Downsampling by 2 (by 4 in the first stage, the stem), then `depth` blocks."""

    def __init__(self, in_dim, dim, depth, stem):
        super().__init__()
        if stem:
            self.downsample = nn.Sequential(nn.Conv2d(in_dim, dim, kernel_size=4, stride=4), LayerNorm2d(dim))
        else:
            self.downsample = nn.Sequential(LayerNorm2d(in_dim), nn.Conv2d(in_dim, dim, kernel_size=2, stride=2))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.checkpointing = False  # recompute each block in the backward pass instead of keeping its activations

    def forward(self, x):
        x = self.downsample(x)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


class ConvNeXt(nn.Module):
    """Pixels (B, 3, H, W), any H and W of at least `compression`, to the last stage's map (B, dims[-1], H', W').

    H' = H // 32 with four stages and H // 64 with five; no final norm, no pooling.
    """

    def __init__(self, depths, dims):
        super().__init__()
        self.stages = nn.ModuleList()
        for depth, dim in zip(depths, dims, strict=True):
            self.add_stage(depth, dim)

    def add_stage(self, depth, dim):
        """Appends a newly initialised stage: stage 5 of section 3.1 where there are four."""
        in_dim = self.dims[-1] if self.stages else 3
        stage = Stage(in_dim, dim, depth, stem=not self.stages)
        for module in stage.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) and not module.weight.is_meta:
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.stages.append(stage)

    @property
    def depths(self):
        return [len(stage.blocks) for stage in self.stages]

    @property
    def dims(self):
        return [stage.blocks[0].fc2.out_features for stage in self.stages]

    @property
    def compression(self):
        return 2 ** (len(self.stages) + 1)

    def forward(self, pixels):
        if min(pixels.shape[-2:]) < self.compression:
            raise ValueError(f"an image of {pixels.shape[-1]}x{pixels.shape[-2]} pixels is smaller than one visual "
                             f"token ({self.compression}x{self.compression}): use a larger resolution")
        x = pixels.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = stage(x)
        return x

    @classmethod
    def from_pretrained(cls, path, device="cpu", dtype=None):
        """Loads an OpenCLIP file, or a Hugging Face ConvNeXt folder. Raises ValueError where they do not fit."""
        path = Path(path)
        if not path.is_dir():  # the image trunk of OpenCLIP's two towers
            tensors = {k.removeprefix(TRUNK): v for k, v in find_tensors(path).items() if k.startswith(TRUNK)}
            return cls.from_named(tensors, OPENCLIP_NAMES, path, device, dtype)
        config = read_json(path / "config.json")
        require(path / "config.json", config, hidden_act="gelu")
        model = cls.from_named(find_tensors(path), HF_NAMES, path, device, dtype)
        for key, found in (("depths", model.depths), ("hidden_sizes", model.dims)):
            if config.get(key, found) != found:
                raise ValueError(f"{path}/config.json: {key} is {config[key]}, and its weights say {found}")
        return model

    @classmethod
    def from_named(cls, tensors, names, source, device="cpu", dtype=None):
        """Builds the model that tensors named in a published format's words describe, and assigns them."""
        tensors = {k: v for k, v in tensors.items() if not k.startswith(UNUSED)}
        blocks = {}  # stage: the widths of its blocks, read off the layer scales
        pattern = re.escape(theirs("stages.#.blocks.#.gamma", names)).replace(r"\#", r"(\d+)")
        for key, stored in tensors.items():
            if match := re.fullmatch(pattern, key):
                blocks.setdefault(int(match[1]), []).append(max((1, *stored.shape)))
        if sorted(blocks) not in ([0, 1, 2, 3], [0, 1, 2, 3, 4]):
            raise ValueError(f"{source} holds no ConvNeXt of four or five stages: found no full set of keys like "
                             f"{theirs('stages.0.blocks.0.gamma', names)}")
        with torch.device("meta"):
            model = cls([len(blocks[i]) for i in sorted(blocks)], [blocks[i][0] for i in sorted(blocks)])
        assign(model, tensors, {ours: theirs(ours, names) for ours in model.state_dict()}, source, device, dtype)
        return model

    def save_pretrained(self, folder, dtype=None, resolution=1536):
        """Writes a Hugging Face ConvNeXt folder. resolution: of the square images it is for, in pixels."""
        config = dict(architectures=["ConvNextModel"], model_type="convnext", num_channels=3, patch_size=4,
                      num_stages=len(self.stages), depths=self.depths, hidden_sizes=self.dims, image_size=resolution,
                      hidden_act="gelu", layer_norm_eps=1e-12, layer_scale_init_value=1e-6, drop_path_rate=0.0)
        with replacing(folder) as new:
            write_json(new / "config.json", config)
            write_json(new / "preprocessor_config.json", preprocessor_config(resolution))
            write_tensors(new, {theirs(name, HF_NAMES): value for name, value in self.state_dict().items()}, dtype)


def theirs(name, names):
    """Our parameter name in a published format's words."""
    for ours, published in names:
        if ours.startswith(".") or name.startswith(ours):
            name = name.replace(ours, published, 1)
    return name

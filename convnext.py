"""ConvNeXt with four or five stages, the visual encoder of ConvLLaVA (paper, section 3.1).

    encoder = ConvNeXt.from_pretrained("open_clip_model.safetensors")   # four stages
    encoder.add_stage(6, 3072)                              # a new stage 5
    features = encoder(torch.zeros(1, 3, 1536, 1536))       # (1, 3072, 24, 24): 576 visual tokens
"""
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from data.images import preprocessor_config
from data.weights import find_tensors, load_into, read_json, replacing, require, write_json, write_tensors

NANO = dict(depths=(1, 1, 4, 2), dims=(24, 48, 128, 256))  # the small model's, before stage 5
CONVNEXT_L = dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536))  # compresses 32x
CONVNEXT_L_DAGGER = dict(depths=(3, 3, 27, 3, 6), dims=(192, 384, 768, 1536, 3072))  # with stage 5: 64x


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, dim):
        super().__init__(dim, eps=1e-6)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        x = super().forward(x)
        return x.permute(0, 3, 1, 2)


class DepthwiseConv(nn.Conv2d):
    """7x7 convolution of each channel by itself; (B, C, H, W) to the same."""

    def __init__(self, dim):
        super().__init__(dim, dim, kernel_size=7, padding=3, groups=dim)

    def forward(self, x):
        if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # The gradient of a bf16 convolution is slow on processors, so it is computed in float32.
            with torch.autocast("cpu", enabled=False):
                y = self._conv_forward(x.float(), self.weight.float(), self.bias.float())
            return y.to(self.weight.dtype)  # fsdp casts weights to bf16; the norm that follows needs one type
        return super().forward(x)


class Block(nn.Module):
    """Depthwise convolution, then a feed-forward network on every position; (B, C, H, W) to the same.

    Its Linear layers on (B, H, W, C) equal 1x1 convolutions on (B, C, H, W). They are faster, as in channels-last
    memory the permutation copies nothing.
    """

    def __init__(self, dim):
        super().__init__()
        self.conv_dw = DepthwiseConv(dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        # Layer scale: each branch begins close to zero, so that a new block (stage 5) hardly changes its input.
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6))

    def forward(self, x):
        y = self.conv_dw(x)
        gamma = self.gamma.to(y.dtype)  # the convolution's type: a float32 gamma would turn bf16 to float32
        y = y.permute(0, 2, 3, 1)  # (B, C, H, W) -> (B, H, W, C)
        y = self.norm(y)
        y = F.gelu(self.fc1(y))  # (B, H, W, 4C)
        y = self.fc2(y)
        y = gamma * y
        return x + y.permute(0, 3, 1, 2)  # (B, H, W, C) -> (B, C, H, W)


class Stage(nn.Module):
    """Downsampling by 2 (by 4 in the first stage, where it is the stem), then `depth` blocks."""

    def __init__(self, in_dim, dim, depth, is_stem):
        super().__init__()
        if is_stem:
            self.downsample = nn.Sequential(nn.Conv2d(in_dim, dim, kernel_size=4, stride=4), LayerNorm2d(dim))
        else:
            self.downsample = nn.Sequential(LayerNorm2d(in_dim), nn.Conv2d(in_dim, dim, kernel_size=2, stride=2))
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.checkpointing = False  # recompute each block in the backward pass instead of storing its activations

    def forward(self, x):
        x = self.downsample(x)  # (B, in_dim, H, W) -> (B, dim, H/2, W/2), in the stem (B, dim, H/4, W/4)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointing else block(x)
        return x


class ConvNeXt(nn.Module):
    """Pixels (B, 3, H, W) to the last stage's map (B, dims[-1], H', W'); any H and W of at least `compression`.

    H' = H // 32 with four stages and H // 64 with five. The map is not pooled, as each of its positions becomes a
    visual token. It is not normalised either: CLIP's final norm was trained for the pooled output.
    """

    def __init__(self, depths, dims):
        super().__init__()
        self.stages = nn.ModuleList()
        for depth, dim in zip(depths, dims, strict=True):
            self.add_stage(depth, dim)

    def add_stage(self, depth, dim):
        """Appends a newly initialised stage. On a pretrained ConvNeXt of four stages it is stage 5 (section 3.3)."""
        in_dim = self.dims[-1] if self.stages else 3
        stage = Stage(in_dim, dim, depth, is_stem=not self.stages)
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
        """Pixels along the side of a visual token: 32 with four stages, 64 with five."""
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
        """Loads an OpenCLIP file or a Hugging Face ConvNeXt folder. Raises ValueError where it holds neither."""
        path = Path(path)
        if not path.is_dir():
            tensors = find_tensors(path)
            tensors = {name.removeprefix(TRUNK): t for name, t in tensors.items() if name.startswith(TRUNK)}
            return cls.from_tensors(tensors, OPENCLIP_NAMES, path, device, dtype)

        config = read_json(path / "config.json")
        require(path / "config.json", config, hidden_act="gelu")
        model = cls.from_tensors(find_tensors(path), HF_NAMES, path, device, dtype)
        for key, size in (("depths", model.depths), ("hidden_sizes", model.dims)):
            if config.get(key, size) != size:
                raise ValueError(f"{path}/config.json: {key} is {config[key]}, and its weights say {size}")
        return model

    @classmethod
    def from_tensors(cls, tensors, names, source, device="cpu", dtype=None):
        """Builds the model of the sizes that the tensors have, and assigns them.

        tensors: {published name: Stored}; names: the published format, OPENCLIP_NAMES or HF_NAMES; source: for errors.
        """
        tensors = {name: stored for name, stored in tensors.items() if not name.startswith(UNUSED)}

        # No file gives the sizes of every format, so they are read off the layer scales: one in each block.
        scale = re.escape(published_name("stages.#.blocks.#.gamma", names)).replace(r"\#", r"(\d+)")
        widths = {}  # of each stage's blocks
        for name, stored in tensors.items():
            if match := re.fullmatch(scale, name):
                width = max((1, *stored.shape))  # 1 where a damaged scale has no dimension: its shape is refused below
                widths.setdefault(int(match[1]), []).append(width)
        if sorted(widths) not in ([0, 1, 2, 3], [0, 1, 2, 3, 4]):
            raise ValueError(f"{source} holds no ConvNeXt of four or five stages: it lacks a full set of keys like "
                             f"{published_name('stages.0.blocks.0.gamma', names)}")
        depths = [len(widths[stage]) for stage in sorted(widths)]
        dims = [widths[stage][0] for stage in sorted(widths)]

        with torch.device("meta"):
            model = cls(depths, dims)
        name_map = {name: published_name(name, names) for name in model.state_dict()}
        load_into(model, tensors, name_map, source, device, dtype)
        return model

    def save_pretrained(self, folder, dtype=None, resolution=1536):
        """Writes a Hugging Face ConvNeXt folder. resolution: of the square images it is for, in pixels."""
        config = dict(architectures=["ConvNextModel"], model_type="convnext", num_channels=3, patch_size=4,
                      num_stages=len(self.stages), depths=self.depths, hidden_sizes=self.dims,
                      image_size=resolution, hidden_act="gelu",
                      layer_norm_eps=1e-12,  # of an unused final norm; in the blocks Hugging Face has 1e-6 too
                      layer_scale_init_value=1e-6, drop_path_rate=0.0)
        tensors = {published_name(name, HF_NAMES): value for name, value in self.state_dict().items()}
        with replacing(folder) as new:
            write_json(new / "config.json", config)
            write_json(new / "preprocessor_config.json", preprocessor_config(resolution))
            write_tensors(new, tensors, dtype)


# Rules that turn our parameter names into those of the two published formats, applied in this order. A left side that
# begins with a dot is replaced at its first place in the name, any other only at the name's beginning. So our
# "stages.2.blocks.5.conv_dw.weight" is "visual.trunk.stages.2.blocks.5.conv_dw.weight" in an OpenCLIP file and
# "encoder.stages.2.layers.5.dwconv.weight" in a Hugging Face folder.
TRUNK = "visual.trunk."  # before every OpenCLIP name: the image tower, whose file holds the text tower too
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
UNUSED = ("head.norm.", "layernorm.")  # CLIP's norm of its pooled output, in the two formats


def published_name(name, names):
    """Our parameter name as a published format has it."""
    for ours, published in names:
        if ours.startswith(".") or name.startswith(ours):
            name = name.replace(ours, published, 1)
    return name

"""The visual encoder: the sizes of its map, its block, its stages, and its two file formats.

That its map is ConvNeXt's is shown in test_references.py, against transformers and timm.
"""
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from conftest import small_convnext
from convnext import (CONVNEXT_L, CONVNEXT_L_DAGGER, HF_NAMES, OPENCLIP_NAMES, TRUNK, ConvNeXt,
                      DepthwiseConv, published_name)


# ---- Sizes ----

@pytest.mark.parametrize("stages, size, grid", [
    (4, (64, 96), (2, 3)),
    (5, (64, 64), (1, 1)),
    (5, (250, 391), (3, 6)),  # what is beyond a multiple of 64 is left out
    (5, (512, 512), (8, 8)),
])
def test_the_map_is_the_image_compressed(stages, size, grid):
    encoder = small_convnext(stages)
    assert encoder.compression == {4: 32, 5: 64}[stages]
    features = encoder(torch.randn(2, 3, *size))
    assert features.shape == (2, encoder.dims[-1], *grid)


def test_an_image_smaller_than_a_visual_token_is_refused():
    with pytest.raises(ValueError, match="200x63 pixels is smaller than one visual token"):
        small_convnext()(torch.zeros(1, 3, 63, 200))


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def convnext_l():
    with torch.device("meta"):
        return ConvNeXt(**CONVNEXT_L)


@pytest.fixture(scope="module")
def convnext_l_dagger():
    with torch.device("meta"):
        return ConvNeXt(**CONVNEXT_L_DAGGER)


def test_convnext_l_has_the_published_size(convnext_l):
    """Table 2's 200M: ConvNeXt-L without its head."""
    assert num_parameters(convnext_l) == 196_227_264


def test_stage_5_more_than_triples_the_size(convnext_l, convnext_l_dagger):
    assert convnext_l_dagger.depths == [3, 3, 27, 3, 6]
    assert num_parameters(convnext_l_dagger) > 3 * num_parameters(convnext_l)


def test_1536_pixels_become_576_visual_tokens(convnext_l_dagger):
    features = convnext_l_dagger(torch.empty(1, 3, 1536, 1536, device="meta"))
    assert features.shape == (1, 3072, 24, 24)


# ---- What it computes ----

def test_a_block_is_the_papers_formula():
    """Each step written with functions on (B, C, H, W); to 1e-4 of a value and 1e-5."""
    torch.manual_seed(0)
    block = small_convnext(4).stages[1].blocks[0]
    x = 0.01 * torch.randn(2, 12, 9, 7)  # small, so that the norm's epsilon shows
    column = lambda vector: vector.view(-1, 1, 1)  # (C,) -> (C, 1, 1), to go with (B, C, H, W)

    # depthwise 7x7 convolution
    y = nn.functional.conv2d(x, block.conv_dw.weight, block.conv_dw.bias, padding=3, groups=12)

    # LayerNorm over the channels
    variance = y.var(1, keepdim=True, unbiased=False)
    y = (y - y.mean(1, keepdim=True)) / (variance + 1e-6).sqrt()
    y = y * column(block.norm.weight) + column(block.norm.bias)

    # two 1x1 convolutions with the exact GELU between them
    y = torch.einsum("bchw,dc->bdhw", y, block.fc1.weight) + column(block.fc1.bias)  # (B, 4C, H, W)
    y = y * 0.5 * (1 + torch.erf(y / 2 ** 0.5))
    y = torch.einsum("bchw,dc->bdhw", y, block.fc2.weight) + column(block.fc2.bias)  # (B, C, H, W)

    # layer scale and the residual connection
    expected = x + column(block.gamma) * y
    torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-5)


def test_an_image_shifted_by_the_compression_shifts_the_map_by_one():
    """Section 3.1's reason for convolutions. The border, where zeros are padded, is left out."""
    torch.manual_seed(0)
    encoder = small_convnext(4)
    image = torch.zeros(1, 3, 1024, 1024)
    image[..., 448:512, 448:512] = torch.randn(1, 3, 64, 64)
    features = encoder(image)  # (1, C, 32, 32)
    shifted = encoder(image.roll(32, dims=-1))
    torch.testing.assert_close(
        shifted[..., 12:18, 13:19], features[..., 12:18, 12:18], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_depthwise_convolution_under_a_processors_autocast_computes_in_float32(weight_dtype):
    """Its result has the type of its weights, to which it is rounded once."""
    torch.manual_seed(0)
    conv = DepthwiseConv(12).to(weight_dtype)
    x = torch.randn(2, 12, 9, 7).bfloat16()
    exact = nn.functional.conv2d(
        x.float(), conv.weight.float(), conv.bias.float(), padding=3, groups=12)
    with torch.autocast("cpu", torch.bfloat16):
        result = conv(x)
    assert result.dtype == weight_dtype
    assert torch.equal(result, exact.to(weight_dtype))


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    encoder, image = small_convnext(), torch.randn(1, 3, 64, 64)
    gradients = []
    for checkpointing in (False, True):
        for stage in encoder.stages:
            stage.checkpointing = checkpointing
        encoder.zero_grad()
        encoder(image).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in encoder.parameters()])
    for stored, recomputed in zip(*gradients):
        assert torch.equal(stored, recomputed)


# ---- Stage 5 ----

def test_a_fifth_stage_leaves_the_others_as_they_are():
    encoder = small_convnext(4)
    pretrained = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.add_stage(2, 24)
    assert encoder.depths == [1, 1, 2, 1, 2]
    assert encoder.compression == 64
    for name, value in pretrained.items():
        assert torch.equal(encoder.state_dict()[name], value), name


def test_a_fifth_stage_begins_at_a_standard_deviation_of_0_02():
    """Convolutions and matrices: a standard deviation of 0.02, to 10%, as they have few numbers."""
    torch.manual_seed(0)
    encoder = small_convnext(4)
    encoder.add_stage(2, 24)
    for name, value in encoder.stages[4].named_parameters():
        is_norm = ".norm." in name or name.startswith("downsample.0.")
        if value.dim() > 1:
            assert value.std().item() == pytest.approx(0.02, rel=0.1), name
        elif name.endswith("gamma"):
            assert (value == 1e-6).all(), name
        elif is_norm and name.endswith("weight"):
            assert (value == 1).all(), name
        else:
            assert name.endswith("bias") and (value == 0).all(), name


# ---- Files ----

@pytest.mark.parametrize("name, openclip, hugging_face", [
    ("stages.0.downsample.0.weight", "stem.0.weight", "embeddings.patch_embeddings.weight"),
    ("stages.0.downsample.1.bias", "stem.1.bias", "embeddings.layernorm.bias"),
    ("stages.1.downsample.1.weight", "stages.1.downsample.1.weight",
     "encoder.stages.1.downsampling_layer.1.weight"),
    ("stages.2.blocks.5.conv_dw.weight", "stages.2.blocks.5.conv_dw.weight",
     "encoder.stages.2.layers.5.dwconv.weight"),
    ("stages.1.blocks.0.fc1.weight", "stages.1.blocks.0.mlp.fc1.weight",
     "encoder.stages.1.layers.0.pwconv1.weight"),
    ("stages.4.blocks.0.gamma", "stages.4.blocks.0.gamma",
     "encoder.stages.4.layers.0.layer_scale_parameter"),
])
def test_published_names_of_weights(name, openclip, hugging_face):
    assert published_name(name, OPENCLIP_NAMES) == openclip
    assert published_name(name, HF_NAMES) == hugging_face


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return small_convnext(4)


def openclip_tensors(encoder):
    weights = encoder.state_dict().items()
    return {TRUNK + published_name(name, OPENCLIP_NAMES): value for name, value in weights}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_openclip_file_is_loaded(encoder, tmp_path, suffix):
    tensors = openclip_tensors(encoder)
    tensors["visual.trunk.head.norm.weight"] = torch.ones(20)  # not used here, like the text tower
    tensors["text.positional_embedding"] = torch.ones(3)
    file = tmp_path / f"open_clip_model.{suffix}"
    save = save_file if suffix == "safetensors" else torch.save
    save(tensors, file)
    image = torch.randn(1, 3, 70, 90)
    assert torch.equal(ConvNeXt.from_pretrained(file)(image), encoder(image))


def test_a_saved_folder_is_loaded_again(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "folder")
    image = torch.randn(1, 3, 70, 90)
    assert torch.equal(ConvNeXt.from_pretrained(tmp_path / "folder")(image), encoder(image))


def test_a_saved_folder_has_its_resolution_in_the_image_processors_settings(encoder, tmp_path):
    encoder.save_pretrained(tmp_path / "folder", resolution=128)
    settings = json.loads((tmp_path / "folder" / "preprocessor_config.json").read_text())
    assert settings["size"] == {"shortest_edge": 128}
    assert settings["crop_size"] == {"height": 128, "width": 128}


@pytest.mark.parametrize("change, problem", [
    (dict(hidden_act="relu"), "hidden_act"),
    (dict(depths=[1] * 4), r"depths is \[1, 1, 1, 1\]"),
    (dict(hidden_sizes=[8] * 4), "hidden_sizes"),
])
def test_a_config_that_does_not_fit_the_weights_is_refused(encoder, tmp_path, change, problem):
    encoder.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "config.json"
    config = json.loads(file.read_text()) | change
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=problem):
        ConvNeXt.from_pretrained(tmp_path / "folder")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nothing.safetensors is missing"):
        ConvNeXt.from_pretrained(tmp_path / "nothing.safetensors")


def test_a_folder_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="config.json is missing"):
        ConvNeXt.from_pretrained(tmp_path)


def test_a_file_that_holds_no_weights_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match="text.safetensors cannot be read"):
        ConvNeXt.from_pretrained(tmp_path / "text.safetensors")


def test_a_file_that_lacks_a_weight_is_refused(encoder, tmp_path):
    tensors = openclip_tensors(encoder)
    del tensors["visual.trunk.stem.0.bias"]
    save_file(tensors, tmp_path / "incomplete.safetensors")
    with pytest.raises(ValueError, match="1 missing: stem.0.bias"):
        ConvNeXt.from_pretrained(tmp_path / "incomplete.safetensors")


def test_a_file_of_another_number_of_stages_is_refused(tmp_path):
    save_file(openclip_tensors(small_convnext(3)), tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="holds no ConvNeXt of four or five stages"):
        ConvNeXt.from_pretrained(tmp_path / "small.safetensors")

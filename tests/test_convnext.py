import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from conftest import awake, small_convnext
from convnext import CONVNEXT_L, CONVNEXT_L_DAGGER, OPENCLIP_NAMES, TRUNK, ConvNeXt, theirs


@pytest.mark.parametrize("stages, size, grid", [(4, (64, 96), (2, 3)), (5, (64, 64), (1, 1)), (5, (250, 391), (3, 6)),
                                                (5, (512, 512), (8, 8))])
def test_map_is_the_image_compressed(stages, size, grid):
    encoder = small_convnext(stages)
    assert encoder.compression == (32 if stages == 4 else 64)
    assert encoder(torch.randn(2, 3, *size)).shape == (2, encoder.dims[-1], *grid)


def test_full_size_has_the_published_parameter_counts():
    with torch.device("meta"):
        four, five = ConvNeXt(**CONVNEXT_L), ConvNeXt(**CONVNEXT_L_DAGGER)
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(four) == 196_227_264  # table 2's 200M: ConvNeXt-L without its head
    assert count(five) > 3 * count(four) and five.depths == [3, 3, 27, 3, 6]
    assert five(torch.empty(1, 3, 1536, 1536, device="meta")).shape == (1, 3072, 24, 24)  # 576 visual tokens


def test_block_is_the_formula():
    """FORMATS: depthwise 7x7, LayerNorm, 4x wide erf GELU network, layer scale, residual; written with functions."""
    torch.manual_seed(0)
    block = small_convnext(4).stages[1].blocks[0]
    x = 0.01 * torch.randn(2, 12, 9, 7)  # small, so that the norm's epsilon shows
    y = nn.functional.conv2d(x, block.conv_dw.weight, block.conv_dw.bias, padding=3, groups=12)
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    y = torch.einsum("bchw,dc->bdhw", y * block.norm.weight.view(-1, 1, 1) + block.norm.bias.view(-1, 1, 1),
                     block.fc1.weight) + block.fc1.bias.view(-1, 1, 1)
    y = y * 0.5 * (1 + torch.erf(y / 2 ** 0.5))
    y = torch.einsum("bchw,dc->bdhw", y, block.fc2.weight) + block.fc2.bias.view(-1, 1, 1)
    torch.testing.assert_close(block(x), x + block.gamma.view(-1, 1, 1) * y, rtol=1e-4, atol=1e-5)


def test_translation_by_the_compression_moves_the_map_by_one():
    """Section 3.1's reason for convolutions: away from the border, a shifted image gives the shifted map."""
    torch.manual_seed(0)
    encoder = small_convnext(4)
    image = torch.zeros(1, 3, 1024, 1024)
    image[..., 448:512, 448:512] = torch.randn(1, 3, 64, 64)
    map0, map1 = encoder(image), encoder(image.roll(32, dims=-1))
    torch.testing.assert_close(map0[..., 12:18, 12:18], map1[..., 12:18, 13:19], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_openclip_file_and_folder_give_the_same_network(tmp_path, suffix):
    torch.manual_seed(0)
    encoder = small_convnext(4)
    encoder.save_pretrained(tmp_path / "folder", resolution=128)
    tensors = {TRUNK + theirs(k, OPENCLIP_NAMES): v for k, v in encoder.state_dict().items()}
    tensors |= {"visual.trunk.head.norm.weight": torch.ones(20), "text.positional_embedding": torch.ones(3)}  # not used
    assert "visual.trunk.stages.1.blocks.0.mlp.fc1.weight" in tensors and "visual.trunk.stem.0.weight" in tensors
    file = tmp_path / f"open_clip_model.{suffix}"
    save_file(tensors, file) if suffix == "safetensors" else torch.save(tensors, file)
    image = torch.randn(1, 3, 70, 90)
    for loaded in (ConvNeXt.from_pretrained(file), ConvNeXt.from_pretrained(tmp_path / "folder")):
        assert torch.equal(loaded(image), encoder(image))
    processor = json.loads((tmp_path / "folder" / "preprocessor_config.json").read_text())
    assert processor["crop_size"] == {"height": 128, "width": 128} and processor["size"] == {"shortest_edge": 128}


def test_fifth_stage_is_one_more_entry():
    torch.manual_seed(0)
    four = small_convnext(4)
    weights = {k: v.clone() for k, v in four.state_dict().items()}
    four.add_stage(2, 24)
    assert four.depths == [1, 1, 2, 1, 2] and four.compression == 64
    assert all(torch.equal(four.state_dict()[k], v) for k, v in weights.items())
    for name, new in four.stages[4].named_parameters():
        if new.dim() > 1:  # convolutions and matrices
            assert new.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            expected = 1e-6 if name.endswith("gamma") else float("norm.w" in name or name == "downsample.0.weight")
            assert torch.equal(new, torch.full_like(new, expected)), name


def test_recomputed_activations_give_the_same_gradients():
    torch.manual_seed(0)
    encoder, image, gradients = awake(small_convnext()), torch.randn(1, 3, 64, 64), []
    for checkpointing in (False, True):
        for stage in encoder.stages:
            stage.checkpointing = checkpointing
        encoder.zero_grad()
        encoder(image).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_wrong_files_and_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is missing"):
        ConvNeXt.from_pretrained(tmp_path / "nothing.safetensors")
    (tmp_path / "text.safetensors").write_text("not weights")
    with pytest.raises(ValueError, match="cannot be read"):
        ConvNeXt.from_pretrained(tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="config.json"):
        ConvNeXt.from_pretrained(tmp_path)
    tensors = {TRUNK + theirs(k, OPENCLIP_NAMES): v for k, v in small_convnext(4).state_dict().items()}
    del tensors["visual.trunk.stem.0.bias"]
    save_file(tensors, tmp_path / "lacks.safetensors")
    with pytest.raises(ValueError, match="missing.*stem.0.bias"):
        ConvNeXt.from_pretrained(tmp_path / "lacks.safetensors")
    small_convnext(4).save_pretrained(tmp_path / "folder")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    for change, said in ((dict(hidden_act="relu"), "hidden_act"), (dict(depths=[1] * 4), r"depths is \[1, 1, 1, 1\]"),
                         (dict(hidden_sizes=[8] * 4), "hidden_sizes")):
        (tmp_path / "folder" / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=said):
            ConvNeXt.from_pretrained(tmp_path / "folder")
    with pytest.raises(ValueError, match="smaller than one visual token"):
        small_convnext()(torch.zeros(1, 3, 63, 200))

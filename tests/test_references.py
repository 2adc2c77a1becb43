"""Exactness against transformers and timm, in float32.

Each comparison is made twice: with the numbers stored in tests/golden, and with those that the
libraries compute now, where they are installed. A value may differ by TOLERANCE of the largest
expected one, the tokens not at all. The last tests let transformers read what is written here.
"""
import importlib.util
import json
import shutil

import pytest
import torch
from conftest import ROOT, TOKENIZER
from PIL import Image
from references import (CONVERSATIONS, GOLDEN, IMAGES, LLAMAS, POSITIONS, PROMPT_LENGTHS, SIZES,
                        padded_ids, picture, random_ids, random_input, write_references)
from safetensors.torch import load_file

from convllava import ConvLLaVA
from convnext import ConvNeXt
from data.conversation import IGNORE, IMAGE_TOKEN, Tokenizer, encode_conversation
from data.images import STD, read_image, square
from llama import KVCache, Llama, recorded_attention

TOLERANCE = 2e-4


@pytest.fixture(scope="session", params=["stored", "live"])
def references(request, tmp_path_factory):
    """A folder that references.py wrote: the one in the repo, or a new one."""
    if request.param == "stored":
        return GOLDEN
    for package in ("transformers", "google"):  # google.protobuf reads the tokenizer
        if not importlib.util.find_spec(package):
            pytest.skip("the live comparison needs transformers and protobuf; the stored one runs")
    folder = tmp_path_factory.mktemp("references") / "live"
    write_references(folder)
    return folder


@pytest.fixture
def expected(references):
    return load_file(references / "expected.safetensors")


def assert_close(value, expected):
    assert value.shape == expected.shape
    assert (value - expected).abs().max() <= TOLERANCE * expected.abs().max()


# ---- Parts and the full model ----

@pytest.mark.parametrize("library", ["hf", "timm"])
@pytest.mark.parametrize("stages", [4, 5])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_convnexts_map(references, expected, library, stages, size):
    key = f"convnext-{library}-{stages}-{size[0]}x{size[1]}"
    if key not in expected:
        assert library == "timm" and references != GOLDEN
        pytest.skip("the live comparison with timm needs timm; the stored one runs")
    suffix = ".safetensors" if library == "timm" else ""
    model = ConvNeXt.from_pretrained(references / f"convnext-{library}-{stages}{suffix}")
    assert len(model.stages) == stages
    assert_close(model(random_input(1, 3, *size)), expected[key])


@pytest.mark.parametrize("name", LLAMAS)
@torch.no_grad()
def test_llamas_logits_up_to_position_4000(references, expected, name):
    model = Llama.from_pretrained(references / f"llama-{name}")
    logits = model(random_ids(4000, 128))  # (1, 4000, vocabulary)
    assert_close(logits[0, list(POSITIONS)], expected[f"llama-{name}"])


@pytest.mark.parametrize("name", LLAMAS)
@torch.no_grad()
def test_llamas_logits_from_the_cache_up_to_position_4000(references, expected, name):
    model = Llama.from_pretrained(references / f"llama-{name}")
    cache = KVCache(model.config, 1, 4000, "cpu", torch.float32)
    pieces = random_ids(4000, 128).split([1999, 1, 1000, 1000], dim=1)
    logits = torch.cat([model(piece, cache=cache) for piece in pieces], dim=1)
    assert_close(logits[0, list(POSITIONS)], expected[f"llama-{name}"])


@pytest.mark.parametrize("name", LLAMAS)
@torch.no_grad()
def test_recorded_attention_is_llamas_to_1e_5(references, name):
    """Of two prompts, one of them padded on the left, and of four tokens that are read into the cache behind them."""
    expected = load_file(references / "attention.safetensors")[name]  # (layers, B, heads, 5, keys)
    model = Llama.from_pretrained(references / f"llama-{name}")
    ids, padding = padded_ids()
    cache = KVCache(model.config, *ids.shape, "cpu", torch.float32)
    with recorded_attention(model) as layers:
        for piece in ids.split([max(PROMPT_LENGTHS), 1, 1, 1, 1], dim=1):
            model(piece, cache=cache, padding=padding)
    for tokens, expected_tokens in zip(layers, expected, strict=True):
        for weights, expected_weights in zip(tokens, expected_tokens.unbind(2), strict=True):
            num_keys = weights.shape[-1]
            torch.testing.assert_close(weights, expected_weights[..., :num_keys], rtol=0, atol=1e-5)


IDS = random_ids(30, 768)[0]
PROMPT = torch.cat([IDS[:10], torch.tensor([IMAGE_TOKEN]), IDS[10:]])
PIXELS = random_input(1, 3, 192, 256)[0]


@pytest.fixture
def released(references, tmp_path):
    """The checkpoint in the released layout, with the tokenizer that it lacks."""
    shutil.copytree(references / "convllava", tmp_path, dirs_exist_ok=True)
    shutil.copy(TOKENIZER, tmp_path / "tokenizer.model")
    return ConvLLaVA.from_pretrained(tmp_path)


@torch.no_grad()
def test_convllavas_logits(released, expected):
    assert_close(released([PROMPT], [PIXELS])[0], expected["whole-logits"])


@torch.no_grad()
def test_convllavas_loss(released, expected):
    labels = PROMPT.clone()
    labels[:21] = IGNORE
    assert_close(released([PROMPT], [PIXELS], [labels]), expected["whole-loss"])


def test_convllavas_greedy_tokens(released, expected):
    """All 64 that are expected, or those up to </s>, where only our model ends."""
    tokens = [token for (token,) in released.generate([PROMPT], [PIXELS], max_new_tokens=64)]
    assert tokens == expected["whole-greedy"][:len(tokens)].tolist()
    assert len(tokens) == 64 or tokens[-1] == Tokenizer.eos


# ---- Images and text ----

@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("is_turned", [False, True], ids=["upright", "turned"])
def test_square_images_are_within_one_grey_level(expected, tmp_path, name, is_turned):
    height, width, resolution = IMAGES[name]
    image, exif = picture(height, width), Image.Exif()
    if is_turned:  # as a camera stores it, with a note to turn it clockwise when it is shown
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif[0x0112] = 6  # orientation
    image.save(tmp_path / "image.png", exif=exif)

    pixels = square(read_image(tmp_path / "image.png"), resolution)
    difference = (pixels - expected[f"image-{name}"]).abs()
    grey_levels = difference * torch.tensor(STD).view(3, 1, 1) * 255
    assert grey_levels.max() < 1.01


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_tokens_and_labels(references, tokenizer, number):
    conversation = json.loads((references / "tokens.json").read_text())[number]
    ids, labels = encode_conversation(tokenizer, conversation["turns"])
    assert ids == conversation["ids"]
    assert labels == conversation["labels"]


# ---- transformers reads what is written ----

@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="this comparison needs transformers")


@pytest.fixture(scope="session")
def shipped():
    return ConvLLaVA.from_pretrained(ROOT / "data" / "nano" / "convllava-nano")


@pytest.fixture(scope="session")
def saved(shipped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shipped") / "saved"
    shipped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", LLAMAS)
@torch.no_grad()
def test_transformers_reads_a_saved_llama(transformers, tmp_path, name):
    model = Llama.from_pretrained(GOLDEN / f"llama-{name}")
    model.save_pretrained(tmp_path / "saved")
    ids = random_ids(50, 128)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert_close(model(ids), reference(ids).logits)


@torch.no_grad()
def test_transformers_reads_a_saved_convnext(transformers, tmp_path):
    model = ConvNeXt.from_pretrained(GOLDEN / "convnext-timm-5.safetensors")
    model.save_pretrained(tmp_path / "saved")
    pixels = random_input(1, 3, 250, 391)
    reference = transformers.ConvNextModel.from_pretrained(tmp_path / "saved")
    assert_close(model(pixels), reference(pixels).last_hidden_state)


def test_transformers_makes_the_same_pixels_by_the_saved_settings(transformers, shipped, saved):
    processor = transformers.AutoImageProcessor.from_pretrained(
        saved / "vision_tower", backend="pil")
    image = picture(250, 250)
    expected = torch.as_tensor(processor(image, return_tensors="pt").pixel_values[0])
    assert_close(square(image, shipped.resolution), expected)


def test_transformers_makes_the_same_tokens_by_the_saved_tokenizer(transformers, shipped, saved):
    # Before 5.24, AutoTokenizer takes another class for a LLaVA, and loses the first space.
    reference = transformers.LlamaTokenizer.from_pretrained(saved)
    text = "USER: What is the total? ASSISTANT: 12.50"
    ids = shipped.tokenizer.encode(text)
    ids_after_end = shipped.tokenizer.encode(text, prefix=False)  # no dummy prefix after </s>
    expected = [Tokenizer.bos, *ids, Tokenizer.eos, *ids_after_end]
    assert reference(f"{text}</s>{text}").input_ids == expected


def test_transformers_ends_answers_by_the_saved_settings(transformers, saved):
    settings = transformers.GenerationConfig.from_pretrained(saved)
    assert settings.eos_token_id == Tokenizer.eos

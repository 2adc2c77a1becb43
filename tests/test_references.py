"""Exactness against transformers and timm: their stored numbers (tests/golden), and live where they are there."""
import importlib.util
import json
import shutil

import pytest
import torch
from conftest import ROOT, TOKENIZER
from PIL import Image
from references import (CONVERSATIONS, GOLDEN, IMAGES, LLAMAS, POSITIONS, SIZES, picture, random_ids, random_input,
                        write_references)
from safetensors.torch import load_file

from convllava import ConvLLaVA
from convnext import ConvNeXt
from data.conversation import IMAGE_TOKEN, encode_conversation
from data.images import STD, read_image, square
from llama import KVCache, Llama

TOLERANCE = 2e-4  # of the largest value, in float32


@pytest.fixture(scope="session", params=["stored", "live"])
def references(request, tmp_path_factory):
    """A folder that references.py has written: the one in the repo, or one of now."""
    if request.param == "stored":
        return GOLDEN
    needed = ("transformers", "google.protobuf")
    if missing := [name for name in needed if not importlib.util.find_spec(name.split(".")[0])]:
        pytest.skip(f"the live comparison needs {' and '.join(missing)}; the stored one runs")
    folder = tmp_path_factory.mktemp("references") / "live"
    write_references(folder)
    return folder


@pytest.fixture
def expected(references):
    return load_file(references / "expected.safetensors")


def assert_close(ours, theirs):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@pytest.mark.parametrize("library", ["hf", "timm"])
@pytest.mark.parametrize("stages", [4, 5])
@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_convnext(references, expected, library, stages, size):
    key = f"convnext-{library}-{stages}-{size[0]}x{size[1]}"
    if key not in expected:
        assert references != GOLDEN
        pytest.skip("the live comparison with timm needs timm; the stored one runs")
    name = f"convnext-{library}-{stages}" + ".safetensors" * (library == "timm")
    model = ConvNeXt.from_pretrained(references / name)
    assert len(model.stages) == stages
    assert_close(model(random_input(1, 3, *size)), expected[key])


@pytest.mark.parametrize("name", LLAMAS)
@torch.no_grad()
def test_llama_up_to_4000_positions_in_and_out_of_the_cache(references, expected, name):
    model, ids = Llama.from_pretrained(references / f"llama-{name}"), random_ids(4000, 128)
    assert_close(model(ids)[0, list(POSITIONS)], expected[f"llama-{name}"])
    cache = KVCache(model.config, 1, 4000, "cpu", torch.float32)
    logits = [model(piece, cache=cache) for piece in ids.split([1999, 1, 1000, 1000], dim=1)]
    assert_close(torch.cat(logits, dim=1)[0, list(POSITIONS)], expected[f"llama-{name}"])


@torch.no_grad()
def test_whole_model(references, expected, tmp_path):
    shutil.copytree(references / "convllava", tmp_path, dirs_exist_ok=True)
    (tmp_path / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    model, pixels = ConvLLaVA.from_pretrained(tmp_path), random_input(1, 3, 192, 256)[0]
    ids = random_ids(30, 768)[0]
    prompt = torch.cat([ids[:10], torch.tensor([IMAGE_TOKEN]), ids[10:]])
    assert_close(model([prompt], [pixels])[0], expected["whole-logits"])
    labels = torch.cat([torch.full((21,), -100), prompt[21:]])
    assert_close(model([prompt], [pixels], [labels]), expected["whole-loss"])
    said = [step[0] for step in model.generate([prompt], [pixels], max_new_tokens=64)]
    assert said == expected["whole-greedy"].tolist()[:len(said)] and (len(said) == 64 or said[-1] == 2)


@pytest.mark.parametrize("name", IMAGES)
@pytest.mark.parametrize("orientation", [1, 6])
def test_preprocessing_is_within_one_grey_level(expected, tmp_path, name, orientation):
    height, width, resolution = IMAGES[name]
    image, exif = picture(height, width), Image.Exif()
    if orientation == 6:  # to be turned clockwise by a quarter when it is shown
        image, exif[0x0112] = image.transpose(Image.Transpose.ROTATE_90), 6
    image.save(tmp_path / "image.png", exif=exif)
    difference = square(read_image(tmp_path / "image.png"), resolution) - expected[f"image-{name}"]
    levels = difference.abs() * torch.tensor(STD).view(3, 1, 1) * 255
    assert levels.max() < 1.01


@pytest.mark.parametrize("number", range(len(CONVERSATIONS)))
def test_tokens_and_labels(references, tokenizer, number):
    sample = json.loads((references / "tokens.json").read_text())[number]
    assert encode_conversation(tokenizer, sample["turns"]) == (sample["ids"], sample["labels"])


@pytest.mark.parametrize("kind", ["llama", "convnext", "processors"])
@torch.no_grad()
def test_transformers_reads_what_is_written(kind, tmp_path):
    transformers = pytest.importorskip("transformers", reason="this comparison needs transformers")
    if kind == "convnext":
        ours = ConvNeXt.from_pretrained(GOLDEN / "convnext-timm-5.safetensors")
        ours.save_pretrained(tmp_path / "saved")
        pixels = random_input(1, 3, 250, 391)
        theirs = transformers.ConvNextModel.from_pretrained(tmp_path / "saved")
        assert_close(ours(pixels), theirs(pixels).last_hidden_state)
        return
    if kind == "processors":
        ours = ConvLLaVA.from_pretrained(ROOT / "data" / "nano" / "convllava-nano")
        ours.save_pretrained(tmp_path / "saved")
        processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "saved" / "vision_tower", backend="pil")
        image, text = picture(250, 250), "USER: What is the total? ASSISTANT: 12.50"
        theirs = torch.as_tensor(processor(image, return_tensors="pt").pixel_values[0])
        assert_close(square(image, ours.resolution), theirs)
        # before 5.24, AutoTokenizer takes another class where the model is a LLaVA, and loses the first space
        theirs = transformers.LlamaTokenizer.from_pretrained(tmp_path / "saved")
        more = ours.tokenizer.encode(text, prefix=False)  # after a control token there is no dummy prefix
        assert theirs(f"{text}</s>{text}").input_ids == [1, *ours.tokenizer.encode(text), 2, *more]
        assert transformers.GenerationConfig.from_pretrained(tmp_path / "saved").eos_token_id == 2
        return
    for name in LLAMAS:
        ours, ids = Llama.from_pretrained(GOLDEN / f"llama-{name}"), random_ids(50, 128)
        ours.save_pretrained(tmp_path / name)
        assert_close(ours(ids), transformers.LlamaForCausalLM.from_pretrained(tmp_path / name)(ids).logits)

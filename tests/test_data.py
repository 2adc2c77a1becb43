import json
import math
import random
import re
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from conftest import ROOT, refused, run
from convllava import splice
from convnext import ConvNeXt
from data import check
from data.conversation import IGNORE, IMAGE_TOKEN, encode_conversation, parse_turns
from data.dataset import GroupedSampler, LlavaDataset, collate, read_mixture
from data.images import MEAN, PAD_COLOUR, STD, any_aspect, read_image, square
from data.nano import pretrain
from data.nano.generate import (COLOURS, EVERYTHING, FILES, ITEMS, SHAPES, Page, code, date, is_for, length, listing,
                                make_page, number, price, sample, shapes, write_examples)
from llama import Llama, Tokenizer

NANO = ROOT / "data" / "nano" / "backbones" / "vicuna-nano" / "tokenizer.model"
REAL = ROOT.parent / "shared" / "assets" / "llama-tokenizer.model"


def entry(*said, image="a.png"):
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(said)]
    return {"id": "0", "conversations": said} | ({"image": image} if image else {})


# Images

def grey(pixels):
    """Normalised (3, H, W) back to 0-255."""
    return (pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)) * 255


@pytest.mark.parametrize("size", [(200, 90), (90, 200), (77, 76), (30, 30)])
def test_square_pads_with_the_mean_colour_and_resizes(size):
    image = Image.effect_noise(size, 60).convert("RGB")
    side = max(size)
    padded = np.zeros((side, side, 3), np.uint8) + np.array(PAD_COLOUR, np.uint8)
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    padded[top:top + size[1], left:left + size[0]] = np.asarray(image)
    expected = np.asarray(Image.fromarray(padded).resize((128, 128), Image.Resampling.BICUBIC))
    pixels = square(image, 128)
    assert pixels.shape == (3, 128, 128) and PAD_COLOUR == (122, 116, 104)
    expected = torch.from_numpy(expected.copy()).permute(2, 0, 1).float()
    torch.testing.assert_close(grey(pixels), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize("size, shape", [((200, 100), (3, 64, 128)), ((100, 333), (3, 213, 64)),
                                         ((50, 50), (3, 64, 64))])
def test_any_aspect_makes_the_short_side_the_resolution(size, shape):
    assert any_aspect(Image.new("RGB", size), 64).shape == shape


def test_any_aspect_refuses_what_would_not_fit():
    with pytest.raises(ValueError, match="20000x20"):
        any_aspect(Image.new("RGB", (20000, 20)), 512)


def test_files_of_every_kind_are_read_as_seen(tmp_path):
    colour = (200, 100, 50)
    base = Image.new("RGB", (40, 20), colour)
    base.paste((10, 20, 30), (0, 0, 20, 20))  # left half dark
    seen = {}
    base.save(tmp_path / "rgb.png")
    base.quantize(8).save(tmp_path / "palette.png")
    base.convert("RGBA").save(tmp_path / "rgba.png")
    base.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    base.save(tmp_path / "animated.gif", save_all=True, append_images=[Image.new("RGB", (40, 20))])
    turned = base.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned.save(tmp_path / "exif.jpg", exif=exif, quality=95)
    base.save(tmp_path / "odd.png", exif=b"no metadata at all")
    for name in ("rgb.png", "palette.png", "rgba.png", "cmyk.jpg", "animated.gif", "exif.jpg", "odd.png"):
        image = read_image(tmp_path / name)
        assert image.mode == "RGB" and image.size == (40, 20), name
        seen[name] = np.abs(np.asarray(image).astype(int) - np.asarray(base).astype(int))[:, [5, 35]].max()
    assert all(error <= 12 for error in seen.values()), seen
    deep = Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16))
    deep.save(tmp_path / "deep.png")
    levels = np.asarray(read_image(tmp_path / "deep.png"))[..., 0].flatten()
    assert levels[0] == 0 and levels[-1] == 255 and abs(int(levels[2048]) - 128) <= 1
    Image.fromarray(np.full((2, 2), 65_900, np.int32)).save(tmp_path / "deeper.tif")  # above 16 bits: white
    assert np.asarray(read_image(tmp_path / "deeper.tif")).min() == 255


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (3, 9000)])
def test_extreme_sizes_are_read(tmp_path, size):
    Image.new("RGB", size, (255, 255, 255)).save(tmp_path / "a.png")
    pixels = grey(square(read_image(tmp_path / "a.png"), 64))
    assert pixels.shape == (3, 64, 64) and pixels.max() > 123


def test_a_long_image_is_reduced_before_it_is_padded(monkeypatch):
    image, new, sides = Image.new("RGB", (20000, 20)), Image.new, []
    monkeypatch.setattr(Image, "new", lambda mode, size, *colour: sides.append(max(size)) or new(mode, size, *colour))
    square(image, 64)
    assert sides and max(sides) <= 10_000  # 20,000 x 20,000 would take 1.2 GB


def test_unreadable_files_are_refused_with_their_name(tmp_path, monkeypatch):
    Image.effect_noise((60, 60), 60).save(tmp_path / "whole.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:1500])
    (tmp_path / "text.jpg").write_text("this is no image")
    (tmp_path / "empty.png").write_bytes(b"")
    header = bytearray((tmp_path / "whole.png").read_bytes())
    header[16:20] = bytes(4)  # a width of zero
    (tmp_path / "zero.png").write_bytes(header)
    (tmp_path / "folder.png").mkdir()
    for name, said in (("truncated.png", "not a whole image"), ("text.jpg", "not a whole image"),
                       ("empty.png", "not a whole image"), ("zero.png", "not a whole image"),
                       ("folder.png", "a folder"), ("missing.png", "no image at")):
        with pytest.raises(ValueError, match=said) as error:
            read_image(tmp_path / name)
        assert name in str(error.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="whole.png has too many pixels"):
        read_image(tmp_path / "whole.png")


# Conversations

def test_template_with_the_shipped_tokenizer(tokenizer):
    turns = [(1, "What is it?", "A pen."), (0, "Sure?", "")]
    ids, labels = encode_conversation(tokenizer, turns)
    at = ids.index(IMAGE_TOKEN)
    assert ids[0] == tokenizer.bos and tokenizer.decode(ids[1:at]).endswith("answers to the user's questions. USER: ")
    first = ids.index(tokenizer.eos)
    assert tokenizer.decode(ids[at + 1:first]) == "\nWhat is it? ASSISTANT: A pen."
    supervised = [label for label in labels if label != IGNORE]
    assert supervised.count(tokenizer.eos) == 2
    assert tokenizer.decode(supervised[:supervised.index(tokenizer.eos)]) == "A pen."
    for half in ([(0, "\udcff?", None)], [(0, "Q", "\ud83d")]):
        with pytest.raises(ValueError, match="half a character"):
            encode_conversation(tokenizer, half)
    prompt, _ = encode_conversation(tokenizer, [turns[0], (0, "Sure?", None)])
    assert ids[:len(prompt)] == prompt  # sampling sees what training saw
    ids, _ = encode_conversation(tokenizer, [(1, "", "A pen.")])
    assert tokenizer.decode(ids[ids.index(IMAGE_TOKEN) + 1:-1]) == " ASSISTANT: A pen."  # only the image, no new line


@pytest.mark.skipif(not REAL.is_file(), reason="the real Llama tokenizer is not part of the project")
def test_template_with_the_real_tokenizer():
    """The two vectors of the original's behaviour: one turn with an image, three turns with it at the front."""
    tokenizer = Tokenizer(REAL)
    turns, _ = parse_turns(entry("<image>\nWhat is this?", "A cat sitting on a mat."))
    ids, labels = encode_conversation(tokenizer, turns)
    assert len(ids) == 55 and [i for i in labels if i != IGNORE] == [319, 6635, 16246, 373, 263, 1775, 29889, 2]
    ids, labels = encode_conversation(tokenizer, parse_turns(entry(
        "What is this?\n<image>", "A receipt.", "What is the total?", "$12.50", "And the tax?", "1.25"))[0])
    assert len(ids) == 88 and ids[-57:] == [
        3148, 1001, 29901, 29871, -200, 29871, 13, 5618, 338, 445, 29973, 319, 1799, 9047, 13566, 29901,
        319, 2414, 21278, 29889, 2, 11889, 29901, 1724, 338, 278, 3001, 29973, 319, 1799, 9047, 13566, 29901,
        395, 29896, 29906, 29889, 29945, 29900, 2, 11889, 29901, 1126, 278, 8818, 29973, 319, 1799, 9047, 13566, 29901,
        29871, 29896, 29889, 29906, 29945, 2]
    assert [i for i in labels if i != IGNORE] == [319, 2414, 21278, 29889, 2, 395, 29896, 29906, 29889, 29945, 29900, 2,
                                                  29871, 29896, 29889, 29906, 29945, 2]


def test_parsing_moves_images_and_drops_a_first_answer():
    turns, images = parse_turns(entry("  Look: <image> what?  ", "A", "b<image>"[:1], "C"))
    assert turns == [(1, "Look:  what?", "A"), (0, "b", "C")] and images == ["a.png"]
    lost = entry("x", "<image>\nQ", "A")
    lost["conversations"] = [{"from": "gpt", "value": "hello"}] + [
        {"from": f, "value": v} for f, v in (("human", "<image>\nQ"), ("gpt", "A"))]
    assert parse_turns(lost)[0] == [(1, "Q", "A")]
    assert parse_turns(entry("the tag <image>", "A", image=None))[0] == [(0, "the tag <image>", "A")]
    assert parse_turns(entry("<image> Q ", "A", " and? ", "B"))[0] == [(1, "Q", "A"), (0, " and? ", "B")]
    two = parse_turns(entry("<image>\n<image>\nCompare.", "A", image=["a.png", "b.png"]))
    assert two == ([(2, "Compare.", "A")], ["a.png", "b.png"])


@pytest.mark.parametrize("broken, said", [
    ("text", "no list"), ({}, "no list"), ({"conversations": []}, "alternate"), ({"conversations": [1]}, "are not"),
    ({"conversations": [{"from": "human", "value": 3}]}, "are not"), (entry("Q"), "alternate"),
    ({"conversations": [{"from": "system", "value": "Q"}]}, "are not"),
    ({"conversations": [{"from": "human", "value": "Q"}] * 2}, "alternate"),
    (entry("<image>Q", "A", image=5), "not a path"), (entry("<image>Q", "A", image=["a.png", 5]), "not a path"),
    (entry("no tag", "A"), "1 images and 0 times"),
    (entry("<image><image>Q", "A"), "1 images and 2 times")])
def test_wrong_samples_say_what_is_wrong(broken, said):
    with pytest.raises(ValueError, match=said):
        parse_turns(broken)


# Dataset, collator, sampler

@pytest.fixture
def dataset(tmp_path, model):
    def make(*entries):
        Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
        (tmp_path / "data.json").write_text(json.dumps(entries))
        return LlavaDataset([(tmp_path / "data.json", tmp_path)], model, lambda image: square(image, 192))
    return make


def test_several_sources_are_one_dataset(pages, model):
    pairs = [(pages / "captions.json", pages), (pages / "instructions.json", pages)]
    data = LlavaDataset(pairs, model, lambda image: square(image, 64))
    batch = collate([data[i] for i in range(24, 34)])
    assert len(data) == 48 and data.entry(30)[2].endswith("instructions.json, sample 6")
    assert sum(int((ids == IMAGE_TOKEN).sum()) for ids in batch["input_ids"]) == len(batch["images"])


def test_unreadable_samples_are_named_and_replaced(dataset, tmp_path):
    good = entry("<image>Q", "A")
    gone, outside = entry("<image>Q", "A", image="gone.png"), entry("<image>Q", "A", image="../a.png")
    absolute = entry("<image>Q", "A", image=str(tmp_path / "a.png"))
    data = dataset(good, gone, outside, {"id": 1}, good, absolute)
    (tmp_path.parent / "a.png").write_bytes((tmp_path / "a.png").read_bytes())
    for index, words in ((1, "gone.png"), (2, "leaves its folder"), (3, "no list"), (5, "leaves its folder")):
        item = data[index]
        assert len(item["images"]) == 1 and len(item["unreadable"]) == 1
        assert words in item["unreadable"][0] and f"data.json, sample {index}" in item["unreadable"][0]
    assert data[0]["unreadable"] == []
    with pytest.raises(ValueError, match="no sample can be read"):
        dataset({"id": 1})[0]
    data = dataset(*[good] * 300, *[gone] * 200)  # more in a row than are tried
    assert len(data[300]["images"]) == 1 and "sample 300" in data[300]["unreadable"][0]
    (tmp_path / "data.json").write_text("[" + " " * 100_000)
    with pytest.raises(ValueError, match="data.json has been changed"):
        data[0]


def test_images_behind_a_link_are_read(dataset, tmp_path):
    data = dataset(entry("<image>Q", "A", image="linked/b.png"))
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (30, 30)).save(elsewhere / "b.png")
    (tmp_path / "linked").symlink_to(elsewhere)
    assert data[0]["unreadable"] == []


def test_samples_are_cut_at_the_maximum_length(dataset, model):
    whole = dataset(entry("<image>Q", "A long answer with many words"))[0]
    visual = 192 * 192 // model.vision.compression ** 2  # 9 tokens
    model.max_length = len(whole["input_ids"]) - 1 + visual - 3
    cut = dataset(entry("<image>Q", "A long answer with many words"))[0]
    assert cut["input_ids"].tolist() == whole["input_ids"].tolist()[:-3] and len(cut["labels"]) == len(cut["input_ids"])
    embeds, _ = splice(model.llama.embed_tokens, [cut["input_ids"]], model.encode_images(cut["images"]))
    assert len(embeds[0]) == model.max_length
    wider = dataset(entry("<image>Q", "A long answer with many words"))
    wider.transform = lambda image: torch.zeros(3, 200, 250)  # what goes beyond whole tokens is left out
    assert len(model.encode_images(wider[0]["images"])[0]) == visual and len(wider[0]["labels"]) == len(cut["labels"])
    model.max_length, said = 512, entry("<image>Q", "A", "<image>Q", "A", image=["a.png", "a.png"])
    two = dataset(said)[0]
    second = (two["input_ids"] == IMAGE_TOKEN).nonzero()[1].item()
    model.max_length = second - 1 + visual  # all before the second image
    cut = dataset(said)[0]
    assert len(cut["input_ids"]) == second and (len(two["images"]), len(cut["images"])) == (2, 1)
    model.max_length = 20
    with pytest.raises(ValueError, match="first 20 tokens hold no answer"):
        dataset(entry("<image>Q", "A"))[0]


def test_samples_are_found_in_files_written_in_any_way(tmp_path, model):
    """Indented, on one line, lines ended by CR LF; escaped and plain unicode, brackets in strings; one malformed."""
    said = ("caf\u00e9 \U0001f642", 'a ] and "[{" in it', "\r\n", "x" * 300)
    entries = [*(entry("<image>Q", text) for text in said), {"id": "malformed"}]
    for i, text in enumerate((json.dumps(entries), json.dumps(entries, ensure_ascii=False, indent=1),
                              "\n " + json.dumps(entries, indent=2, ensure_ascii=False).replace("\n", "\r\n") + "\n")):
        file = tmp_path / f"{i}.json"
        file.write_bytes(text.encode())
        data = LlavaDataset([(file, tmp_path)] * 2, model, None)
        assert [data.entry(i)[0] for i in range(10)] == entries * 2
        assert data.entry(6)[2].endswith("sample 1")
        assert data.has_image.tolist() == [1, 1, 1, 1, 0] * 2 and data.said.tolist()[:5] == [7, 19, 3, 301, 0]


def test_mixtures_name_files_beside_them(tmp_path, pages):
    (tmp_path / "mix.json").write_text(json.dumps([{"annotations": "a.json", "images": "../b"}]))
    assert read_mixture(tmp_path / "mix.json") == [(tmp_path / "a.json", tmp_path / "../b")]
    (tmp_path / "odd.json").write_text("[5]")
    for file, said in ((pages / "captions.json", "part 0: expected"), (tmp_path / "gone.json", "is missing"),
                       (tmp_path / "odd.json", "part 0: expected")):
        with pytest.raises(ValueError, match=said):
            read_mixture(file)


@pytest.mark.parametrize("text, said", [
    ("{not json", "begins with '{not json'"), ("{}\n{}", "begins with"), ("[]", "Expecting value"),
    ("", "begins with ''"), ("[{} {}]", "the sample that ends at character 3"), ("[{},]", "Expecting value"),
    ("[{}", "character 3"), ("[{}] [{}]", "more follows"), ("\ufeff[{}]", "begins with"),
    ("[{},\u00a0{}]", "Expecting value")])
def test_broken_annotation_files_are_refused(tmp_path, model, text, said):
    (tmp_path / "broken.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=f"broken.json is not a JSON array of samples: .*{said}"):
        LlavaDataset([(tmp_path / "broken.json", tmp_path)], model, None)


def sized(sizes):
    """What the sampler reads of a dataset: (has an image, characters) of its samples."""
    return SimpleNamespace(**dict(zip(("has_image", "said"), np.array(sizes, dtype=np.int64).T)))


def test_global_batches_have_one_modality_and_similar_lengths():
    rng = random.Random(0)
    sizes = [(rng.random() < 0.7, rng.randint(1, 1000)) for _ in range(2000)]
    batches = GroupedSampler(sized(sizes), 4, accumulation=2, world=2, grouped=8).batches().tolist()
    assert all(len(batch) == 16 and len({sizes[i][0] for i in batch}) == 1 for batch in batches)
    spread = [max(sizes[i][1] for i in b) - min(sizes[i][1] for i in b) for b in batches]
    assert sorted(spread)[len(spread) // 2] < 250  # of 1000; the median batch of a shuffled set spans about 880
    flat = [i for batch in batches for i in batch]
    assert len(set(flat)) == len(flat) > 1950
    few = GroupedSampler(sized([(True, i) for i in range(100)]), 16)  # 96 of them an epoch, the longest at times
    seen = set()
    for few.epoch in range(20):
        seen.update(few.batches().flatten().tolist())
    assert len(seen) == 100


def test_ranks_and_micro_batches_cut_the_same_global_batches():
    sizes = sized([(i % 3 > 0, i) for i in range(200)])
    whole = [set(batch) for batch in GroupedSampler(sizes, 8, seed=3).batches().tolist()]
    parts = [list(GroupedSampler(sizes, 2, accumulation=2, rank=rank, world=2, seed=3)) for rank in (0, 1)]
    assert [set(a + b + c + d) for a, b, c, d in
            zip(parts[0][::2], parts[0][1::2], parts[1][::2], parts[1][1::2])] == whole
    assert len(parts[0]) == len(GroupedSampler(sizes, 2, accumulation=2, world=2, seed=3)) == 2 * len(whole)
    sampler = GroupedSampler(sizes, 8, seed=3)
    order, sampler.skip = list(sampler), 2
    assert list(sampler) == order[2:]
    sampler.epoch, sampler.skip = 1, 0
    assert list(sampler) != order


def check_main(*arguments):
    sys.argv = ["data.check", *map(str, arguments)]
    check.main()


def test_a_mixture_is_checked_before_a_run(ended, forked, tmp_path, tokenizer):
    """Counts by kind, the samples named, lengths in tokens; exit status 1 above 1%, 0 below, 2 for a wrong file."""
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    entries = [entry("<image>Q", "A"), entry("Q", "A", image=None), entry("<image>Q", "word " * 3000),
               entry("<image>Q", "A", image="gone.png"), entry("<image>Q", "A", image="cut.png"), {"id": 1},
               entry("<image>" + "word " * 3000, "A")]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (tmp_path / "b.json").write_text(json.dumps(entries[:2] * 400))
    for mixture, files in (("bad", "a"), ("good", "b")):
        (tmp_path / mixture).write_text(json.dumps([{"annotations": f"{name}.json", "images": "."} for name in files]))
    done = run("-m", "data.check", tmp_path / "bad", "--workers", 2, "--resolution", 512)
    assert done.returncode == 1 and "training stops at 1%" in done.stderr, done.stderr
    rows = {line.split(maxsplit=1)[1]: int(line.split()[0]) for line in done.stdout.splitlines()[:7]}
    assert rows == {f"samples in {tmp_path / 'a.json'}": 7, "samples with images": 2, "text only": 1, "images": 2,
                    "missing images": 1, "unreadable images": 1, "malformed samples": 2}
    for words in ("sample 3: there is no image", "sample 4: ", "sample 5: it has no list", "sample 6: its answer"):
        assert words in done.stderr
    assert "1 samples cut at 2048" in done.stdout and done.stdout.splitlines()[-1].startswith("  ")
    done = forked(tmp_path / "good", "--workers", 0, function=check_main)
    assert done.returncode == 0 and "800" in done.stdout and done.stdout.count("#") == 60, done.stdout
    shown, text = (len(encode_conversation(tokenizer, parse_turns(one)[0])[0]) for one in entries[:2])
    shown += 576 - 1  # visual tokens, one for each 64 pixels of 1536, in the image token's place
    assert f"{(shown + text) / 2:.0f} on average, {shown} at most, 0 samples cut" in done.stdout
    for length, said in ((shown - 1, "400 samples cut"), (shown - 2, f"starts after {shown - 2} tokens")):  # A, </s>
        done = forked(tmp_path / "good", "--workers", 0, "--max-length", length, function=check_main)
        assert said in done.stdout + done.stderr and done.returncode == ("after" in said), done.stdout
    later = [entry("Q", "A", "<image>More", "B")] * 99  # the image, of 64 tokens, comes after the first answer
    for lost, code in ([{"id": 1}], 0), ([{"id": 1}] * 2, 1):  # 1% and 1.98% of the samples
        (tmp_path / "b.json").write_text(json.dumps(later + lost))
        done = forked(tmp_path / "good", "--workers", 0, "--resolution", 512, "--max-length", 70, function=check_main)
        assert done.returncode == code and ("training stops at 1%" in done.stderr) == code, done.stderr
        assert "99 samples cut at 70" in done.stdout
        assert done.stdout.splitlines()[-1].split() == ["0", "to", "255", "99", "#" * 60]
    refused(ended(check.main, tmp_path / "good", "--max-length", 0), "--max-length is 0: it should be at least 1")
    for workers in (-1, 1000):
        refused(ended(check.main, tmp_path / "good", "--workers", workers), f"{workers}: take 0 to 999")
    refused(ended(check.main, tmp_path / "a.json"), "part 0: expected")
    refused(ended(check.main, tmp_path / "gone"), "gone is missing")
    refused(ended(check.main, tmp_path / "good", "--resolution", 1000), "multiple of 64")


# The generator

def test_generated_samples_follow_from_the_seed():
    for phase, index in (("captions", 3), ("instructions", 4)):
        assert sample("train", phase, index, 0) == sample("train", phase, index, 0)
        assert sample("train", phase, index, 0) != sample("train", phase, index, 1)
        assert sample("train", phase, index, 0) != sample("val", phase, index, 0)


def test_validation_values_are_not_in_training():
    rng = random.Random(0)
    for make in (price, number, date, code):
        values = {make(rng) for _ in range(300)}
        assert 0.04 < sum(is_for(v, "val") for v in values) / len(values) < 0.25
    asked = [(fact, split) for split in ("train", "val") for _ in range(60) for fact in make_page(rng, split).facts]
    read = {split: {word for f, s in asked if s == split and f[0] == "read" for word in f[2].split()
                    if any(c.isdigit() for c in word)} for split in ("train", "val")}
    assert len(read["val"]) > 50 and not read["train"] & read["val"]
    assert all(is_for(v, "val") for v in read["val"])


Drawn = namedtuple("Drawn", "name x y colour")
ORDER = ("first", "second", "third")


def looked_up(page, kind, question):
    """The answer to any question but for a box, from where the page's texts and shapes lie and nothing else."""
    texts = [Drawn(text.rstrip(":"), x, y, colour) for text, x, y, _, colour in sorted(page.texts, key=lambda t: t[2])]
    figures = [Drawn(f"{colour} {shape}", (x0 + x1) / 2, y1, colour) for shape, colour, (x0, _, x1, y1) in page.shapes]
    apart = lambda text, figure: math.dist((text.x + length(text.name, page.size) / 2, text.y), (figure.x, figure.y))
    tags = [min(texts, key=lambda text: apart(text, figure)).name for figure in figures]
    things, near = (figures, page.px(30)) if figures else (texts, 0.01)  # shapes are not quite in rows and columns
    words = question.lower().rstrip("?.")
    asked = [thing for thing in things if re.search(rf"\b{thing.name.lower()}\b", words)]
    if kind == "yes/no":
        return "Yes" if asked else "No"
    if kind == "count":
        rows = len({text.y for text in texts}) - 1  # below the title or header
        counts = {"items": sum(text.name in ITEMS for text in texts), "fields": rows, "rows": rows, "entries": rows,
                  "lines": rows + 1, "shapes": len(figures)}
        counts |= {shape: sum(shape in figure.name for figure in figures) for shape in SHAPES}
        return str(next(count for what, count in counts.items() if what in words))
    if kind == "relation" and "above" in words:
        return max((y, name) for name, x, y, _ in things if abs(x - asked[0].x) < near and y < asked[0].y - near)[1]
    if kind == "relation":
        return max((x, name) for name, x, y, _ in things if abs(y - asked[0].y) < near and x < asked[0].x - near)[1]
    if kind == "colour":
        last = question[:-1].split()[-1]  # a shape or a tag, else the title
        meant = [figure for figure, tag in zip(figures, tags) if last == tag or figure.name.endswith(last)] or texts
        return meant[0].colour
    if figures:
        return tags[figures.index(asked[0])]
    if place := re.search("(first|second|third) line", words):
        return texts[ORDER.index(place[1])].name
    row = [text for text in texts if asked and text.y == asked[-1].y]
    if len(asked) == 2:  # a column of a table and a row's first cell
        return next(text.name for text in row if text.x == asked[0].x)
    return max(row, key=lambda text: text.x, default=texts[0]).name  # the title has no row


def test_answers_agree_with_the_drawing():
    """A box holds what its line says and no more, and every other answer follows from where things lie."""
    rng, said = random.Random(1), {}
    for index in range(300):
        page = make_page(rng, "train")
        symbols, text = page.symbols(), "\n".join(page.lines)
        assert page.shapes or sorted("".join(text.split())) == sorted(symbol for symbol, _, _ in symbols)
        assert all(-0.02 < v < 1.02 for _, _, box in symbols for v in box)
        listed = [("box", "", line) for line in listing(page, rng)[0][1].split("\n")]
        assert [line.split(" [")[0] for _, _, line in listed] == page.lines
        for kind, question, answer in page.facts + listed:
            said.setdefault(page.kind, set()).add(answer if kind == "yes/no" else kind if question else "listing")
            if kind == "read":
                assert answer in text
            if kind != "box":
                assert answer == looked_up(page, kind, question), f"page {index}: {question}"
                continue
            line, box = answer.split(" [")
            x1, y1, x2, y2 = json.loads("[" + box)
            assert line in page.lines and x1 < x2 and y1 < y2
            if question:
                what = re.search(r"(?:is|box of) the (?:price of |row of )?(.+)[?.]", question)[1]
                meant = page.lines[ORDER.index(what[:-5])] if what[:-5] in ORDER else what
                assert line.lower().startswith(meant.lower()), question
            inside = [(b[0], symbol, b) for symbol, _, b in symbols
                      if x1 - 0.02 < (b[0] + b[2]) / 2 < x2 + 0.02 and y1 < (b[1] + b[3]) / 2 < y2]
            held = "".join(symbol for _, symbol, _ in sorted(inside))
            if page.shapes:
                colour, shape, tag = line.split()
                assert held == shape and tag == looked_up(page, "read", f"Read the label of the {colour} {shape}.")
            else:
                assert held == line.replace(" ", "")
            lefts, tops, _, bottoms = zip(*(b for _, _, b in inside))  # a table's row is as wide as the table
            assert max(abs(x1 - min(lefts)), abs(y1 - min(tops)), abs(y2 - max(bottoms))) < 0.04
    everything = {"read", "box", "listing", "relation", "colour", "count", "Yes", "No"}
    assert said == dict.fromkeys(("receipt", "form", "table", "picture"), everything) | {
        "note": {"read", "box", "listing", "count"}}


def test_shapes_are_drawn_where_their_boxes_are():
    """In each one's middle, and covering as much of it as such a shape does."""
    covers = {"circle": math.pi / 4, "square": 1, "triangle": 1 / 2, "diamond": 1 / 2,
              "star": 5 / 4 * 0.45 * math.sin(math.pi / 5), "cross": 2 * 0.32 - 0.32 ** 2}
    rng = random.Random(0)
    for _ in range(30):
        page = make_page(rng, "train", (shapes,))
        page.angle = rng.choice((-4, 0, 4))
        pixels = np.asarray(page.image()).astype(int)
        colours = [colour for _, colour, _ in page.shapes]
        for (kind, colour, (x0, _, x1, _)), (_, _, box) in zip(page.shapes, page.symbols()):
            if colour == "black" or colours.count(colour) > 1:
                continue  # not all that is of this colour
            rows, columns = (np.abs(pixels - COLOURS[colour]).max(axis=-1) < 30).nonzero()
            assert len(rows) / (x1 - x0) ** 2 == pytest.approx(covers[kind], rel=0.1), f"{colour} {kind}"
            if kind not in ("star", "triangle"):  # which are not the same upside down
                left, top = (page.side - page.width) / 2, (page.side - page.height) / 2  # of the page in its square
                middle = (np.median(columns) + left) / page.side, (np.median(rows) + top) / page.side
                assert math.dist(middle, ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)) < 0.005, f"{colour} {kind}"


def test_the_examples_are_drawn_as_they_are_shipped(tmp_path):
    """All kinds of pages. In levels of 255; older versions of Pillow shift some text by a part of a pixel."""
    write_examples(tmp_path)
    shipped = sorted((ROOT / "data" / "nano" / "examples").iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == [file.name for file in shipped]
    for file in shipped:
        ours, theirs = (np.asarray(read_image(folder / file.name)).astype(int) for folder in (file.parent, tmp_path))
        assert ours.shape == theirs.shape and np.abs(ours - theirs).mean() < 3, file.name


def test_files_hold_what_their_phase_is_for(monkeypatch):
    monkeypatch.setattr(Page, "jpeg", lambda page: b"")
    asks = {"captions": (1, {"caption"}), "instructions": (10, {"instructions"}), "finding": (12, {"finding"}),
            "pages": (14, {"instructions"}), "lookups": (5, set()), "neighbours": (14, {"neighbours"})}  # turns at most
    for name, (split, phase, _) in FILES.items():
        turns, kinds = (1, set(EVERYTHING)) if name == "val-instructions.json" else asks[phase]
        drawn = [sample(split, phase, index, 0) for index in range(100)]
        assert max(len(parse_turns(found)[0]) for found, _ in drawn) == turns
        assert all(("image" in found) == (jpeg is not None) for found, jpeg in drawn)
        least, most = {"lookups": (100, 100), "instructions": (2, 20)}.get(phase, (0, 0))
        assert least <= sum(jpeg is None for _, jpeg in drawn) <= most
        assert {found["id"].split("-")[0] for found, jpeg in drawn if jpeg is not None} == kinds


def test_lookups_say_what_is_stated():
    for index in range(50):
        entry, jpeg = sample("train", "lookups", index, 0)
        assert jpeg is None and "image" not in entry
        turns, _ = parse_turns(entry)
        stated = dict(re.findall(r"of (\w+) is (\S+)\.(?: |$)", turns[0][1]))
        for _, question, answer in turns:
            if "Whose is each" in question:
                assert dict(reversed(pair.split()) for pair in answer[:-1].split(". ")) == stated
            elif "Whose" in question:
                assert stated[answer] in question
            else:
                assert stated[question.split(" of ")[-1][:-1]] == answer


def test_files_are_ordinary_llava_json(pages):
    entries = json.loads((pages / "instructions.json").read_text())
    assert len(entries) == 24
    for found in entries:
        turns, paths = parse_turns(found)
        assert turns and all((pages / path).is_file() for path in paths)
    assert not (Path(pages) / "captions.json.tmp").exists()


# Pretraining

def test_dense_labels_say_what_covers_a_slot():
    for seed in range(4):
        _, symbols, inks, places = pretrain.DensePages(0).example(random.Random(seed), 0)
        covered = torch.zeros_like(symbols, dtype=torch.bool)
        for symbol, ink, box in make_page(random.Random(seed), "train").symbols():
            x0, y0, x1, y1 = torch.tensor(box, dtype=torch.float64) * torch.tensor([64, 32, 64, 32])
            row, column = int((y0 + y1) / 2), int((x0 + x1) / 2)
            assert (pretrain.SYMBOLS[symbols[row, column]], pretrain.INKS[inks[row, column]]) == (symbol, ink)
            middle = torch.tensor([column + 0.5, row + 0.5, 0, 0]) + places[row, column]
            torch.testing.assert_close(middle, torch.stack([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]).float())
            rows, columns = torch.arange(32)[:, None] + 0.5, torch.arange(64) + 0.5
            covered |= (y0 <= rows) & (rows < y1) & (x0 <= columns) & (columns < x1)
        assert torch.equal(symbols > 0, covered) and torch.equal(inks > 0, covered)


def test_packed_symbols_say_where_they_lie():
    for seed in range(20):
        page = make_page(random.Random(seed), "train")
        indices, places, cells = pretrain.packed(page)
        (cell, symbol, ink, part), boxes = indices.T, places[:, 4:]
        packed = {(pretrain.SYMBOLS[s], pretrain.INKS[i], tuple(box)) for s, i, box in zip(symbol, ink, boxes.tolist())}
        assert packed == {(s, i, tuple(torch.tensor(box).tolist())) for s, i, box in page.symbols()} and cells == 64
        corner = torch.stack([cell % 8, cell // 8], dim=1)  # x, y of the cell, whose side is 1
        torch.testing.assert_close(corner + 0.5 + places[:, :2], (boxes[:, :2] + boxes[:, 2:]) * 4)
        torch.testing.assert_close(places[:, 2:4], (boxes[:, 2:] - boxes[:, :2]) * 8)
        spans = ((boxes[:, 2:] * 8).int() - (boxes[:, :2] * 8).int() + 1).prod(dim=1)  # cells that each touches
        for i, box in enumerate(boxes):
            copies = (boxes == box).all(dim=1).sum()
            if symbol[i] <= len(SHAPES):  # is in every cell that it touches
                assert copies == spans[i] and bool((box[:2] * 8 < corner[i] + 1).all())
                assert bool((box[2:] * 8 >= corner[i]).all())
            else:  # a character is in the cell of its middle, in one of its parts, 2 down and 4 across
                x, y = places[i, :2].tolist()
                assert copies == 1 and max(abs(x), abs(y)) <= 0.5 and part[i] == 4 * (y > 0) + int(4 * (x + 0.5))
        kept, same, fewer = pretrain.packed(page, crop=random.Random(seed))  # without most of the rows that are empty
        assert torch.equal(kept[:, 1:], indices[:, 1:]) and torch.equal(same, places)
        above = (cell[0] - kept[0, 0]).item()
        assert torch.equal(kept[:, 0] + above, cell) and above % 8 == fewer % 8 == 0
        assert 0 <= kept[:, 0].min() < 16 and 0 < fewer - kept[:, 0].max() <= 16


def test_vision_trunk_is_pretrained(ended, tmp_path, monkeypatch):
    """And its file stays when the next cannot be written."""
    monkeypatch.setattr(pretrain, "OUT", tmp_path / "backbones")
    monkeypatch.setattr(pretrain, "NANO", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32)))
    weights = []
    for steps in (1, 2):
        pretrain.pretrain_vision(SimpleNamespace(seed=0, steps=steps))
        file, = (tmp_path / "backbones").iterdir()
        weights.append(dict(ConvNeXt.from_pretrained(file).named_parameters()))
    assert all(bool((weight != weights[1][name]).any()) for name, weight in weights[0].items() if weight.dim() > 1)

    def full(tensors, file, metadata):
        Path(file).write_bytes(b"half")
        raise SafetensorError("No space left on device")
    monkeypatch.setattr("data.weights.save_file", full)
    before = file.read_bytes()
    done = ended(pretrain.main, "vision", "--steps", 1)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("cannot be written: No space left on device")
    assert [file.read_bytes() for file in (tmp_path / "backbones").iterdir()] == [before]


@pytest.mark.parametrize("wrong, said", [
    (["--steps", 0], "--steps is 0: it should be at least 1"), (["--seed", -1], "--seed is -1: take 0 to 4294967295"),
    (["--seed", 2 ** 32], "take 0 to 4294967295")])
def test_wrong_arguments_of_pretraining(ended, monkeypatch, wrong, said):
    monkeypatch.setattr(pretrain, "pretrain_vision", None)
    done = ended(pretrain.main, "vision", *wrong)
    assert done.returncode == 2 and done.stderr.strip().endswith(said)


def test_language_model_is_pretrained(tmp_path, monkeypatch):
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("pretraining the language model needs torch 2.9 or newer, for its Muon")
    monkeypatch.setattr(pretrain, "OUT", tmp_path)
    monkeypatch.setattr(pretrain, "BATCH", 1)
    monkeypatch.setattr(pretrain, "train_tokenizer", lambda path, seed: path.write_bytes(NANO.read_bytes()))
    weights = []
    for steps in (1, 2):
        pretrain.pretrain_llm(SimpleNamespace(seed=0, steps=steps))
        weights.append(dict(Llama.from_pretrained(tmp_path / "vicuna-nano").named_parameters()))
    assert all(bool((weight != weights[1][name]).any()) for name, weight in weights[0].items() if weight.dim() > 1)


@pytest.mark.parametrize("lesson", sorted({name for _, weights in pretrain.CURRICULUM for name in weights}))
def test_lessons_have_answers_and_one_vector_per_cell(lesson):
    lessons, rng = pretrain.Lessons(0, NANO, steps=1), random.Random(0)
    lessons.tokenizer = Tokenizer(NANO)
    for _ in range(10):
        ids, labels, symbols = getattr(lessons, lesson)(rng)
        assert ids.shape == labels.shape and bool(((labels == ids) | (labels == IGNORE)).all())
        assert lessons.tokenizer.eos in labels and int((ids == IMAGE_TOKEN).sum()) == (symbols is not None)
        if symbols is not None:
            indices, places, cells = symbols
            assert len(indices) == len(places) and 0 <= int(indices[:, 0].min()) <= int(indices[:, 0].max()) < cells


def test_a_box_is_five_pieces_of_nanos_tokenizer():
    tokenizer = Tokenizer(NANO)
    text = "Total 12.75 [0.05, 0.70, 1.00, 0.99]"
    assert len(tokenizer.encode(text)) == len(tokenizer.encode("Total 12.75")) + 5
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_an_answer_is_right_when_all_its_tokens_are(model):
    targets = torch.full((2, 12), IGNORE)
    with torch.no_grad():
        hidden = model.llama.hidden(model.llama.embed_tokens(torch.randint(0, 700, (2, 12))))
        likeliest = model.llama.lm_head(hidden).argmax(-1)
    for row, start, stop in ((0, 2, 5), (0, 7, 9), (1, 3, 4), (1, 9, 12)):
        targets[row, start:stop] = likeliest[row, start - 1:stop - 1]
    assert pretrain.answers_right(model.llama, hidden, targets) == 1
    targets[0, 3] += 1
    assert pretrain.answers_right(model.llama, hidden, targets) == 0.75
    targets[0, 4] += 1
    targets[1, 3] += 1
    assert pretrain.answers_right(model.llama, hidden, targets) == 0.5

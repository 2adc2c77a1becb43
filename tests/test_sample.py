"""sample.py on the shipped model, as a user runs it."""
import io
import json
import random
import re
import shutil
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image, ImageChops

import sample
import train
from conftest import ENVIRONMENT, ROOT, refused, run
from convllava import ConvLLaVA
from convnext import ConvNeXt
from data import check
from data.dataset import LlavaDataset
from data.images import light_up, read_image, square
from data.nano import pretrain
from data.nano.generate import make_page, receipt
from data.nano.letters import Print
from data.validation import agree, validate

EXAMPLES = ROOT / "data" / "nano" / "examples"
RECEIPT, FORM = EXAMPLES / "receipt.png", EXAMPLES / "form.png"
PAGE = make_page(random.Random("example/receipt"), "val", (receipt,), Print())  # the page on receipt.png
TOTAL = PAGE.lines[-1].removeprefix("Total ")
TOTAL_WITH_BOX = PAGE.line_with_box(-1)  # "Total", the number and where they stand


@pytest.fixture(scope="module")
def shipped():
    return ConvLLaVA.from_pretrained(sample.NANO)


@pytest.fixture
def sampled(shipped, monkeypatch, capsys):
    """Calls sample.py's main with the shipped model; returns (stdout, stderr)."""
    def call(*arguments, stdin=b""):
        monkeypatch.setattr(sample, "load_model", lambda args: shipped)
        monkeypatch.setattr("sys.argv", ["sample.py", *map(str, arguments)])
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        sample.main()
        return capsys.readouterr()
    return call


# ---- One question ----

def test_the_readmes_first_command_prints_the_total():
    done = run("sample.py", RECEIPT, "What is the total?")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{TOTAL}\n"
    assert TOTAL in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("size", [(1, 1), (20_000, 20)], ids=["a dot", "a line"])
def test_an_image_of_an_extreme_size_is_answered_about(sampled, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "image.png")
    out, _ = sampled(tmp_path / "image.png", "Is there a star?", "--max-new-tokens", 4)
    assert out.strip()


def test_control_words_in_a_question_are_text(sampled):
    out, _ = sampled(RECEIPT, "Is <image> here </s>? 🙂", "--max-new-tokens", 4)
    assert out.strip()


def test_each_piece_of_an_answer_is_printed_at_once(monkeypatch):
    class Terminal(io.StringIO):
        shown = []

        def flush(self):
            self.shown.append(self.getvalue())

    def answer(*_, on_text):
        on_text("a")
        on_text("é")
        return "aé"

    monkeypatch.setattr("sys.stdout", Terminal())
    args = SimpleNamespace(max_new_tokens=4, temperature=0.0, top_p=1.0)
    assert sample.ask(SimpleNamespace(answer=answer), None, "What?", [], args) == "aé"
    assert Terminal.shown == ["a", "aé", "aé\n"]


@pytest.mark.parametrize("options, dtype, pixels, settings", [
    ([], "float32", (3, 512, 512), (512, 0.0, 1.0)),
    (["--dtype", "bf16"], "bfloat16", (3, 512, 512), (512, 0.0, 1.0)),
    (["--any-aspect"], "float32", (3, 512, 708), (512, 0.0, 1.0)),
    (["--resolution", "64"], "float32", (3, 64, 64), (512, 0.0, 1.0)),  # one visual token
    (["--resolution", "640"], "float32", (3, 640, 640), (512, 0.0, 1.0)),
    (["--max-new-tokens", "3"], "float32", (3, 512, 512), (3, 0.0, 1.0)),
    (["--temperature", "0.7", "--top-p", "0.9"], "float32", (3, 512, 512), (512, 0.7, 0.9)),
])
def test_options_arrive_at_the_model(monkeypatch, tmp_path, options, dtype, pixels, settings):
    """settings: the most new tokens, temperature and top-p."""
    calls = []

    def generate(model, prompts, images, max_new_tokens, temperature, top_p, generator):
        model_dtype = str(model.projector[0].weight.dtype).removeprefix("torch.")
        calls.append((model_dtype, images[0].shape, (max_new_tokens, temperature, top_p)))
        return iter([[5], [2]])

    Image.new("RGB", (1300, 940)).save(tmp_path / "page.png")
    monkeypatch.setattr(ConvLLaVA, "generate", generate)
    monkeypatch.setattr(ConvLLaVA, "encode_images", lambda model, images: images)
    monkeypatch.setattr("sys.argv", ["sample.py", str(tmp_path / "page.png"), "What?", *options])
    sample.main()
    assert calls == [(dtype, pixels, settings)]


# ---- Boxes ----

def test_the_box_of_an_answer_is_drawn(sampled, tmp_path):
    out, err = sampled(RECEIPT, "Where is the total?", "--draw", tmp_path / "box.png")
    assert out.startswith(f"Total {TOTAL} ")
    assert agree(out, TOTAL_WITH_BOX)
    assert f"1 boxes drawn in {tmp_path / 'box.png'}" in err
    plain = Image.open(RECEIPT).convert("RGB")
    drawn = Image.open(tmp_path / "box.png").convert("RGB")
    assert drawn.size == plain.size
    assert ImageChops.difference(plain, drawn).getbbox()


@pytest.mark.parametrize("size, any_aspect, corners", [
    ((200, 100), False, (50, 50, 150, 70)),  # the square reaches from y = -50 to 150
    ((200, 100), True, (50, 50, 150, 60)),
    ((100, 200), False, (0, 100, 99, 120)),  # cut off at the left and the right
])
def test_boxes_are_drawn_in_fractions_of_the_padded_square(size, any_aspect, corners):
    plain = Image.new("RGB", size, "white")
    drawn, count = sample.draw_boxes(plain, "at [0.25, 0.50, 0.75, 0.60].", any_aspect)
    assert count == 1
    left, top, right, bottom = ImageChops.difference(plain, drawn).getbbox()
    assert (left, top, right - 1, bottom - 1) == corners


def test_the_image_that_boxes_are_drawn_on_is_a_copy():
    image = Image.new("RGB", (200, 100), "white")
    sample.draw_boxes(image, "[0.25, 0.50, 0.75, 0.60]", any_aspect=False)
    assert image.getcolors() == [(20_000, (255, 255, 255))]


@pytest.mark.parametrize("text", ["no box", "[0.9, 0.2, 0.1, 0.3]"], ids=["none", "right of left"])
def test_what_is_no_box_is_not_drawn(text):
    image = Image.new("RGB", (200, 100), "white")
    drawn, count = sample.draw_boxes(image, text, any_aspect=False)
    assert count == 0
    assert drawn.tobytes() == image.tobytes()


def test_without_a_box_no_picture_is_written(tmp_path, capsys):
    args = SimpleNamespace(draw=tmp_path / "box.png", any_aspect=False)
    sample.write_drawing(RECEIPT, "no box", args)
    assert "box.png is not written" in capsys.readouterr().err
    assert not (tmp_path / "box.png").exists()


def assert_drawing_leaves(picture):
    """Drawing is refused, and the older picture of that name stays."""
    picture.write_bytes(b"older picture")
    args = SimpleNamespace(draw=picture, any_aspect=False)
    with pytest.raises(ValueError, match=f"--draw .*{picture.name} cannot be written, take a .png"):
        sample.write_drawing(RECEIPT, "[0.1, 0.1, 0.2, 0.2]", args)
    files = {file.name: file.read_bytes() for file in picture.parent.iterdir()}
    assert files == {picture.name: b"older picture"}


@pytest.mark.parametrize("name", ["box.psd", "box"])
def test_a_picture_of_a_kind_that_cannot_be_written_is_refused(tmp_path, name):
    assert_drawing_leaves(tmp_path / name)


def test_a_full_disk_leaves_the_picture_that_was_there(tmp_path, monkeypatch):
    def begin_to_write(image, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")
    monkeypatch.setattr(Image.Image, "save", begin_to_write)
    assert_drawing_leaves(tmp_path / "box.png")


@pytest.mark.parametrize("name", ["page.png", "link.png"])
def test_the_image_itself_is_not_drawn_over(tmp_path, name):
    shutil.copy(RECEIPT, tmp_path / "page.png")
    (tmp_path / "link.png").symlink_to("page.png")
    args = SimpleNamespace(draw=tmp_path / name, any_aspect=False)
    with pytest.raises(ValueError, match=f"--draw .*{name} would replace the image itself"):
        sample.write_drawing(tmp_path / "page.png", "[0.1, 0.1, 0.2, 0.2]", args)
    assert (tmp_path / "page.png").read_bytes() == RECEIPT.read_bytes()


def test_a_picture_behind_a_link_is_replaced_there(tmp_path):
    (tmp_path / "link.png").symlink_to("box.png")
    args = SimpleNamespace(draw=tmp_path / "link.png", any_aspect=False)
    sample.write_drawing(RECEIPT, "[0.1, 0.1, 0.2, 0.2]", args)
    assert (tmp_path / "link.png").is_symlink() and (tmp_path / "box.png").is_file()


def test_the_small_model_answers_in_8_bits(sampled):
    out, _ = sampled(RECEIPT, "What is the total?", "--dtype", "int8")
    assert out == f"{TOTAL}\n"


# ---- Where the answer looked ----

def test_an_answer_looks_at_what_it_reads(sampled, tmp_path):
    """The bright ones of the 8x8 visual tokens are those that hold the number, and one beside it."""
    out, _ = sampled(RECEIPT, "What is the total?", "--look", tmp_path / "look.png")
    assert out == f"{TOTAL}\n"
    picture = read_image(tmp_path / "look.png").convert("L")
    assert picture.size == Image.open(RECEIPT).size

    cell = picture.width / 8
    padding = (picture.width - picture.height) / 2  # above the receipt, which is wider than high
    bright = set()
    for row in range(8):
        for column in range(8):
            left, top = column * cell, row * cell - padding
            _, brightest = picture.crop((left + 3, max(0, top + 3), left + cell - 3, top + cell - 3)).getextrema()
            if brightest > 150:
                bright.add((row, column))
    number = {(row, column) for row in (6, 7) for column in (4, 5, 6)}  # 0.57 to 0.87 across, 0.83 to 0.94 down
    assert bright == number | {(6, 7)}


def test_the_share_of_each_layer_is_a_bar(sampled, shipped, tmp_path):
    _, err = sampled(RECEIPT, "What is the total?", "--look", tmp_path / "look.png")
    shares = [int(percent) for percent in re.findall(r"^layer +\d +(\d+)% █+$", err, re.MULTILINE)]
    assert len(shares) == 5
    assert shares == pytest.approx([30, 22, 21, 82, 67], abs=1)


def test_the_layer_that_looks_at_the_image_most_is_drawn(sampled, tmp_path):
    for name, options in (("default", []), ("3", ["--layer", 3]), ("0", ["--layer", 0])):
        sampled(RECEIPT, "What is the total?", "--look", tmp_path / f"{name}.png", *options)
    pictures = {file.stem: file.read_bytes() for file in tmp_path.iterdir()}
    assert pictures["default"] == pictures["3"] != pictures["0"]


def test_an_image_with_its_aspect_ratio_is_lit_too(sampled, tmp_path):
    sampled(FORM, "What is the date?", "--any-aspect", "--look", tmp_path / "look.png")
    assert read_image(tmp_path / "look.png").size == read_image(FORM).size


@pytest.mark.parametrize("size, keep_ratio, shape, num_across, corners", [
    ((800, 400), False, (2, 2), 2, (400, 0, 800, 200)),  # the square is 800 pixels high, 200 of them above the image
    ((400, 800), False, (4, 4), 4, (0, 400, 200, 600)),
    ((700, 512), True, (8, 10), 700 / 64, (320, 256, 384, 320)),  # the last 60 pixels are no visual token's
    ((100, 100), False, (1, 1), 100 / 64, (0, 0, 64, 64)),
], ids=["wide", "high", "any aspect", "a margin"])
def test_a_visual_token_lights_its_square(size, keep_ratio, shape, num_across, corners):
    places = {(2, 2): (0, 1), (4, 4): (2, 1), (8, 10): (4, 5), (1, 1): (0, 0)}
    light = torch.zeros(shape)
    light[places[shape]] = 1
    picture = light_up(Image.new("RGB", size, "white"), light, num_across, keep_ratio)
    assert picture.size == size
    assert picture.convert("L").point(lambda value: value - 63).getbbox() == corners  # a quarter of 255 is 63


def test_the_readmes_picture_is_what_the_program_draws(sampled, tmp_path):
    """To 8 grey levels, as the model of these tests is in bf16, and the program's in float32."""
    sampled(RECEIPT, "What is the total?", "--look", tmp_path / "look.png")
    difference = ImageChops.difference(read_image(tmp_path / "look.png"), read_image(EXAMPLES.parent / "look.png"))
    assert max(largest for _, largest in difference.getextrema()) <= 8


def test_a_look_that_cannot_be_written_leaves_the_picture_that_was_there(ended, tmp_path):
    (tmp_path / "look.psd").write_bytes(b"older picture")
    done = ended(sample.main, RECEIPT, "What is the total?", "--look", tmp_path / "look.psd")
    assert done.returncode == 2
    assert "look.psd cannot be written, take a .png" in done.stderr
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"look.psd": b"older picture"}


# ---- A chat ----

def test_a_chat_takes_another_image_and_encodes_each_once(sampled, monkeypatch):
    encoded = []
    forward = ConvNeXt.forward

    def counted_forward(convnext, pixels):
        encoded.append(pixels.shape)
        return forward(convnext, pixels)

    monkeypatch.setattr(ConvNeXt, "forward", counted_forward)
    lines = f"What is the total?\nWhat is the date?\n/image {FORM}\nWhat is the title?\n"
    out, _ = sampled(RECEIPT, stdin=lines.encode())
    answers = out.splitlines()
    assert len(answers) == 3 and answers[0] == TOTAL
    assert len(encoded) == 2


def test_a_chat_goes_on_after_an_image_that_is_not_there(sampled):
    out, err = sampled(RECEIPT, stdin=b"/image gone.png\nWhat is the total?\n")
    assert out == f"{TOTAL}\n"
    assert "there is no image at gone.png" in err


def test_a_chat_goes_on_after_scores_that_are_not_finite(sampled, shipped, monkeypatch):
    weight = shipped.llama.norm.weight.detach().clone()

    def damaged_once(model, *arguments):
        shipped.llama.norm.weight.data.fill_(float("nan") if not asked else 1.0).mul_(weight)
        asked.append(arguments)
        return answer(model, *arguments)
    asked, answer = [], sample.ask
    monkeypatch.setattr(sample, "ask", damaged_once)
    out, err = sampled(RECEIPT, stdin=b"What is the total?\nWhat is the total?\n")
    assert out == f"{TOTAL}\n"
    assert err.count("the model's scores are not finite") == 1


def test_a_line_that_is_too_long_is_refused_before_it_takes_memory(sampled):
    out, err = sampled(RECEIPT, stdin=b"word " * 3000 + b"\nWhat is the total?\n")
    assert out == f"{TOTAL}\n"
    assert "use a shorter text" in err


def test_a_chat_goes_on_after_a_line_that_is_not_utf8(monkeypatch):
    """As a program whose locale is not C, where Python is strict about it."""
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "utf-8:strict")
    lines = "\udcff?\n\nWhat is the total?\n"  # the byte 255, then an empty line
    done = run("sample.py", RECEIPT, input=lines, encoding="utf-8", errors="surrogateescape")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{TOTAL}\n"
    assert "half a character" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def recorder(monkeypatch):
    """A model that answers with a box, and whose .questions are [(question, history)]."""
    questions = []

    def answer(visual_tokens, question, history, *options, on_text):
        questions.append((question, list(history)))
        return f"[0.1, 0.1, 0.2, 0.{len(questions)}]"

    model = SimpleNamespace(answer=answer, encode_image=lambda *_: None, questions=questions)
    monkeypatch.setattr(sample, "load_model", lambda args: model)
    return model


def chat_with(recorder, monkeypatch, lines, *options):
    monkeypatch.setattr("sys.argv", ["sample.py", str(FORM), *map(str, options)])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    sample.main()
    return recorder.questions


def test_a_chat_has_its_history(recorder, monkeypatch):
    questions = chat_with(recorder, monkeypatch, "one\ntwo\nthree\n")
    assert questions[2] == (
        "three", [("one", "[0.1, 0.1, 0.2, 0.1]"), ("two", "[0.1, 0.1, 0.2, 0.2]")])


def test_another_image_begins_a_new_history(recorder, monkeypatch):
    questions = chat_with(recorder, monkeypatch, f"one\n/image {RECEIPT}\ntwo\n")
    assert questions == [("one", []), ("two", [])]


def test_a_chat_draws_the_boxes_of_each_answer(recorder, monkeypatch, capsys, tmp_path):
    chat_with(recorder, monkeypatch, "one\ntwo\nthree\n", "--draw", tmp_path / "box.png")
    assert capsys.readouterr().err.count("1 boxes drawn in") == 3
    assert (tmp_path / "box.png").is_file()


# ---- What is refused, in one sentence and with status 2 ----

@pytest.fixture
def bad_files(tmp_path, monkeypatch):
    """The working folder, with files that cannot be used."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (20_000, 20)).save(tmp_path / "line.png")
    Image.new("RGB", (3_000, 60)).save(tmp_path / "long.png")


@pytest.mark.parametrize("arguments, sentence", [
    (["gone.png", "What?"], "there is no image at gone.png"),
    (["gone.png", "What?", "--checkpoint", "gone"], "there is no image at gone.png"),  # known first
    (["", "What?"], "there is no image at an empty path"),
    (["text.png", "What?"], "text.png is damaged, or no image"),
    (["line.png", "What?", "--any-aspect"], "20000x20"),
    (["long.png", "What?", "--any-aspect"], "long.png makes more visual tokens"),
    ([RECEIPT, "  "], "the question is empty"),
    ([RECEIPT, "What \udcff?"], "half a character"),
    ([RECEIPT, "What?", "--checkpoint", "gone"], "no checkpoint folder at gone"),
    ([RECEIPT, "What?", "--checkpoint", "folder"], "config.json is missing"),
    ([RECEIPT, "What?", "--resolution", "32"], "--resolution is 32: it should be at least 64"),
    ([RECEIPT, "What?", "--resolution", "64000"], "more visual tokens than the"),
    ([RECEIPT, "What?", "--max-new-tokens", "0"], "--max-new-tokens is 0: it should be at least 1"),
    ([RECEIPT, "What?", "--temperature", "-0.1"], "--temperature is -0.1"),
    ([RECEIPT, "What?", "--top-p", "0"], "--top-p is 0.0: it should be above 0 and at most 1"),
    ([RECEIPT, "What?", "--top-p", "1.1"], "--top-p is 1.1: it should be above 0 and at most 1"),
    ([RECEIPT, "What?", "--temperature", "inf"], "--temperature is inf"),
    ([RECEIPT, "--look", "look.png"], "--look look.png shows where one answer looked: write a question"),
    ([RECEIPT, "What?", "--look", "look.png", "--layer", "5"], "--layer is 5: take 0 to 4"),
    ([RECEIPT, "What?", "--look", "look.png", "--layer", "-1"], "--layer is -1: take 0 to 4"),
    ([RECEIPT, "What?", "--device", "hpu"], "--device hpu cannot be used"),
    (["a\nb\x1b[31m.png", "What?"], r"there is no image at a\nb\x1b[31m.png"),  # what a terminal would obey is shown
])
def test_bad_input_is_refused(ended, bad_files, arguments, sentence):
    refused(ended(sample.main, *arguments), sentence)


def test_a_gpu_that_is_not_there_is_refused():
    refused(run("sample.py", RECEIPT, "What?", "--device", "cuda"), "--device cuda cannot be used")


@pytest.mark.parametrize("error", [
    MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried ...")],
    ids=["Python", "GPU", "processor"])
def test_a_full_memory_is_one_sentence(ended, monkeypatch, error):
    def full(args):
        raise error
    monkeypatch.setattr(sample, "load_model", full)
    refused(ended(sample.main, RECEIPT, "What?"), "the memory is full: try --dtype bf16 or int8, or a smaller --resolution")


@pytest.mark.parametrize("has_gpu, device", [(True, "cuda"), (False, "cpu")])
def test_a_gpu_is_taken_where_there_is_one(monkeypatch, has_gpu, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr("sys.argv", ["sample.py", str(RECEIPT)])
    assert sample.arguments().device == device


def test_device_and_type_of_another_model_are_told(shipped, tmp_path, monkeypatch, capsys):
    shipped.save_pretrained(tmp_path / "other")
    for checkpoint, text in ((tmp_path / "other", "on cpu, in bfloat16\n"), (sample.NANO, "")):
        monkeypatch.setattr("sys.argv", ["sample.py", str(RECEIPT), "--checkpoint", str(checkpoint), "--dtype", "bf16"])
        sample.load_model(sample.arguments())
        assert capsys.readouterr().err == text


# ---- The answers' score ----

def entry_about_receipt(question, answer, *later_messages):
    messages = [("human", f"<image>\n{question}"), ("gpt", answer), *later_messages]
    conversation = [{"from": sender, "value": text} for sender, text in messages]
    return {"image": RECEIPT.name, "conversations": conversation}


def dataset_of(model, folder, entries):
    (folder / "val.json").write_text(json.dumps(entries))
    transform = partial(square, resolution=model.resolution)
    return LlavaDataset([(folder / "val.json", EXAMPLES)], model.tokenizer,
                        model.vision.compression, model.max_length, transform)


def test_right_answers_are_counted_by_kind(shipped, tmp_path):
    """In batches of three prompts of different lengths. Only the first question is asked."""
    what, where = "What is the total?", "Where is the total?"
    later_messages = [("human", "What is the date?"), ("gpt", "never")]
    kinds_and_entries = [
        ("read", entry_about_receipt(what, TOTAL)),
        ("box", entry_about_receipt(where, TOTAL_WITH_BOX)),
        ("read", entry_about_receipt(what, "1.00")),  # not what the model answers
        ("read", entry_about_receipt(what, TOTAL, *later_messages)),
        ("box", entry_about_receipt(where, "[0, 0, 0.1, 0.1]")),  # nor this
    ]
    kinds, entries = zip(*kinds_and_entries)
    dataset = dataset_of(shipped, tmp_path, entries)
    _, counts = validate(shipped, dataset, kinds, batch=3, workers=0, autocast=nullcontext)
    assert counts == {"box": (1, 2), "read": (2, 3)}


def test_a_validation_sample_that_cannot_be_read_is_an_error(shipped, tmp_path):
    entry = entry_about_receipt("What is the total?", TOTAL)
    dataset = dataset_of(shipped, tmp_path, [entry | {"image": "gone.png"}, entry])
    with pytest.raises(ValueError, match="every validation sample has to be readable.*gone.png"):
        validate(shipped, dataset, ["read", "read"], batch=3, workers=0, autocast=nullcontext)


# The shipped files, and Ctrl-C -------------------------------------------------------------------

def test_the_shipped_files_are_small():
    files = [path for path in (ROOT / "data" / "nano").rglob("*") if path.is_file()]
    shipped_files = [path for path in files if "out" not in path.parts]  # out: generated pages
    assert sum(path.stat().st_size for path in shipped_files) <= 30e6
    assert len(list(EXAMPLES.iterdir())) == 7


def test_the_shipped_model_is_small(shipped):
    assert shipped.resolution == 512
    assert 3e6 <= sum(parameter.numel() for parameter in shipped.parameters()) <= 12e6


@pytest.mark.parametrize("program, interrupted_function, options", [
    (sample, "arguments", []),
    (train, "arguments", []),
    (check, "check", ["any.json"]),
    (pretrain, "pretrain_vision", ["vision"]),
])
def test_ctrl_c_ends_a_program_without_a_traceback(
        ended, monkeypatch, program, interrupted_function, options):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, interrupted_function, interrupted)
    done = ended(program.main, *options)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")

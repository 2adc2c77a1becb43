"""sample.py on the shipped model, as a user runs it."""
import io
import json
import random
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
from PIL import Image

import sample
import train
from conftest import ENVIRONMENT, ROOT, refused, run
from convllava import ConvLLaVA
from convnext import ConvNeXt
from data import check
from data.dataset import LlavaDataset
from data.images import square
from data.nano import pretrain
from data.nano.generate import make_page, receipt
from data.validation import validate

EXAMPLES = ROOT / "data" / "nano" / "examples"
TOTAL = make_page(random.Random("example/receipt"), "val", (receipt,)).lines[-1].split()[1]  # what receipt.png says


def typed(text):
    return io.TextIOWrapper(io.BytesIO(text.encode()))


def test_first_command_of_the_readme_prints_the_total():
    done = run("sample.py", EXAMPLES / "receipt.png", "What is the total?")
    assert (done.returncode, done.stdout) == (0, TOTAL + "\n"), done.stderr
    assert TOTAL in (ROOT / "README.md").read_text()


def test_box_is_drawn(tmp_path):
    done = run("sample.py", EXAMPLES / "receipt.png", "Where is the total?", "--draw", tmp_path / "box.png")
    assert done.returncode == 0, done.stderr
    line = f"Total {TOTAL} "
    assert f"1 boxes drawn in {tmp_path / 'box.png'}" in done.stderr
    assert done.stdout.startswith(line) and sample.BOX.fullmatch(done.stdout[len(line):].strip()), done.stdout
    drawn, plain = (Image.open(path).convert("RGB") for path in (tmp_path / "box.png", EXAMPLES / "receipt.png"))
    assert drawn.size == plain.size and drawn.tobytes() != plain.tobytes()


def test_its_answers_are_counted_by_kind(tmp_path):
    """Validation of true and false answers, in one batch of prompts of different lengths, with an image and without."""
    model = ConvLLaVA.from_pretrained(sample.NANO)
    total, box = "What is the total?", sample.BOX.search((ROOT / "README.md").read_text())[0]
    asked = [("read", total, TOTAL), ("box", "Where is the total?", f"Total {TOTAL} {box}"), ("read", total, "1.00"),
             ("read", total, TOTAL, "What is the date?", "never"), ("box", "Where is the total?", "[0, 0, 0.1, 0.1]")]
    entries = [{"image": "receipt.png", "conversations": [
        {"from": ("human", "gpt")[i % 2], "value": "<image>\n" * (i == 0) + text} for i, text in enumerate(said)]}
        for _, *said in asked]
    (tmp_path / "val.json").write_text(json.dumps(entries))
    dataset = LlavaDataset([(tmp_path / "val.json", EXAMPLES)], model, partial(square, resolution=512))
    kinds = [kind for kind, *_ in asked]
    assert validate(model, dataset, kinds, 3, 0, nullcontext)[1] == {"box": (1, 2), "read": (2, 3)}
    (tmp_path / "val.json").write_text(json.dumps([entries[0] | {"image": "gone.png"}, entries[0]]))
    dataset = LlavaDataset([(tmp_path / "val.json", EXAMPLES)], model, partial(square, resolution=512))
    with pytest.raises(ValueError, match="every validation sample has to be readable.*gone.png"):
        validate(model, dataset, kinds, 3, 0, nullcontext)


def test_boxes_are_drawn_in_shares_of_the_padded_square():
    text = "at [0.25, 0.50, 0.75, 0.60] and [0.9, 0.2, 0.1, 0.3]"  # the second is empty
    for size, any_aspect, corners in (((200, 100), False, ((50, 50), (150, 70))),
                                      ((200, 100), True, ((50, 50), (150, 60))),
                                      ((100, 200), False, ((0, 100), (99, 120)))):  # cut off at both sides
        plain = Image.new("RGB", size, "white")
        drawn, count = sample.draw_boxes(plain, text, any_aspect)
        marked = [(x, y) for x in range(size[0]) for y in range(size[1]) if drawn.getpixel((x, y)) != (255, 255, 255)]
        assert count == 1 and (min(marked), max(marked)) == corners
        assert plain.getcolors() == [(20_000, (255, 255, 255))]
    assert sample.draw_boxes(plain, "no box", False)[1] == 0


def test_chat_keeps_the_history_and_takes_another_image(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "PYTHONIOENCODING", "utf-8:strict")  # as in any locale but C's
    said = ("What is the total?\nWhat is the date?\n/image gone.png\n"
            f"/image {EXAMPLES / 'form.png'}\n\udcff?\nWhat is the title?\n\n")
    done = run("sample.py", EXAMPLES / "receipt.png", input=said, encoding="utf-8", errors="surrogateescape")
    answers = done.stdout.splitlines()
    assert done.returncode == 0 and len(answers) == 3 and answers[0] == TOTAL, (done.stdout, done.stderr)
    assert "there is no image at gone.png" in done.stderr and "Traceback" not in done.stderr
    assert "half a character" in done.stderr


def test_a_chat_encodes_each_image_once(monkeypatch, capsys):
    encoded, forward = [], ConvNeXt.forward
    monkeypatch.setattr(ConvNeXt, "forward", lambda self, pixels: encoded.append(1) or forward(self, pixels))
    asked = f"What is the total?\nWhat is the date?\n/image {EXAMPLES / 'form.png'}\nWhat is the title?\n"
    monkeypatch.setattr("sys.stdin", typed(asked))
    monkeypatch.setattr("sys.argv", ["sample.py", str(EXAMPLES / "receipt.png")])
    sample.main()
    assert len(capsys.readouterr().out.splitlines()) == 3 and len(encoded) == 2


def test_history_is_in_the_prompt_and_boxes_are_drawn_in_a_chat_too(monkeypatch, capsys, tmp_path):
    seen = []
    answer = lambda model, image, turns, args: seen.append(turns) or f"[0.1, 0.1, 0.2, 0.{len(seen) + 1}]"
    monkeypatch.setattr(sample, "answer", answer)
    monkeypatch.setattr("sys.stdin", typed("one\ntwo\nthree\n"))
    sample.chat(None, EXAMPLES / "form.png", None, SimpleNamespace(draw=tmp_path / "box.png", any_aspect=False))
    assert seen[2] == [(1, "one", "[0.1, 0.1, 0.2, 0.2]"), (0, "two", "[0.1, 0.1, 0.2, 0.3]"), (0, "three", None)]
    assert capsys.readouterr().err.count("1 boxes drawn in") == 3 and (tmp_path / "box.png").is_file()


def test_an_answer_is_streamed_token_by_token(monkeypatch):
    class Terminal(io.StringIO):
        shown = []

        def flush(self):
            self.shown.append(self.getvalue())
    pieces = iter([[5], [6], [7], [2]])
    model = SimpleNamespace(generate=lambda *_: pieces, tokenizer=SimpleNamespace(
        eos=2, decode=lambda tokens: {1: "a", 2: "a\ufffd", 3: "aé"}[len(tokens)]))
    monkeypatch.setattr(sample, "encode_conversation", lambda *_: (None, None))
    monkeypatch.setattr("sys.stdout", Terminal())
    args = SimpleNamespace(max_new_tokens=4, temperature=0.0, top_p=1.0)
    assert sample.answer(model, None, [], args) == "aé"
    assert Terminal.shown == ["a", "aé", "aé", "aé\n"]  # no half of a character; what ends the answer is no text


@pytest.mark.parametrize("options, what", [
    ([], ("torch.float32", (3, 512, 512), 512, 0.0, 1.0)),
    (["--dtype", "bf16", "--any-aspect"], ("torch.bfloat16", (3, 512, 708), 512, 0.0, 1.0)),
    (["--resolution", "64"], ("torch.float32", (3, 64, 64), 512, 0.0, 1.0)),  # one visual token
    (["--resolution", "640", "--max-new-tokens", "3"], ("torch.float32", (3, 640, 640), 3, 0.0, 1.0)),
    (["--temperature", "0.7", "--top-p", "0.9"], ("torch.float32", (3, 512, 512), 512, 0.7, 0.9))])
def test_options_arrive_at_the_model(monkeypatch, tmp_path, options, what):
    Image.new("RGB", (1300, 940)).save(tmp_path / "page.png")
    seen = []

    def generate(model, prompts, images, *settings):
        seen.append((str(model.projector[0].weight.dtype), tuple(images[0].shape), *settings))
        return iter([[5], [2]])
    monkeypatch.setattr(sample.ConvLLaVA, "generate", generate)
    monkeypatch.setattr(sample.ConvLLaVA, "encode_images", lambda model, images: images)
    monkeypatch.setattr("sys.argv", ["sample.py", str(tmp_path / "page.png"), "What?", *options])
    sample.main()
    assert seen == [what]


def test_bad_input_is_one_sentence(ended, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "folder").mkdir()
    image = EXAMPLES / "receipt.png"
    for arguments, words in (
            (["gone.png", "What?"], "there is no image at gone.png"), (["", "What?"], "at an empty path"),
            ([tmp_path / "text.png", "What?"], "text.png"), ([image, "  "], "question is empty"),
            ([image, "What?", "--checkpoint", "gone"], "no checkpoint folder at gone"),
            ([image, "What?", "--checkpoint", tmp_path / "folder"], "config.json is missing"),
            ([image, "What?", "--resolution", "32"], "at least 64"), ([image, "What?", "--top-p", "0"], "--top-p"),
            ([image, "What?", "--top-p", "1.1"], "--top-p is 1.1: it should be above 0 and at most 1"),
            ([image, "What?", "--max-new-tokens", "0"], "--max-new-tokens is 0: it should be at least 1"),
            ([image, "What?", "--temperature", "-0.1"], "--temperature is -0.1"),
            ([image, "What?", "--resolution", "64000"], "more visual tokens than the"),
            (["gone.png", "What?", "--checkpoint", "gone"], "no image")):  # before the weights are read
        refused(ended(sample.main, *arguments), words)
    refused(run("sample.py", image, "What?", "--device", "cuda"), "--device cuda")
    refused(ended(sample.main, image, "What?", "--device", "hpu"), "--device hpu")
    refused(ended(sample.main, image, "What \udcff?"), "half a character")
    with pytest.raises(ValueError, match="cannot write such files"):
        sample.finish(image, "[0.1, 0.1, 0.2, 0.2]", SimpleNamespace(draw=tmp_path / "box.psd", any_aspect=False))


def test_control_words_are_text_and_extreme_images_are_read(ended, monkeypatch, capsys, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("RGB", (20000, 20)).save(tmp_path / "line.png")
    for name in ("dot.png", "line.png"):
        question = "Is <image> here </s>? 🙂"
        monkeypatch.setattr("sys.argv", ["sample.py", str(tmp_path / name), question, "--max-new-tokens", "4"])
        sample.main()
        assert capsys.readouterr().out.strip()
    refused(ended(sample.main, tmp_path / "line.png", "What?", "--any-aspect"), "20000x20")
    Image.new("RGB", (3000, 60)).save(tmp_path / "long.png")
    refused(ended(sample.main, tmp_path / "long.png", "What?", "--any-aspect"), "long.png makes more visual tokens")


def test_shipped_files_are_small_and_the_model_is_nano():
    files = [path for path in (ROOT / "data" / "nano").rglob("*") if path.is_file() and "out" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 30e6
    model = ConvLLaVA.from_pretrained(sample.NANO)
    assert model.resolution == 512 and 3e6 <= sum(p.numel() for p in model.parameters()) <= 12e6
    assert len(list(EXAMPLES.iterdir())) == 6


@pytest.mark.parametrize("program, function, options", [
    (sample, "arguments", []), (train, "arguments", []), (check, "check", ["any.json"]),
    (pretrain, "pretrain_vision", ["vision"])])
def test_ctrl_c_ends_a_program_without_a_traceback(ended, monkeypatch, program, function, options):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(program, function, interrupted)
    done = ended(program.main, *options)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")

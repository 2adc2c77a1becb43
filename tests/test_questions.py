"""sample.py --questions: benchmarks of every kind, drawn, answered by the shipped model and scored.

No answer is fixed here, as the shipped model will change: scores are compared with counts made from the answers.
"""
import fcntl
import base64
import csv
import json
import os
import random
import re

import pytest
import torch

import sample
from conftest import refused
from convllava import ConvLLaVA
from data import answers, score
from data.nano.generate import make_page
from data.nano.letters import Print


def draw(folder):
    """Two drawn pages, one wide and one tall, as files in the folder, with four facts of each kind at least."""
    pages = []
    for is_shape in (lambda page: page.width > 1.2 * page.height, lambda page: page.height > 1.2 * page.width):
        for seed in range(1000):
            page = make_page(random.Random(f"questions/{seed}"), "val", look=Print())
            kinds = [fact.kind for fact in page.facts]
            if is_shape(page) and min(kinds.count(kind) for kind in ("read", "yes/no", "box")) >= 4:
                break
        pages.append(page)
        (folder / f"{len(pages)}.jpg").write_bytes(page.jpeg())
    return pages


def facts_of(pages, kind, each=4):
    """(number of the page, fact) of the first facts of a kind on each page."""
    for number, page in enumerate(pages, 1):
        facts = [fact for fact in page.facts if fact.kind == kind]
        yield from ((number, fact) for fact in facts[:each])


def rows_about(pages, folder, kind):
    """TSV rows about the facts of a kind; a page's later rows have its first one's index in place of an image."""
    rows, first_index = [], {}
    for index, (number, fact) in enumerate(facts_of(pages, kind)):
        image = first_index.get(number, base64.b64encode((folder / f"{number}.jpg").read_bytes()).decode())
        first_index.setdefault(number, index)
        rows.append(dict(index=index, image=image, image_path=f"{number}.jpg", question=fact.question,
                         answer=fact.answer, category="popular,random" if number == 1 else "random"))
    return rows


def write_tsv(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def as_options(row):
    return row | dict(A=row["answer"], B="None", C="nothing of this", answer="A")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Benchmark files of every kind, about two pages."""
    folder = tmp_path_factory.mktemp("questions")
    pages = draw(folder)
    read, yes_no = rows_about(pages, folder, "read"), rows_about(pages, folder, "yes/no")
    write_tsv(folder / "choice.tsv", [as_options(row) for row in read])
    write_tsv(folder / "POPE.tsv", yes_no)
    write_tsv(folder / "TextVQA_VAL.tsv", [row | dict(answer=str([row["answer"]] * 10)) for row in read])
    write_tsv(folder / "plain.tsv", read)

    boxes = []
    for number, fact in facts_of(pages, "box"):
        page = pages[number - 1]
        shares = [float(value) for value in re.findall(r"\d\.\d+", fact.answer)][-4:]
        side = max(page.width, page.height)
        left, top = (side - page.width) // 2, (side - page.height) // 2
        box = [shares[0] * side - left, shares[1] * side - top, shares[2] * side - left, shares[3] * side - top]
        boxes.append(dict(image=f"{number}.jpg", sent=fact.question, bbox=box, height=page.height, width=page.width))
    write_lines(folder / "refcoco_val.jsonl", boxes)
    write_lines(folder / "llava_pope_test.jsonl", [
        dict(question_id=i, image=f"{number}.jpg", text=fact.question, category="random")
        for i, (number, fact) in enumerate(facts_of(pages, "yes/no"))])
    return folder


FILES = ("choice.tsv", "POPE.tsv", "TextVQA_VAL.tsv", "plain.tsv", "refcoco_val.jsonl", "llava_pope_test.jsonl")


@pytest.fixture(scope="module")
def shipped():
    return ConvLLaVA.from_pretrained(sample.NANO, dtype=torch.float32)  # bf16 may decide a tie otherwise in a batch


@pytest.fixture
def ask(monkeypatch, capsys):
    """Calls sample.py --questions with a model; returns the lines of the answer file and what stderr says."""
    def call(model, questions, out, *options):
        monkeypatch.setattr(sample, "load_model", lambda args: model)
        monkeypatch.setattr("sys.argv", [str(word) for word in (
            "sample.py", "--questions", questions, "--answers", out, "--images", questions.parent, *options)])
        sample.main()
        return lines_of(out), capsys.readouterr().err
    return call


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Every kind ----

@pytest.fixture(scope="module")
def answered(folder, shipped):
    """Answers a file by the shipped model, at most 24 tokens each, once for each size of batch: its answer lines."""
    def call(name, batch):
        out = folder / f"{name}-{batch}.answers.jsonl"
        if not out.exists():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sample, "load_model", lambda args: shipped)
                patch.setattr("sys.argv", [str(word) for word in (
                    "sample.py", "--questions", folder / name, "--answers", out, "--images", folder, "--batch", batch,
                    "--max-new-tokens", 24)])
                sample.main()
        return out, lines_of(out)
    return call


@pytest.mark.parametrize("name", FILES)
def test_answers_are_the_same_in_batches_of_1_and_8(answered, name):
    texts = [[(line["question_id"], line["prompt"], line["text"]) for line in answered(name, batch)[1]] for batch in (1, 8)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == 8


@pytest.mark.parametrize("name", FILES)
def test_lines_have_llavas_fields_in_the_files_order(answered, name):
    _, lines = answered(name, 8)
    assert all(list(line) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"] for line in lines)
    first = 1 if name == "refcoco_val.jsonl" else 0
    assert [line["question_id"] for line in lines] == list(range(first, first + len(lines)))
    assert len({line["answer_id"] for line in lines}) == len(lines)
    assert lines[0]["model_id"] == lines[0]["metadata"]["checkpoint"] == "convllava-nano"


def test_an_answer_is_that_of_a_single_question(answered, shipped, folder):
    _, lines = answered("llava_pope_test.jsonl", 8)
    answer = shipped.answer(folder / "1.jpg", lines[0]["prompt"], max_new_tokens=24)
    assert lines[0]["text"] == answer.strip()


def scores_of(monkeypatch, capsys, out, file):
    """What data.score prints: {name: number}."""
    monkeypatch.setattr("sys.argv", ["score", str(out), str(file)])
    score.main()
    lines = [line.split("   the paper: ")[0].rsplit(None, 1) for line in capsys.readouterr().out.splitlines()]
    return {line[0].strip(): line[1] for line in lines if len(line) == 2}


def truths(file):
    with open(file, newline="") as opened:
        return [row["answer"] for row in csv.DictReader(opened, delimiter="\t")]


@pytest.fixture
def half_true(answered, folder, tmp_path):
    """The shipped model's answer lines, every other answer replaced by what is true, which it finds too seldom."""
    def call(name, true_texts):
        _, lines = answered(name, 8)
        for line, text in list(zip(lines, true_texts))[::2]:
            line["text"] = text
        write_lines(tmp_path / "out.jsonl", lines)
        return tmp_path / "out.jsonl", lines
    return call


def test_right_answers_are_counted(half_true, folder, monkeypatch, capsys):
    values = truths(folder / "plain.tsv")
    out, lines = half_true("plain.tsv", values)
    num_right = sum(line["text"] == value for line, value in zip(lines, values))
    scores = scores_of(monkeypatch, capsys, out, folder / "plain.tsv")
    assert num_right >= 4
    assert scores["together"] == f"{100 * num_right / len(lines):.2f}"


def test_right_choices_are_counted(half_true, folder, monkeypatch, capsys):
    """Option A is right. An answer chooses it by the letter, or by its text where no other letter is in it."""
    values = truths(folder / "plain.tsv")
    out, lines = half_true("choice.tsv", ["(A)", "", values[2], "", "A.", "", "The answer is A", ""])
    num_right = 0
    for line, value in zip(lines, values):
        letters = [letter for letter in "ABC" if re.search(rf"\b{letter}\b", line["text"])]
        num_right += letters == ["A"] if letters else value.lower() in line["text"].lower()
    scores = scores_of(monkeypatch, capsys, out, folder / "choice.tsv")
    assert num_right >= 4
    assert scores["together"] == f"{100 * num_right / len(lines):.2f}"


def test_yes_and_no_are_counted(answered, folder, monkeypatch, capsys):
    out, lines = answered("POPE.tsv", 8)
    pairs = [(line["text"].lower().strip("."), truth) for line, truth in zip(lines, truths(folder / "POPE.tsv"))]
    pairs += pairs[:4]  # the first page's are in two categories
    num_right = sum(text == truth.lower() for text, truth in pairs)
    num_hits = sum(text == "yes" and truth == "Yes" for text, truth in pairs)
    num_yes = sum(text == "yes" for text, _ in pairs) + sum(truth == "Yes" for _, truth in pairs)
    scores = scores_of(monkeypatch, capsys, out, folder / "POPE.tsv")
    assert scores["together: accuracy"] == f"{100 * num_right / len(pairs):.2f}"
    assert scores["together"] == f"{200 * num_hits / num_yes:.2f}"


def test_short_answers_of_ten_people_are_counted(half_true, folder, monkeypatch, capsys):
    values = truths(folder / "plain.tsv")
    out, lines = half_true("TextVQA_VAL.tsv", [f"The {value.upper()}!" for value in values])
    num_right = sum(value.lower() in line["text"].lower() for line, value in zip(lines, values))
    scores = scores_of(monkeypatch, capsys, out, folder / "TextVQA_VAL.tsv")
    assert num_right >= 4
    assert scores["together"] == f"{100 * num_right / len(lines):.2f}"


def test_boxes_are_counted_on_wide_and_tall_pages(answered, folder, monkeypatch, capsys, tmp_path):
    """The model's boxes, and in every other line the true one, as shares of the padded square."""
    _, lines = answered("refcoco_val.jsonl", 8)
    num_hits = 0
    for line, truth in zip(lines, lines_of(folder / "refcoco_val.jsonl")):
        x1, y1, x2, y2 = truth["bbox"]
        side = max(truth["height"], truth["width"])
        left, top = (side - truth["width"]) // 2, (side - truth["height"]) // 2
        if line["question_id"] % 2:
            line["text"] = str([(x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side])
        shares = [float(value) for value in re.findall(r"\d\.\d+", line["text"])[-4:]]
        a1, b1, a2, b2 = [share * side for share in shares] if len(shares) == 4 else [0] * 4
        x1, x2, y1, y2 = x1 + left, x2 + left, y1 + top, y2 + top
        common = max(0, min(a2, x2) - max(a1, x1)) * max(0, min(b2, y2) - max(b1, y1))
        num_hits += common / ((a2 - a1) * (b2 - b1) + (x2 - x1) * (y2 - y1) - common) >= 0.5
    assert num_hits >= len(lines) // 2
    write_lines(tmp_path / "out.jsonl", lines)
    scores = scores_of(monkeypatch, capsys, tmp_path / "out.jsonl", folder / "refcoco_val.jsonl")
    assert scores["together"] == f"{100 * num_hits / len(lines):.2f}"


# ---- Windows ----

@pytest.fixture
def small(model):
    """A random model, which answers nonsense quickly."""
    return model.eval()


@pytest.fixture
def six(folder, tmp_path):
    """Six questions of different lengths about one page."""
    lines = [dict(question_id=f"q{i}", image="1.jpg", text="What? " * (7 - i)) for i in range(6)]
    path = folder / "six.jsonl"
    write_lines(path, lines)
    return path


SHORT = ("--max-new-tokens", 3)


def test_an_image_of_six_questions_is_encoded_once(ask, small, six, tmp_path):
    calls = []
    small.vision.register_forward_hook(lambda *_: calls.append(1))
    lines, _ = ask(small, six, tmp_path / "out.jsonl", "--batch", 4, *SHORT)
    assert len(calls) == 1
    assert [line["question_id"] for line in lines] == [f"q{i}" for i in range(6)]


def test_questions_of_like_length_are_asked_together(ask, small, six, tmp_path, monkeypatch):
    batches, generate = [], ConvLLaVA.generate

    def recorded(model, prompts, *arguments):
        batches.append([len(prompt) for prompt in prompts])
        return generate(model, prompts, *arguments)
    monkeypatch.setattr(ConvLLaVA, "generate", recorded)
    ask(small, six, tmp_path / "out.jsonl", "--batch", 3, *SHORT)
    assert [len(batch) for batch in batches] == [3, 3]
    assert sum(batches, []) == sorted(sum(batches, []))


@pytest.mark.parametrize("options, pixels", [
    ([], (128, 128)), (["--resolution", 64], (64, 64)), (["--any-aspect", "--resolution", 64], None)])
def test_the_images_options_are_heeded(ask, small, six, tmp_path, options, pixels):
    shapes = []
    small.vision.register_forward_hook(lambda _, inputs, output: shapes.append(inputs[0].shape[2:]))
    lines, _ = ask(small, six, tmp_path / "out.jsonl", *options, *SHORT)
    height, width = shapes[0]
    assert (height, width) == pixels if pixels else height == 64 < width
    assert lines[0]["metadata"]["options"]["any_aspect"] is ("--any-aspect" in options)


# ---- Interrupted ----

@pytest.fixture
def interrupted(ask, small, six, tmp_path, monkeypatch, capsys):
    """An answer file of four questions, in windows of two, and the beginning of a fifth line."""
    monkeypatch.setattr(answers, "WINDOW", 2)
    out, answer_window, calls = tmp_path / "out.jsonl", sample.answer_window, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer_window(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "answer_window", stopping)
        with pytest.raises(SystemExit) as end:
            ask(small, six, out, *SHORT)
    assert end.value.code == 130
    capsys.readouterr()
    assert len(lines_of(out)) == 4
    with open(out, "a") as file:
        file.write('{"question_id": "q4", "prom')
    return out


def test_a_run_goes_on_where_it_was_interrupted(ask, small, six, interrupted):
    before = interrupted.read_bytes()
    lines, _ = ask(small, six, interrupted, "--batch", 1, *SHORT)
    assert interrupted.read_bytes().startswith(before[:before.rfind(b"\n") + 1])
    assert [line["question_id"] for line in lines] == [f"q{i}" for i in range(6)]


def test_a_complete_file_stays_as_it_is(ask, small, six, interrupted):
    ask(small, six, interrupted, *SHORT)
    before = interrupted.read_bytes()
    ask(small, six, interrupted, *SHORT)
    assert interrupted.read_bytes() == before


@pytest.mark.parametrize("options, sentence", [
    (["--checkpoint", "other"], "its checkpoint is convllava-nano, and now it is other"),
    (["--resolution", 64], "its resolution is 128, and now it is 64"),
    (["--max-new-tokens", 4], "its max_new_tokens is 3, and now it is 4")])
def test_answers_of_another_kind_are_refused(ask, ended, small, six, interrupted, options, sentence, monkeypatch):
    before = interrupted.read_bytes()
    monkeypatch.setattr(sample, "load_model", lambda args: small)
    refused(ended(sample.main, "--questions", six, "--answers", interrupted, "--images", six.parent, *SHORT, *options),
            sentence)
    assert interrupted.read_bytes() == before


def test_answers_of_other_weights_of_the_same_name_are_refused(ended, small, six, interrupted, monkeypatch):
    small.projector[2].weight.data[0, 0] += 1
    monkeypatch.setattr(sample, "load_model", lambda args: small)
    refused(ended(sample.main, "--questions", six, "--answers", interrupted, "--images", six.parent, *SHORT),
            "line 1: its weights is")


def test_another_files_answers_are_refused(ended, small, six, interrupted, monkeypatch):
    lines = lines_of(six)
    write_lines(six, [lines[1], lines[0], *lines[2:]])
    monkeypatch.setattr(sample, "load_model", lambda args: small)
    refused(ended(sample.main, "--questions", six, "--answers", interrupted, "--images", six.parent, *SHORT),
            "line 1 answers another question")


def test_answers_to_a_file_that_has_changed_are_refused(ended, small, six, interrupted, monkeypatch):
    six.write_text(six.read_text() + "\n")
    monkeypatch.setattr(sample, "load_model", lambda args: small)
    refused(ended(sample.main, "--questions", six, "--answers", interrupted, "--images", six.parent, *SHORT),
            "its questions_sha256 is")


def test_another_file_is_not_overwritten(ended, small, six, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("my notes, without a line's end")
    monkeypatch.setattr(sample, "load_model", lambda args: small)
    refused(ended(sample.main, "--questions", six, "--answers", tmp_path / "notes.txt", "--images", six.parent),
            "is no file of answers")
    assert (tmp_path / "notes.txt").read_text() == "my notes, without a line's end"


def test_a_file_that_another_program_is_writing_is_refused(ended, small, six, interrupted, monkeypatch):
    before = interrupted.read_bytes()
    monkeypatch.setattr(sample, "load_model", lambda args: small)
    with open(interrupted, "ab") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        refused(ended(sample.main, "--questions", six, "--answers", interrupted, "--images", six.parent, *SHORT),
                "another program is writing")
    assert interrupted.read_bytes() == before


# ---- What cannot be asked ----

@pytest.mark.parametrize("change, sentence", [
    (dict(image="gone.jpg"), "there is no image at"), (dict(image="damaged.jpg"), "its image is not a whole image"),
    (dict(text="word " * 600), "tokens with the image's, and the model reads 512"),
    (dict(text="half \ud800"), "half a character")])
def test_what_cannot_be_asked_is_named_and_has_an_empty_answer(ended, small, six, tmp_path, monkeypatch, change, sentence):
    (six.parent / "damaged.jpg").write_bytes((six.parent / "1.jpg").read_bytes()[:500])
    lines = lines_of(six)
    write_lines(six, [lines[0], lines[1] | change, lines[2]])
    monkeypatch.setattr(sample, "load_model", lambda args: small)
    for _ in range(2):  # a second time it is counted, and not asked again
        done = ended(sample.main, "--questions", six, "--answers", tmp_path / "out.jsonl", "--images", six.parent, *SHORT)
        assert done.returncode == 1
        assert "1 questions could not be asked" in done.stderr
        if _ == 0:
            assert "question q1: " in done.stderr and sentence in done.stderr
    written = lines_of(tmp_path / "out.jsonl")
    assert [line["text"] == "" for line in written] == [False, True, False]


@pytest.mark.parametrize("name, options, sentence", [
    ("empty.jsonl", [], "holds no question"),
    ("file.csv", [], "it should be VLMEvalKit's .tsv"),
    ("column.tsv", [], "it has no column 'image'"),
    ("twice.jsonl", [], "stands twice with the same prompt"),
    ("gone.tsv", [], "there is no file of questions at"),
    ("six.jsonl", ["--images", "gone"], "--images gone is no folder"),
    ("six.jsonl", ["--images", ""], "give the folder that they are in with --images"),
    ("six.jsonl", ["--answers", "gone/out.jsonl"], "should be a file in a folder that is there"),
    ("six.jsonl", ["--answers", "pipe"], "should be a file in a folder that is there"),
    ("six.jsonl", ["--answers", "six.jsonl"], "--answers names the file of questions"),
    ("six.jsonl", ["--temperature", 0.5], "takes no image, --draw or --temperature"),
    ("six.jsonl", ["--batch", 0], "--batch is 0: it should be at least 1"),
])
def test_what_is_wrong_is_known_before_the_model_is_loaded(ended, six, monkeypatch, name, options, sentence):
    folder = six.parent
    monkeypatch.chdir(folder)
    write_lines(folder / "empty.jsonl", [])
    (folder / "file.csv").write_text("a,b")
    if not (folder / "pipe").exists():
        os.mkfifo(folder / "pipe")
    (folder / "column.tsv").write_text("index\tquestion\n1\tWhat?\n")
    write_lines(folder / "twice.jsonl", lines_of(six)[:1] * 2)
    monkeypatch.setattr(sample, "load_model", lambda args: pytest.fail("loaded"))
    refused(ended(sample.main, "--questions", folder / name, "--answers", "out.jsonl", "--images", folder, *options),
            sentence)


@pytest.mark.parametrize("arguments", [[], ["--answers", "a"], ["--questions", "a"], ["page.png", "--images", "a"]])
def test_an_image_or_a_benchmark_is_needed(ended, arguments):
    refused(ended(sample.main, *arguments), "--questions")


def test_a_resolution_that_no_model_sees_is_refused(ended, small, six, tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "load_model", lambda args: small)
    refused(ended(sample.main, "--questions", six, "--answers", tmp_path / "out.jsonl", "--images", six.parent,
                  "--resolution", 32), "--resolution is 32: it should be at least 64")
    assert not (tmp_path / "out.jsonl").exists()

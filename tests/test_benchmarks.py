"""data/benchmarks.py: files of every kind become questions."""
import base64
import csv
import io
import json
import tracemalloc

import pytest
from PIL import Image

from data.benchmarks import SHORT_SENTENCES, encode_once, kind_of_rows, read_benchmark, read_bytes
from data.conversation import IMAGE_TOKEN, encode_conversation

LETTER = "Answer with the option's letter from the given choices directly."
SHORT = "Answer the question using a single word or phrase."


def picture(colour, size=(8, 8)):
    """A PNG file's bytes in base64; longer than an index."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


RED, BLUE = picture("red"), picture("blue")


@pytest.fixture
def write(tmp_path):
    """Writes rows as a TSV file, as pandas does, or as JSON lines; returns its path."""
    def write(rows, name="file.tsv"):
        path = tmp_path / name
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
            return path
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0], delimiter="\t", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return path
    return write


def row(index=1, image=RED, question="What?", **columns):
    return dict(index=index, image=image, question=question, **columns)


def read(path, **options):
    benchmark = read_benchmark(path, **options)
    return benchmark.kind, benchmark.questions


# ---- Prompts ----

def test_options_stand_in_lines_behind_hint_and_question(write):
    kind, (question,) = read(write([row(hint="Look.", A="red", B="", C="None", D="NA", answer="C")]))
    assert kind == "multiple choice"
    assert question.prompt == f"Look.\nWhat?\nA. red\nC. None\nD. NA\n{LETTER}"
    assert question.truth == "C"


def test_a_question_without_options_is_answered_directly(write):
    _, questions = read(write([row(A="1", answer="A"), row(2, A="", answer="12.5")]))
    assert questions[1].prompt == "What?\nAnswer the question directly."


def test_a_chinese_question_is_asked_in_chinese(write):
    _, (question,) = read(write([row(question="什么颜色?", A="红", answer="A")]))
    assert question.prompt == "什么颜色?\nA. 红\n请直接回答选项字母。"


@pytest.mark.parametrize("name", ["MME", "POPE", "mine"])
def test_yes_no_questions_are_asked_as_they_are(write, name):
    _, (question,) = read(write([row(question="Red? Please answer yes or no.", answer="Yes", category="color")],
                                f"{name}.tsv"))
    assert question.prompt == "Red? Please answer yes or no."


@pytest.mark.parametrize("name", ["TextVQA_VAL.tsv", "DocVQA_VAL.tsv"])
def test_short_answers_are_asked_for_with_the_sentence_of_training(write, name):
    path = write([row(answer="['red', 'a red']")], name)
    kind, (question,) = read(path)
    assert (kind, question.prompt, question.truth) == (name.split("_")[0], f"What?\n{SHORT}", ["red", "a red"])
    _, (question,) = read(path, short_sentence="vlmevalkit")
    assert question.prompt == "What?\n" + SHORT_SENTENCES["vlmevalkit"]


def test_an_mm_vet_question_stands_alone(write):
    _, (question,) = read(write([row(answer="a <AND> b")], "MMVet.tsv"))
    assert question.prompt == "What?"


def test_refcocos_sentence_is_asked_for_its_box(write):
    line = dict(image="a.jpg", sent="red cup", bbox=[1, 2, 3, 4], height=30, width=40)
    path = write([line, line], "refcoco_val.jsonl")
    kind, questions = read(path, folder=path.parent)
    assert kind == "RefCOCO"
    assert questions[0].prompt == ("Please provide the bounding box coordinate of the region this sentence describes: "
                                   "red cup.")
    assert [question.id for question in questions] == [1, 2]  # the lines' numbers
    assert questions[1].truth == ([1, 2, 3, 4], 30, 40)
    assert questions[1].images == [path.parent / "a.jpg"]


def test_llavas_text_is_the_prompt(write):
    line = dict(question_id="OCR/1.jpg", image="OCR/1.jpg", text=f"What?\n{SHORT}", category="OCR")
    path = write([line], "llava_mme.jsonl")
    kind, (question,) = read(path, folder=path.parent)
    assert (kind, question.id, question.prompt, question.truth) == ("LLaVA", "OCR/1.jpg", line["text"], None)


# ---- Kinds ----

@pytest.mark.parametrize("columns, kind", [
    (dict(index="7", A="red", answer="A"), "multiple choice"),
    (dict(index="1000007", A="red", answer="A"), "MMBench"),
    (dict(index="7", A="red", answer="A", g_index="7"), "MMBench"),
    (dict(index="7", answer="yes", category="popular,random"), "POPE"),
    (dict(index="7", answer="Yes", category="OCR", image_path="a.jpg"), "MME"),
    (dict(index="7", answer=str(["red"] * 10)), "TextVQA"),
    (dict(index="7", answer="['red']"), "DocVQA"),
    (dict(index="7", answer="red"), "short answers"),
])
def test_a_file_of_another_name_is_known_by_its_columns(columns, kind):
    assert kind_of_rows([columns]) == kind


# ---- Images ----

def colours(question):
    images = encode_once(question.images, {}, lambda image: image.getpixel((0, 0)))
    return ["red" if pixel == (255, 0, 0) else "blue" for pixel in images]


def test_an_image_may_be_that_of_another_row(write):
    rows = [row(1, "3"), row(2), row(3, BLUE)]
    _, questions = read(write(rows))
    assert [colours(question) for question in questions] == [["blue"], ["red"], ["blue"]]


def test_a_list_of_images_is_asked_about_in_its_order(write):
    _, questions = read(write([row(1, str([BLUE, RED, "2"])), row(2, BLUE)]))
    assert colours(questions[0]) == ["blue", "red", "blue"]


def test_images_are_found_behind_quotes_and_line_breaks(write):
    text = 'a "quoted"\tword\nand a line'
    rows = [row(1, question=text), row(2, BLUE, text), row(3)]
    _, questions = read(write(rows))
    assert [colours(question) for question in questions] == [["red"], ["blue"], ["red"]]
    assert questions[1].prompt == f"{text}\n{SHORT}"


def test_named_images_stand_in_their_places(write, tokenizer):
    """And one that the text does not name is left out."""
    images = str([RED, BLUE, RED])
    _, (question,) = read(write([row(1, images, "Is <image 2> like <image 1>?", A="yes", answer="A")]))
    assert colours(question) == ["blue", "red"]
    assert question.pieces == ["Is ", "\n like ", f"\n?\nA. yes\n{LETTER}"]
    ids, _ = encode_conversation(tokenizer, [(2, question.pieces, None)])
    places = [i for i, token in enumerate(ids) if token == IMAGE_TOKEN]
    assert "USER: Is" in tokenizer.decode(ids[:places[0]])
    assert "like" in tokenizer.decode(ids[places[0] + 1:places[1]])


def test_images_that_are_not_named_stand_in_front(write):
    _, (question,) = read(write([row(1, str([RED, BLUE]), A="yes", answer="A")]))
    assert colours(question) == ["red", "blue"]
    assert question.pieces == question.prompt


def test_an_image_is_encoded_once(write):
    _, questions = read(write([row(1), row(2), row(3, "1")]))  # twice in the file, and once more by its index
    calls, encoded = [], {}
    for question in questions:
        encode_once(question.images, encoded, calls.append)
    assert len(calls) == 1


def test_rows_without_an_image_are_left_out_and_counted(write):
    benchmark = read_benchmark(write([row(1, ""), row(2)]))
    assert [question.id for question in benchmark.questions] == [2]
    assert benchmark.num_without_image == 1


def test_the_file_is_never_whole_in_memory(write):
    cell = base64.b64encode(bytes(150_000)).decode()
    path = write([row(i, cell) for i in range(100)])
    tracemalloc.start()
    _, questions = read(path)
    read_bytes(questions[99].images[0])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(questions) == 100
    assert peak < 0.2 * path.stat().st_size


# ---- What is refused ----

@pytest.mark.parametrize("rows, name, sentence", [
    ([row()], "file.csv", "it should be VLMEvalKit's .tsv"),
    ([dict(index=1, question="What?")], "file.tsv", "it has no column 'image'"),
    ([row(image="")], "file.tsv", "holds no question with an image"),
    ([row(), row()], "file.tsv", "question 1 stands twice with the same prompt"),
    ([row(image="9")], "file.tsv", "row 1: its image is that of row '9'"),
    ([row(answer="maybe")], "POPE.tsv", "row 1: its answer is 'maybe'"),
    ([row(answer="red")], "TextVQA_VAL.tsv", "row 1: its answer is no list"),
    ([row(answer="Yes")], "MME.tsv", "it has no column 'category'"),
    ([row(question="<image 2>", A="1")], "file.tsv", "row 1: it names image 2 of 1"),
    ([{"id": 1}], "file.jsonl", "line 1: it has no 'question_id'"),
    ([dict(sent="cup", image="a.jpg", bbox=[1], height=1, width=1)], "file.jsonl", "line 1: its bbox"),
    ([dict(question_id=1, image="../a.jpg", text="What?")], "file.jsonl", "leaves its folder"),
    ([], "file.jsonl", "holds no question"),
])
def test_a_file_that_cannot_be_used_is_refused(write, rows, name, sentence):
    path = write(rows, name)
    with pytest.raises(ValueError, match=sentence) as error:
        read_benchmark(path, path.parent)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content, sentence", [
    (b"index\timage\tquestion\n1\t\xff\tWhat?\n", "is damaged or of another kind"),
    (b'index\timage\tquestion\n1\t"abc\tWhat?\n', "is damaged or of another kind"),
    (b"index\timage\tquestion\n1\tabc\n", "has 2 cells, and the header 3"),
])
def test_a_damaged_file_is_refused(tmp_path, content, sentence):
    (tmp_path / "file.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        read_benchmark(tmp_path / "file.tsv")


def test_an_id_alone_may_stand_twice(write):
    """LLaVA's TextVQA and MME files use the picture's."""
    lines = [dict(question_id="a", image="a.jpg", text=text) for text in ("What?", "Where?")]
    path = write(lines, "llava_textvqa.jsonl")
    _, questions = read(path, folder=path.parent)
    assert [question.id for question in questions] == ["a", "a"]

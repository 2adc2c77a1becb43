"""data/score.py on answers that are written here, so that every score can be counted by hand."""
import csv
import json

import pytest

from conftest import refused
from data import score
from data.answers import answer_line
from data.benchmarks import read_benchmark

IMAGE = "A" * 100  # in place of base64: scoring reads no image


@pytest.fixture
def scored(tmp_path, monkeypatch, capsys):
    """Writes a file of questions and its answers, and calls data.score on them: {name of a line: its number}, text."""
    def call(name, rows, texts, **metadata):
        path = write_questions(tmp_path / name, rows)
        write_answers(tmp_path / "answers.jsonl", path, texts, metadata)
        monkeypatch.setattr("sys.argv", ["score", str(tmp_path / "answers.jsonl"), str(path)])
        score.main()
        text = capsys.readouterr().out
        lines = [line.split("   the paper: ")[0].rsplit(None, 1) for line in text.splitlines() if line.startswith("  ")]
        return {line[0].strip(): line[1] for line in lines if len(line) == 2}, text
    return call


def write_questions(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    rows = [dict(index=i, image=IMAGE, question=f"What is {i}?") | row for i, row in enumerate(rows)]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_answers(path, questions_path, texts, metadata):
    questions = read_benchmark(questions_path, **metadata.get("options", {})).questions
    lines = [answer_line(question, text, metadata) for question, text in zip(questions, texts)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ---- Scores ----

def test_multiple_choice_is_scored_by_category(scored):
    rows = [dict(A="red", B="blue", answer="A", category=name) for name in ("colour", "colour", "shape", "shape")]
    scores, text = scored("SEEDBench_IMG.tsv", rows, ["A", "(B)", "It is red", "A or B"])
    assert scores["together"] == "50.00"  # the first and the third
    assert (scores["category colour"], scores["category shape"]) == ("50.00", "50.00")
    assert "the paper: 68.8 at 768, 69.3 at 1024, 70.2 at 1536" in text


def test_an_mmbench_question_counts_where_all_its_rotations_are_right(scored):
    rows = [dict(index=index, A="red", B="blue", answer=answer, category="colour")
            for index, answer in ((1, "A"), (2, "A"), (1_000_001, "B"), (1_000_002, "B"))]
    scores, _ = scored("MMBench_DEV_EN.tsv", rows, ["A", "A", "B", "A"])
    assert (scores["together"], scores["without rotations"]) == ("50.00", "100.00")


def test_mmmu_counts_its_validation_and_open_questions(scored):
    columns = dict(A="", B="", answer="", split="validation")
    rows = [columns | dict(answer="12.5"), columns | dict(A="1", B="2", answer="B"),
            columns | dict(A="1", B="2", answer="B", split="dev")]
    scores, text = scored("MMMU_DEV_VAL.tsv", rows, ["It is 12.5", "A", "B"])
    assert list(scores)[0] == "split validation"
    assert (scores["split validation"], scores["split dev"]) == ("50.00", "100.00")
    assert scores["together"] == "66.67"


def test_pope_counts_a_question_in_each_of_its_categories(scored):
    rows = [dict(answer="Yes", category="popular,random"), dict(answer="No", category="random"),
            dict(answer="Yes", category="popular")]
    scores, _ = scored("POPE.tsv", rows, ["yes", "Yes.", "no"])
    assert scores["together: accuracy"] == "50.00"  # 2 of 4: the first counts twice
    assert scores["category random"] == "66.67"  # F1 of 1 right yes, 1 wrong yes
    assert scores["category popular: recall"] == "50.00"


def test_mme_adds_accuracy_and_pictures_that_are_right(scored):
    rows = [dict(answer=answer, category=category, image_path=f"{category}.jpg")
            for category in ("OCR", "code_reasoning") for answer in ("Yes", "No")]
    scores, _ = scored("MME.tsv", rows, ["yes", "no", "yes", "yes"])
    assert (scores["perception"], scores["cognition"]) == ("200.00", "50.00")


def test_textvqa_is_scored_against_ten_people(scored):
    answers = str(["stop"] * 3 + [f"other {i}" for i in range(7)])
    scores, text = scored("TextVQA_VAL.tsv", [dict(answer=answers)] * 2, ["Stop.", "go"])
    assert scores["together"] == "45.00"  # 0.9 and 0
    assert "64.6 with a short side of 1536" in text


def test_docvqa_is_scored_by_letters(scored):
    scores, _ = scored("DocVQA_VAL.tsv", [dict(answer="['abcd', 'x']")] * 2, ["abce", "wxyz"])
    assert scores["together"] == "37.50"  # 0.75 and 0


def test_boxes_are_hits_from_half_of_their_area(scored):
    """On a wide page, whose padded square reaches from y = -50 to 150."""
    line = dict(image="a.jpg", bbox=[0, 0, 200, 100], height=100, width=200)
    scores, text = scored("refcoco_val.jsonl", [line | dict(sent=f"page {i}") for i in range(2)],
                          ["[0.0, 0.25, 1.0, 0.75]", "[0.0, 0.25, 1.0, 0.4]"])
    assert scores["together"] == "50.00"
    assert "84.5 at 768" in text
    assert "differs" not in text


def test_other_short_answers_are_matched(scored):
    scores, text = scored("mine.tsv", [dict(answer="red"), dict(answer="blue")], ["red", "Blue"])
    assert scores["together"] == "50.00"
    assert "the paper" not in text


# ---- What is said beside them ----

@pytest.mark.parametrize("sentence, differs", [("training", True), ("vlmevalkit", False)])
def test_the_sentence_behind_the_question_is_told_where_it_differs(scored, sentence, differs):
    _, text = scored("DocVQA_VAL.tsv", [dict(answer="['red']")], ["red"], options=dict(short_sentence=sentence))
    assert "the template: training's" in text
    assert ("the sentence behind the question" in text) is differs


@pytest.mark.parametrize("name, program", [
    ("llava_textvqa_val_v051_ocr.jsonl", "llava/eval/eval_textvqa.py"), ("llava_pope_test.jsonl", "llava/eval/eval_pope.py"),
    ("llava_mme.jsonl", "convert_answer_to_mme.py"), ("other.jsonl", "docs/Evaluation.md")])
def test_llavas_files_are_scored_by_llavas_programs(scored, name, program):
    _, text = scored(name, [dict(question_id=1, image="a.jpg", text="What?")], ["red"])
    assert program in text


@pytest.mark.parametrize("name, rows", [
    ("MMVet.tsv", [dict(answer="x"), dict(answer="y")]),
    ("llava-mm-vet.jsonl", [dict(question_id=f"v1_{i}", image="a.jpg", text="What?") for i in range(2)])])
def test_mm_vets_answers_are_written_for_its_site(scored, tmp_path, name, rows):
    _, text = scored(name, rows, ["red", "blue"])
    assert "judged by GPT-4" in text
    assert json.loads((tmp_path / "answers.mm-vet.json").read_text()) == {"v1_0": "red", "v1_1": "blue"}


# ---- What is refused ----

def test_answers_that_do_not_fit_the_questions_are_counted(ended, tmp_path):
    path = write_questions(tmp_path / "mine.tsv", [dict(answer="red")] * 5)
    write_answers(tmp_path / "answers.jsonl", path, ["red"] * 5, {})
    lines = (tmp_path / "answers.jsonl").read_text().splitlines()
    foreign = lines[4].replace('"question_id": 4', '"question_id": 9')
    (tmp_path / "answers.jsonl").write_text("\n".join([*lines[:3], lines[0], foreign]) + "\n")  # 3 and 4 lack
    refused(ended(score.main, tmp_path / "answers.jsonl", path),
            "of 5, 2 have no answer and 1 more than one, and 1 answers belong to another file")


@pytest.mark.parametrize("content, sentence", [
    ('{"question_id": 1, "prom', "line 1: it is no answer"), ("[]\n", "line 1: it is no answer"), ("", "5 have no answer")])
def test_a_damaged_file_of_answers_is_refused(ended, tmp_path, content, sentence):
    path = write_questions(tmp_path / "mine.tsv", [dict(answer="red")] * 5)
    (tmp_path / "answers.jsonl").write_text(content)
    refused(ended(score.main, tmp_path / "answers.jsonl", path), sentence)


def test_a_file_without_truth_is_refused(ended, tmp_path):
    path = write_questions(tmp_path / "mine.tsv", [dict(A="red", B="blue", answer=answer) for answer in ("A", "")])
    write_answers(tmp_path / "answers.jsonl", path, ["A", "B"], {})
    refused(ended(score.main, tmp_path / "answers.jsonl", path), "holds no answer to 1 of its 2 questions")


@pytest.mark.parametrize("missing", ["answers.jsonl", "mine.tsv"])
def test_a_file_that_is_not_there_is_refused(ended, tmp_path, missing):
    path = write_questions(tmp_path / "mine.tsv", [dict(answer="red")])
    write_answers(tmp_path / "answers.jsonl", path, ["red"], {})
    (tmp_path / missing).unlink()
    refused(ended(score.main, tmp_path / "answers.jsonl", path), "there is no file of", missing)

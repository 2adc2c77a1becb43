"""data/metrics.py against what the original programs print (golden/metrics.json): VLMEvalKit's state of 17 May 2024
(commit a23e4126), without a judge, and for RefCOCO ConvLLaVA's own script."""
import json

import pytest

from conftest import ROOT
from data.metrics import (anls, edit_distance, exact_match, iou, mmbench_hits, mme_totals, mmmu_open, normalise,
                          option_letter, pope_totals, read_box, refcoco_iou, vqa_accuracy, yes_or_no)

VECTORS = json.loads((ROOT / "tests" / "golden" / "metrics.json").read_text(encoding="utf-8"))


def vectors(name):
    """A test's parameters (prediction, truth, score) of all vectors of that name."""
    rows = [(row["prediction"], row["truth"], row["score"]) for row in VECTORS[name]]
    return pytest.mark.parametrize("prediction, truth, score", rows)


# ---- What the original programs give ----

@vectors("normalise")
def test_normalised_answers_are_the_originals(prediction, truth, score):
    assert normalise(prediction) == score


@vectors("textvqa")
def test_vqa_accuracy_is_the_originals(prediction, truth, score):
    assert vqa_accuracy(prediction, truth) == pytest.approx(score, abs=1e-9)


@vectors("anls")
def test_anls_is_the_originals(prediction, truth, score):
    assert anls(prediction, truth) == pytest.approx(score, abs=1e-9)


@vectors("yorn")
def test_yes_and_no_are_read_as_the_original_reads_them(prediction, truth, score):
    assert yes_or_no(prediction) == score


@vectors("pope")
def test_popes_totals_are_the_originals(prediction, truth, score):
    totals = pope_totals(prediction, truth["answer"], truth["category"])
    assert totals.keys() == score.keys()
    for name, total in totals.items():
        expected = [score[name][key] for key in ("Overall", "acc", "precision", "recall")]
        assert total == pytest.approx(expected, abs=1e-9)


@vectors("mme")
def test_mmes_totals_are_the_originals(prediction, truth, score):
    categories, pictures, truths = zip(*truth)
    totals = mme_totals(prediction, truths, categories, pictures)
    totals["reasoning"] = totals.pop("cognition")  # VLMEvalKit's word
    assert totals == pytest.approx(score, abs=1e-9)


@vectors("mcq")
def test_option_letters_are_the_originals(prediction, truth, score):
    assert (option_letter(prediction, truth) or False) == score


def test_mmbenchs_groups_are_the_originals():
    groups, letters, truths = [], [], []
    for group, vector in enumerate(VECTORS["mmbench_circular"]):
        groups += [group] * len(vector["truth"])
        letters += [option_letter(prediction, vector["options"]) for prediction in vector["prediction"]]
        truths += vector["truth"]
    hits = mmbench_hits(groups, letters, truths)
    assert list(hits.values()) == [vector["score"] for vector in VECTORS["mmbench_circular"]]


@vectors("refcoco")
def test_boxes_are_the_originals(prediction, truth, score):
    overlap = refcoco_iou(prediction, truth["bbox"], *truth["hw"])
    assert overlap == score["iou"]  # float32, to the bit
    assert (overlap >= 0.5) == score["hit"]


@vectors("mmmu_open")
def test_mmmus_open_questions_are_the_originals(prediction, truth, score):
    letter = mmmu_open(prediction, truth)
    assert (letter or False) == score["choice"]
    assert (letter == "A") == score["hit"]


# ---- What the vectors do not hold ----

@pytest.mark.parametrize("num_equal, score", [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_by_how_many_people_agree(num_equal, score):
    answers = ["stop"] * num_equal + [f"other {i}" for i in range(10 - num_equal)]
    assert vqa_accuracy("Stop.", answers) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize("a, b, distance", [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)])
def test_edit_distances(a, b, distance):
    assert edit_distance(a, b) == edit_distance(b, a) == distance


@pytest.mark.parametrize("word, contraction", [
    ("shouldnt", "shouldn't"), ("Dont", "don't"), ("theyll", "they'll"), ("hed've", "he'd've"),
    ("he'dve", "he'd've"), ("couldntve", "couldntve"), ("couldnt've", "couldn't've"), ("ive", "ive")])
def test_contractions(word, contraction):
    assert normalise(word) == contraction


def test_a_refusal_chooses_no_option():
    assert option_letter("I can't process this file. A", {"A": "red", "B": "blue"}) == "Z"
    assert option_letter("Z", {"A": "red", "B": "blue"}) == "Z"


def test_none_is_an_option_as_any_other():
    assert option_letter("None", {"A": "NA", "B": "None"}) == "B"


def test_an_mme_picture_counts_where_both_answers_are_right():
    totals = mme_totals(["yes", "no", "yes", "yes"], ["Yes", "No", "Yes", "No"], ["OCR"] * 4, ["a", "a", "b", "b"])
    assert totals == {"perception": 125, "cognition": 0, "OCR": 125}  # 3 of 4 questions, 1 of 2 pictures


@pytest.mark.parametrize("text, box", [
    ("no box", None), ("[1, 2, 3]", None), ("[a, b, c, d] [0, 0, 1, 1]", None), ("at [[0, .5, 1, 1e-1]].", [0, 0.5, 1, 0.1])])
def test_the_first_box_of_a_text_is_read(text, box):
    assert read_box(text) == box


def test_a_box_in_thousandths_is_a_box():
    assert refcoco_iou("[250, 250, 750, 750]", [100, 100, 300, 300], 400, 400) == 1


@pytest.mark.parametrize("height, width, box", [(100, 200, [50, 0, 150, 50]), (200, 100, [0, 50, 50, 150])])
def test_padding_is_taken_off_a_box(height, width, box):
    """The middle of the padded square is the middle of the page."""
    left, top = (max(height, width) - width) / 2, (max(height, width) - height) / 2
    x1, y1, x2, y2 = box
    shares = [value / 200 for value in (x1 + left, y1 + top, x2 + left, y2 + top)]
    assert refcoco_iou(str(shares), box, height, width) == 1


def test_two_empty_boxes_do_not_overlap():
    assert iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0


def test_an_exact_match_is_but_for_blanks_around_it():
    assert exact_match(" 141.21\n", "141.21")
    assert not exact_match("141.2", "141.21")

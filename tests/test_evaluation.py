"""Validation: what counts as a right answer, the loss and the greedy answers, the report, and who evaluates."""
import json
import os
import re
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from PIL import Image

import train
from conftest import conversation, metrics, run_of, train_main
from data.conversation import IGNORE, encode_conversation
from data.dataset import LlavaDataset
from data.images import square
from data.validation import agree, iou, kinds_by_id, print_report, share_right, validate

SQUARE_64 = partial(square, resolution=64)


# ---- Right answers ----
@pytest.mark.parametrize("answer, expected, is_right", [
    ("12.50", "12.50", True), ("12.5", "12.50", False), ("tea", "Tea", False), ("Tea 2.50", "Tea", False)])
def test_answers_agree_where_their_texts_are_equal(answer, expected, is_right):
    assert agree(answer, expected) == is_right


@pytest.mark.parametrize("answer, is_right", [
    ("[0.25, 0.25, 0.75, 0.75]", True),  # the expected box is half of it
    ("[0.25, 0.25, 0.75, 0.77]", False),  # less than half
    ("over there", False),
    ("[0.25, 0.25, 0.25, 0.25]", False)])
def test_boxes_agree_from_half_of_their_union(answer, is_right):
    assert agree(answer, "[0.25, 0.25, 0.75, 0.50]") == is_right


def test_a_box_is_right_whatever_is_said_beside_it():
    assert agree("Tea 2.50 [0.25, 0.25, 0.75, 0.75]", "Tea 2.56 [0.25, 0.25, 0.75, 0.50]")


@pytest.mark.parametrize("a, b, overlap", [
    ((0, 0, 2, 2), (0, 0, 2, 2), 1), ((0, 0, 2, 2), (0, 0, 2, 1), 1 / 2), ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7),
    ((0, 0, 1, 1), (2, 0, 3, 1), 0), ((0, 0, 1, 1), (1, 0, 2, 1), 0), ((1, 1, 1, 1), (5, 5, 5, 5), 0)])
def test_iou_is_the_intersection_over_the_union(a, b, overlap):
    """Of boxes that are equal, half, shifted, apart, adjacent and empty, computed in float32: within 1e-7."""
    assert iou(a, b) == pytest.approx(overlap, abs=1e-7)
    assert iou(b, a) == iou(a, b)


@pytest.mark.parametrize("counts, share", [
    ({"all": (1, 4)}, 1 / 4), ({"read": (1, 2), "sum": (4, 4)}, 5 / 6),
    ({"box": (3, 4), "read": (1, 2)}, 1 / 2), ({"box": (3, 4)}, 3 / 4),
    ({"transcription": (3, 4), "read": (1, 2)}, 1 / 2), ({"transcription": (3, 4)}, 3 / 4)])
def test_the_share_counts_boxes_and_transcriptions_only_where_there_is_nothing_else(counts, share):
    assert share_right(counts) == share


def test_kinds_are_read_off_the_samples_ids(pages, tokenizer):
    dataset = LlavaDataset([(pages / "val.json", pages)], tokenizer, 64, 512, None)
    ids = [sample["id"] for sample in json.loads((pages / "val.json").read_text())]
    kinds = kinds_by_id(dataset)
    assert [name.startswith(kind + "-") for name, kind in zip(ids, kinds, strict=True)] == [True] * 6
    assert not any("-" in kind for kind in kinds)


# ---- The report ----
@pytest.mark.parametrize("counts, lines", [
    ({"all": (1, 4)}, [
        "validation loss 1.5000, exact match 25.0%",
        "  all              1 of    4   25.0%"]),
    ({"box": (3, 4), "text": (1, 2)}, [
        "validation loss 1.5000, exact match 50.0%",
        "  box              3 of    4   75.0%  (IoU at least 0.5)",
        "  text             1 of    2   50.0%"]),
    ({"box": (3, 4)}, [
        "validation loss 1.5000, exact match 75.0%",
        "  box              3 of    4   75.0%  (IoU at least 0.5)"])])
def test_the_report_says_how_many_answers_are_right(capsys, counts, lines):
    print_report(1.5, counts)
    out, err = capsys.readouterr()
    assert err.splitlines() == lines and out == ""


# ---- validate ----
@pytest.fixture
def dataset_of(model, tmp_path):
    """Makes a dataset of one conversation, for the random model."""
    def make(messages, images=None, folder=tmp_path):
        sample = {"conversations": messages} | ({"image": images} if images else {})
        (tmp_path / "val.json").write_text(json.dumps([sample]))
        return LlavaDataset([(tmp_path / "val.json", folder)], model.tokenizer, model.vision.compression,
                            model.max_length, partial(square, resolution=128))
    return make


@pytest.fixture
def two_images(pages, dataset_of):
    """A conversation about one image, then about another."""
    image = json.loads((pages / "val.json").read_text())[0]["image"]
    messages = conversation("<image>\nWhat is it?", "a page") + conversation("<image>\nAnd this?", "another")
    return dataset_of(messages, [image, image], pages)


def validate_one(model, dataset):
    """validate() of a dataset of one sample."""
    return validate(model.eval(), dataset, ["all"], 1, 0, nullcontext)


def generated(monkeypatch, model, tokens=()):
    """Has the model generate these tokens at most; returns a list that gets the arguments of each call."""
    calls = []

    def generate(prompts, images, max_new_tokens):
        calls.append((prompts, images, max_new_tokens))
        return ([token] for token in tokens[:max_new_tokens])
    monkeypatch.setattr(model, "generate", generate)
    return calls


def test_the_loss_is_of_all_turns(model, two_images):
    """Against the model's own of the sample: within 1e-6."""
    loss, _ = validate_one(model, two_images)
    sample = two_images[0]
    with torch.no_grad():
        expected = model([sample["input_ids"]], sample["images"], [sample["labels"]])
    assert loss == pytest.approx(expected.item(), rel=1e-6)


def test_the_loss_is_per_label_whatever_the_batch(model, pages):
    """Batches of 4 and 2 against the samples one by one, weighted with their labels: within 1e-5."""
    dataset = LlavaDataset([(pages / "val.json", pages)], model.tokenizer, 64, 512, SQUARE_64)
    loss, counts = validate(model.eval(), dataset, ["a"] * 2 + ["b"] * 4, 4, 0, nullcontext)
    total = num_labels = 0
    for sample in (dataset[i] for i in range(6)):
        count = int((sample["labels"][1:] != IGNORE).sum())
        with torch.no_grad():
            total += count * model([sample["input_ids"]], sample["images"], [sample["labels"]]).item()
        num_labels += count
    assert loss == pytest.approx(total / num_labels, rel=1e-5)
    assert {kind: total for kind, (_, total) in counts.items()} == {"a": 2, "b": 4}


def test_an_image_is_encoded_once_for_the_loss_and_the_answer(model, two_images, monkeypatch):
    sizes, forward = [], model.vision.forward

    def counted(pixels):
        sizes.append(len(pixels))
        return forward(pixels)
    monkeypatch.setattr(model.vision, "forward", counted)
    validate_one(model, two_images)
    assert sizes == [2]


def test_the_first_question_is_asked_with_its_image_alone(model, two_images, monkeypatch):
    calls = generated(monkeypatch, model)
    validate_one(model, two_images)
    (prompt,), (visual,), _ = calls[0]
    expected, _ = encode_conversation(model.tokenizer, [(1, "What is it?", None)])
    assert prompt.tolist() == expected and visual.shape == (4, 32)  # 128 pixels are 2 x 2 visual tokens


def test_a_right_answer_is_counted_however_long_it_is(model, dataset_of, monkeypatch):
    dataset = dataset_of(conversation("Read it.", "one two three four " * 80))
    expected = [token for token in dataset[0]["labels"].tolist() if token != IGNORE]
    assert 256 < len(expected) < model.max_length
    generated(monkeypatch, model, expected)
    assert validate_one(model, dataset)[1] == {"all": (1, 1)}


def test_an_answer_that_never_ends_is_not_waited_for(model, dataset_of, monkeypatch):
    dataset = dataset_of(conversation("Read it.", "one two three four " * 80))
    num_expected = int((dataset[0]["labels"] != IGNORE).sum())
    calls = generated(monkeypatch, model)
    assert validate_one(model, dataset)[1] == {"all": (0, 1)}
    *_, limit = calls[0]
    assert num_expected <= limit < num_expected + 20


def test_a_sample_whose_answer_was_cut_is_validated(model, dataset_of):
    messages = conversation("What is it?", "one two three four five six seven")
    model.max_length = len(dataset_of(messages)[0]["input_ids"]) - 4
    dataset = dataset_of(messages)
    assert model.tokenizer.eos not in dataset[0]["labels"].tolist()
    loss, counts = validate_one(model, dataset)
    assert loss > 0 and counts == {"all": (0, 1)}


def test_a_sample_that_cannot_be_read_is_an_error(model, pages, tmp_path):
    """In training another takes its place; here the counts would be of other questions than the file's."""
    entries = json.loads((pages / "val.json").read_text())
    entries[1]["image"] = "gone.jpg"
    (tmp_path / "val.json").write_text(json.dumps(entries))
    dataset = LlavaDataset([(tmp_path / "val.json", pages)], model.tokenizer, 64, 512, SQUARE_64)
    fault = "every validation sample has to be readable: .*sample 1: there is no image"
    with pytest.raises(ValueError, match=fault):
        validate(model.eval(), dataset, ["all"] * 6, 6, 0, nullcontext)


# ---- train.py's evaluation ----
@pytest.fixture
def evaluated(model, pages, tmp_path, monkeypatch):
    """Calls train.evaluate with a fake `validate`; returns the run and what that was called with."""
    model.save_pretrained(tmp_path / "checkpoint")
    calls = []

    def fake(*arguments):
        calls.append(arguments)
        return 1.5, {"box": (3, 4), "a": (1, 2)}

    def call(*arguments, dtype="fp32"):
        start = ["--phase", 3, "--out", tmp_path, "--micro-batch", 2, "--workers", 0]
        run = run_of(*start, *arguments, dtype=dtype)
        train.evaluate(run, (pages / "val.json", pages), tmp_path / "checkpoint")
        return run, calls[0]
    monkeypatch.setattr(train, "validate", fake)
    return call


@pytest.mark.parametrize("dtype, frozen", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_evaluation_computes_in_the_runs_type_four_micro_batches_at_a_time(evaluated, dtype, frozen):
    run, (model, dataset, _, *arguments) = evaluated(dtype=dtype)
    assert model.llama.lm_head.weight.dtype == frozen and len(dataset) == 6
    assert arguments == [4 * 2, 0, run.autocast]
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("arguments, resolution", [([], 128), (["--resolution", 64], 64)])
def test_evaluation_is_at_the_checkpoints_resolution_or_the_one_asked_for(evaluated, arguments, resolution):
    _, (_, dataset, *_) = evaluated(*arguments)
    assert dataset[0]["images"][0].shape == (3, resolution, resolution)


def test_the_small_models_own_questions_are_counted_by_kind(evaluated):
    run, (_, dataset, kinds, *_) = evaluated()
    assert run.is_generated and kinds == kinds_by_id(dataset)


def test_other_questions_are_counted_together(evaluated, pages):
    _, (_, _, kinds, *_) = evaluated("--val", pages / "val.json", "--images", pages)
    assert kinds == ["all"] * 6


def test_what_follows_a_phase_is_printed_and_logged(evaluated, tmp_path, capsys):
    evaluated()
    assert "validation loss 1.5000, exact match 50.0%" in capsys.readouterr().err
    line, = metrics(tmp_path, 3)
    assert line == dict(checkpoint=str(tmp_path / "checkpoint"), val_loss=1.5, exact_match=0.5,
                        right={"box": [3, 4], "a": [1, 2]})


def test_a_checkpoint_that_is_only_evaluated_is_not_logged(evaluated, tmp_path, capsys):
    evaluated("--evaluate", tmp_path / "checkpoint")
    assert "validation loss 1.5000" in capsys.readouterr().err
    assert not (tmp_path / "phase3.metrics.jsonl").exists()


def test_evaluating_is_the_whole_command(model, pages, tmp_path, monkeypatch, capsys):
    """Of a random model, none of whose 6 answers is right."""
    model.save_pretrained(tmp_path / "checkpoint")
    command = ["train.py", "--phase", 3, "--evaluate", tmp_path / "checkpoint", "--val", pages / "val.json",
               "--images", pages, "--workers", 0, "--resolution", 64, "--out", tmp_path / "runs"]
    monkeypatch.setattr("sys.argv", [str(word) for word in command])
    train.main()
    out, err = capsys.readouterr()
    assert out == "" and "exact match 0.0%" in err and "all              0 of    6" in err
    assert not (tmp_path / "runs").exists()


# ---- Who draws the small model's data, and who evaluates ----
def with_words_for_work(*command):
    """train.py's main, which only prints what it would draw, train and evaluate."""
    def say(*words):
        os.write(1, f"{' '.join(words)}\n".encode())  # at once, where print may be cut by another process's

    def draw(folder, files):
        time.sleep(1)  # for a process that does not wait
        say("draw", *files)

    def train_phase(run, *start):
        say("train")
        return "runs/phase1"

    def evaluate(run, pair, checkpoint):
        say("evaluate", pair[0].name, "with", checkpoint)

    train.generate, train.train, train.evaluate = draw, train_phase, evaluate
    train_main(*command)


def test_one_process_draws_the_small_models_data_while_the_others_wait(forked, tmp_path):
    """Then both train and one evaluates."""
    command = ["train.py", "--phase", 1, "--out", tmp_path]
    done = forked(*command, processes=2, function=with_words_for_work)
    assert done.returncode == 0, done.stderr
    first, *others = done.stdout.splitlines()
    assert first == "draw captions.json val-captions.json"
    # one may evaluate before the other has begun
    assert sorted(others) == ["evaluate val-captions.json with runs/phase1", "train", "train"]


def test_only_the_questions_are_drawn_where_a_checkpoint_is_only_evaluated(forked, tmp_path):
    command = ["train.py", "--phase", 1, "--out", tmp_path, "--evaluate", "any"]
    done = forked(*command, function=with_words_for_work)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["draw val-captions.json", "evaluate val-captions.json with any"]


# ---- What is known before a phase and not after it ----
def sample_about(image):
    return {"id": "read-1", "image": image, "conversations": conversation("<image>\nWhat is it?", "A pen.")}


@pytest.mark.parametrize("text, sentence", [
    ('{"id": 1}\n{"id": 2}\n', "is not a JSON array of samples: it begins with"),  # JSON Lines
    (json.dumps([sample_about("a.png"), {"id": 1}]), "sample 1: every validation sample has to be readable: it has no"),
    (json.dumps([sample_about("gone.png")]), "sample 0: every validation sample .*there is no image at .*gone.png"),
    (json.dumps([sample_about("cut.png")]), "sample 0: every validation sample .*cut.png is not a whole image"),
], ids=["JSON Lines", "malformed", "without its image", "with a damaged image"])
def test_a_broken_validation_file_is_refused_before_the_training(options, ended, monkeypatch, tmp_path, text, sentence):
    monkeypatch.setattr(train, "take", None)
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "val.json").write_text(text)
    done = ended(train.main, *options(), "--val", tmp_path / "val.json", "--images", tmp_path)
    assert done.returncode == 2 and re.search(sentence, done.stderr), done.stderr

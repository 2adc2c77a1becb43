"""Scores the answers that sample.py --questions has written, as the paper's were scored.

    python -m data.score answers.jsonl TextVQA_VAL.tsv
"""
import argparse
import sys
from pathlib import Path

from data.answers import in_order, read_answers
from data.errors import printable, print_error
from data.benchmarks import ROTATION, SHORT_SENTENCES, read_benchmark, read_options
from data.metrics import (anls, exact_match, mmbench_hits, mme_totals, mmmu_open, option_letter, pope_totals,
                          refcoco_iou, vqa_accuracy)
from data.weights import write_json

RESOLUTIONS = (768, 1024, 1536)
PAPER = {  # tables 5 and 6: a file's name -> the scores at these resolutions
    "MME": (1541, 1553, 1575),
    "MMBench_DEV_EN": (68.0, 68.8, 68.7),
    "mmbench_dev_20230712": (68.0, 68.8, 68.7),
    "SEEDBench_IMG": (68.8, 69.3, 70.2),
    "RealWorldQA": (55.9, 58.8, 59.9),
    "MMMU_DEV_VAL": (36.3, 35.1, 35.8),
    "MMVet": (44.8, 44.4, 45.9),
    "TextVQA_VAL": (59.1, 62.5, 65.8),
    "DocVQA_VAL": (44.8, 48.5, 59.0),
    "POPE": (87.3, 87.7, 87.3),
    "refcoco_val": (84.5, 85.5, 86.5),
    "refcoco_testA": (89.0, 89.6, 90.6),
    "refcoco_testB": (79.2, 78.8, 80.5),
    "refcoco+_val": (77.7, 79.3, 80.0),
    "refcoco+_testA": (84.9, 86.1, 86.8),
    "refcoco+_testB": (69.7, 70.3, 71.5),
    "refcocog_val": (79.8, 80.6, 82.0),
    "refcocog_test": (79.7, 81.2, 82.4),
}
ANY_ASPECT = {  # table 7, the 1536 model: with the short side at 1536 and at 1664 pixels
    "SEEDBench_IMG": (68.9, 67.3), "TextVQA_VAL": (64.6, 64.2), "DocVQA_VAL": (65.0, 65.7),
}
SCORERS_OF_LLAVA = {  # what a question file's name holds -> LLaVA's program that scores its answers
    "textvqa": "llava/eval/eval_textvqa.py",
    "pope": "llava/eval/eval_pope.py",
    "mme": "convert_answer_to_mme.py of its eval.zip, then MME's eval_tool/calculation.py",
    "seed": "scripts/convert_seed_for_submission.py",
    "mmbench": "scripts/convert_mmbench_for_submission.py, for the server",
    "vqav2": "scripts/convert_vqav2_for_submission.py, for the server",
    "vizwiz": "scripts/convert_vizwiz_for_submission.py, for the server",
    "gqa": "scripts/convert_gqa_for_eval.py, then GQA's eval.py",
    "sqa": "llava/eval/eval_science_qa.py",
}


# ---- By kind ----
def score_each(questions, scores):
    """The mean in percent: of all questions, then of each split, wider category and category."""
    groups = {"together": list(scores)}
    for column in ("split", "l2-category", "category"):
        for question, score in zip(questions, scores):
            if question.row.get(column):
                groups.setdefault(f"{column} {question.row[column]}", []).append(score)
    return {name: 100 * sum(of_group) / len(of_group) for name, of_group in groups.items()}


def chooses_right(question, text):
    """Whether an answer to a multiple-choice question, or to one of MMMU's open ones, is right."""
    options = read_options(question.row)
    if not options:
        return mmmu_open(text, question.truth) == "A"
    return option_letter(text, options) == question.truth


def score_mmbench(questions, texts):
    """Circular accuracy, by category of a group's first question, and without rotations."""
    groups = [group_of(question) for question in questions]
    letters = [option_letter(text, read_options(question.row)) for question, text in zip(questions, texts)]
    hits = mmbench_hits(groups, letters, [question.truth for question in questions])

    first = {}  # of each group: its question that is not rotated, and whether that alone is right
    for group, question, letter in zip(groups, questions, letters):
        if group not in first or str(question.id) == group:
            first[group] = question, letter == question.truth
    main_questions, without_rotation = zip(*first.values())
    scores = score_each(main_questions, [hits[group] for group in first])
    return scores | {"without rotations": 100 * sum(without_rotation) / len(without_rotation)}


def group_of(question):
    """The index of an MMBench question, of which this is one rotation."""
    if question.row.get("g_index"):
        return question.row["g_index"]
    return str(question.id % ROTATION) if isinstance(question.id, int) else question.id


def score_pope(questions, texts):
    truths, categories = zip(*((question.truth, question.row.get("category") or "all") for question in questions))
    scores = {}
    for name, total in pope_totals(texts, truths, categories).items():
        name = "together" if name == "Overall" else f"category {name}"
        scores |= {name: total.f1, f"{name}: accuracy": total.accuracy,
                   f"{name}: precision": total.precision, f"{name}: recall": total.recall}
    return scores


def score_mme(questions, texts):
    pictures = [question.row.get("image_path") or str(question.images[0]) for question in questions]
    categories = [question.row["category"] for question in questions]
    totals = mme_totals(texts, [question.truth for question in questions], categories, pictures)
    return {"perception": totals.pop("perception"), "cognition": totals.pop("cognition")} | {
        f"category {name}": score for name, score in totals.items()}


def score(kind, questions, texts):
    """{name: score}: of the questions together, which is first and what the paper reports, and by category."""
    if kind == "MME":
        return score_mme(questions, texts)
    if kind == "POPE":
        return score_pope(questions, texts)
    if kind == "MMBench":
        return score_mmbench(questions, texts)
    of_one_answer = {
        "multiple choice": chooses_right,
        "MMMU": chooses_right,
        "TextVQA": lambda question, text: vqa_accuracy(text, question.truth),
        "DocVQA": lambda question, text: anls(text, question.truth),
        "RefCOCO": lambda question, text: refcoco_iou(text, *question.truth) >= 0.5,
        "short answers": lambda question, text: exact_match(text, question.truth),
    }[kind]
    scores = score_each(questions, [of_one_answer(question, text) for question, text in zip(questions, texts)])
    if kind == "MMMU" and "split validation" in scores:  # the file holds dev too, and the paper reports validation
        return {"split validation": scores.pop("split validation")} | scores
    return scores


MEASURES = {  # of each kind: what its first number is
    "MME": "MME's score, at most 2000", "POPE": "F1", "MMBench": "circular accuracy", "multiple choice": "accuracy",
    "MMMU": "accuracy", "TextVQA": "VQA accuracy", "DocVQA": "ANLS", "RefCOCO": "boxes with an IoU of at least 0.5",
    "short answers": "exact match",
}


# ---- The program ----
def options_of(answers):
    """sample.py's options, with which the answers were made; {} for those of other programs."""
    options = answers[0]["metadata"].get("options") if answers else None
    return options if isinstance(options, dict) else {}


def differences(kind, options):
    """What differs from how the paper's numbers were measured, a sentence each."""
    if kind == "RefCOCO":
        sentences = []
        if options.get("any_aspect"):
            sentences.append("the image: --any-aspect, and boxes are scored as shares of the padded square, which the "
                             "paper used")
    else:
        sentences = ["the template: training's; VLMEvalKit wrote HUMAN for user in the system sentence",
                     "the image: as it lies in the file; VLMEvalKit saved it as a JPEG before it was read"]
        if options.get("any_aspect"):
            sentences.append("the image: --any-aspect, which in the paper is table 7")
    if kind in ("TextVQA", "DocVQA") and options.get("short_sentence", "training") == "training":
        sentences.append("the sentence behind the question: training's; the paper's days had another "
                         "(sample.py --short-sentence vlmevalkit)")
    if kind in ("MMBench", "multiple choice", "MMMU", "MME", "POPE"):
        sentences.append("the judge: none; VLMEvalKit may have asked ChatGPT what undecided answers mean, which count "
                         "as wrong here")
    return sentences


def write_mm_vet(path, questions, texts):
    """Writes the file that MM-Vet's site takes, of which GPT-4 is the judge; returns its path."""
    target = Path(path).with_suffix(".mm-vet.json")
    write_json(target, {f"v1_{str(question.id).removeprefix('v1_')}": text for question, text in zip(questions, texts)})
    return target


def paper_figures(name):
    """The paper's scores of a file, as text."""
    figures = [f"{figure} at {side}" for figure, side in zip(PAPER[name], RESOLUTIONS)]
    figures += [f"{figure} with a short side of {side}" for figure, side in zip(ANY_ASPECT.get(name, ()), (1536, 1664))]
    return ", ".join(figures)


def print_scores(file, kind, answers, scores):
    """The score and beside it the paper's, then by category, then what differs from the paper's protocol."""
    name = Path(file).stem
    model = printable(str(answers[0].get("model_id") or "an unknown model"))
    print(f"{Path(file).name}: {len(answers):,} answers of {model}, {MEASURES[kind]}\n")
    for place, (part, value) in enumerate(scores.items()):
        paper = f"   the paper: {paper_figures(name)}" if place == 0 and name in PAPER else ""
        print(f"  {printable(part):40s} {value:8.2f}{paper}")

    sentences = differences(kind, options_of(answers)) if name in PAPER else []
    if sentences:
        print("\nwhat differs from the paper's protocol:")
    for sentence in sentences:
        print(f"  {sentence}")


def run(answers_path, file):
    """Scores the answers to a file's questions, or says who does."""
    answers = read_answers(answers_path)
    short_sentence = options_of(answers).get("short_sentence", "training")
    if short_sentence not in SHORT_SENTENCES:
        raise ValueError(f"{answers_path}: its metadata name a short_sentence {short_sentence!r} that is not known")
    kind, questions, _, _ = read_benchmark(file, short_sentence=short_sentence)
    answers = in_order(answers, questions, answers_path)
    texts = [answer["text"] for answer in answers]

    num_failed = sum("error" in answer["metadata"] for answer in answers)
    if num_failed:
        print(f"{num_failed} questions could not be asked, and their answers are empty", file=sys.stderr)
    name = Path(file).stem.lower().replace("-", "")
    if kind == "MM-Vet" or (kind == "LLaVA" and "mmvet" in name):
        target = write_mm_vet(answers_path, questions, texts)
        print(f"{Path(file).name} is judged by GPT-4: give {target} to MM-Vet's site, which github.com/yuweihao/MM-Vet "
              f"names; the paper: {paper_figures('MMVet')}")
    elif kind == "LLaVA":
        programs = [program for word, program in SCORERS_OF_LLAVA.items() if word in name]
        program = programs[0] if programs else "the program that its docs/Evaluation.md names for it"
        print(f"{Path(file).name} holds no truth; its {len(answers):,} answers are complete, and LLaVA's repository "
              f"scores them: {program}")
    else:
        num_unknown = sum(question.truth is None for question in questions)
        if num_unknown:
            raise ValueError(f"{file} holds no answer to {num_unknown} of its {len(questions)} questions: they cannot "
                             "be scored here")
        print_scores(file, kind, answers, score(kind, questions, texts))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("answers", help="what sample.py has written: LLaVA's answer lines")
    parser.add_argument("file", help="the file of questions")
    args = parser.parse_args()
    try:
        run(args.answers, args.file)
    except Exception as error:
        print_error("data.score", error, out_of_memory="close other programs")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

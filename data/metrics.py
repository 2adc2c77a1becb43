"""What answers are worth: the definitions that the paper's numbers were measured with.

The paper (section 4.1) names VLMEvalKit; these are its definitions of May 2024, without a judge. RefCOCO's are those of
ConvLLaVA's own script. `iou` and `exact_match` also validate training.
"""
import re
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

# ---- Short answers ----
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
ARTICLES = ("a", "an", "the")


def make_contractions():
    """Words that lack their apostrophes -> the usual spelling, as VQA's evaluation lists them."""
    words_before = {
        "n't": "ai are ca could did does do had has have is might must need ought sha should was were wo would",
        "'ve": "could might must not should they we what where who would you",
        "'d": "he how it someone something there they where who you",
        "'ll": "how it somebody someone something they what who why you",
        "'s": "he how somebody someone that there what when where who why",
        "'re": "there they what why you",
    }
    table = {}
    for ending, words in words_before.items():
        for word in words.split():
            table[word + ending.replace("'", "")] = word + ending

    # those with two apostrophes, of which either may be missing
    for word in "he it she somebody someone something there they we who you".split():
        table[f"{word}d've"] = table[f"{word}'dve"] = f"{word}'d've"
    for word in "could had might should would".split():
        table[f"{word}nt've"] = table[f"{word}n'tve"] = f"{word}n't've"

    table |= {"maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "yall": "y'all"}
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table["somebody'd"] = "somebodyd"  # the wrong way round in the original too
    return table


CONTRACTIONS = make_contractions()


def without_punctuation(text):
    """Signs become blanks, or nothing where they stand beside a blank or the text has a number like 1,000."""
    has_long_number = re.search(r"\d,\d", text)
    result = text
    for sign in PUNCTUATION:
        beside_blank = f"{sign} " in text or f" {sign}" in text
        result = result.replace(sign, "" if beside_blank or has_long_number else " ")
    # a period stays before a digit; the original removes no more than 32
    return re.sub(r"\.(?!\d)", "", result, count=32)


def normalise(text):
    """TextVQA: an answer without case, punctuation and articles, with digits for the numbers up to ten."""
    text = text.replace("\n", " ").replace("\t", " ").strip()
    words = [NUMBERS.get(word, word) for word in without_punctuation(text).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(prediction, answers):
    """TextVQA: the mean, over the ten people asked, of min(1, how many of the other nine agree / 3)."""
    prediction = normalise(prediction)
    agree = [normalise(answer) == prediction for answer in answers]
    scores = [min(1, (sum(agree) - agrees) / 3) for agrees in agree]
    return sum(scores) / len(scores)


def edit_distance(a, b):
    """Levenshtein's: the fewest letters to insert, to remove or to replace."""
    row = list(range(len(b) + 1))  # distances of a[:i] to every b[:j]
    for i, letter in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            replaced = diagonal + (letter != other)
            diagonal = row[j]
            row[j] = min(replaced, row[j] + 1, row[j - 1] + 1)
    return row[-1]


def anls(prediction, answers):
    """DocVQA: 1 - the edit distance as a share of the longer text, to the nearest answer; 0 below 0.5."""
    distances = []
    for answer in answers:
        distance = edit_distance(*(" ".join(text.lower().split()) for text in (prediction, answer)))
        longer = max(len(prediction.upper()), len(answer.upper()))  # before the clean-up, as in the original
        distances.append(distance / longer if longer else 0.0)
    similarity = 1 - min(distances)
    return similarity if similarity >= 0.5 else 0.0


def exact_match(prediction, answer):
    """Other short answers, and train.py's validation: the same text, but for blanks around it."""
    return prediction.strip() == answer.strip()


# ---- Yes or no ----
class YesNo(NamedTuple):
    f1: float
    accuracy: float
    precision: float
    recall: float


def yes_or_no(prediction):
    """POPE and MME: "Yes", "No", or "Unknown" where an answer has neither word or both."""
    words = without_punctuation(prediction.lower()).split()
    if ("yes" in words) == ("no" in words):
        return "Unknown"
    return "Yes" if "yes" in words else "No"


def pope_totals(predictions, truths, categories):
    """POPE: {"Overall" and each category: YesNo, in percent}, where yes is positive and "Unknown" is no yes.

    A question in several categories, as "popular,random", counts in each, and in "Overall" as often.
    """
    pairs = defaultdict(list)
    for prediction, truth, names in zip(predictions, truths, categories, strict=True):
        pair = yes_or_no(prediction), truth.capitalize()
        for name in names.split(","):
            pairs["Overall"].append(pair)
            pairs[name].append(pair)
    return {name: yes_no_scores(of_category) for name, of_category in pairs.items()}


def yes_no_scores(pairs):
    """POPE: F1, accuracy, precision and recall of [(answer, truth)], in percent; 0 where one divides by 0."""
    count = Counter((answer == "Yes", truth == "Yes") for answer, truth in pairs)
    hits, said_yes = count[True, True], count[True, True] + count[True, False]
    are_yes = count[True, True] + count[False, True]
    right = sum(answer == truth for answer, truth in pairs)
    f1 = 2 * hits / (said_yes + are_yes) if hits else 0.0
    return YesNo(100 * f1, 100 * right / len(pairs), 100 * hits / max(1, said_yes), 100 * hits / max(1, are_yes))


PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_totals(predictions, truths, categories, pictures):
    """MME: {"perception", "cognition" and each category: accuracy + accuracy+, in percent, at most 200 a category}.

    Accuracy counts questions, and accuracy+ the pictures whose two questions are both answered right.
    """
    right = defaultdict(lambda: defaultdict(list))  # {category: {picture: [whether each answer is right]}}
    for prediction, truth, category, picture in zip(predictions, truths, categories, pictures, strict=True):
        right[category][picture].append(yes_or_no(prediction) == truth.capitalize())

    scores = {}
    for category, by_picture in right.items():
        pairs = [answers[:2] for answers in by_picture.values()]
        accuracy = sum(sum(pair) for pair in pairs) / sum(len(pair) for pair in pairs)
        accuracy_plus = sum(all(pair) for pair in pairs) / len(pairs)
        scores[category] = 100 * accuracy + 100 * accuracy_plus
    perception = sum(scores.get(category, 0.0) for category in PERCEPTION)
    cognition = sum(scores.get(category, 0.0) for category in COGNITION)
    return {"perception": perception, "cognition": cognition} | scores


# ---- Multiple choice ----
REFUSALS = ("Sorry, I can't help with images of people yet.", "I can't process this file.",
            "I'm sorry, but without the image provided", "Cannot determine the answer")


def option_letter(prediction, options):
    """MMBench, SEEDBench, RealWorldQA and MMMU: the letter that an answer chooses, "Z" for none, None where undecided.

    options: {letter: text}. A letter that stands alone decides, else the one option whose text is in the answer.
    """
    if any(refusal in prediction for refusal in REFUSALS):
        return "Z"
    words = re.sub(r"[.()\[\],:;!*#{}]", " ", prediction).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1:
        return letters[0]
    if not letters and "Z" in words:
        return "Z"
    named = [letter for letter, text in options.items() if text.lower() in prediction.lower()]
    return named[0] if len(named) == 1 else None


def mmmu_open(prediction, answer):
    """MMMU's questions without options: "A" where the answer is chosen, as if it were option A beside one other."""
    return option_letter(prediction, {"A": answer, "B": "Other Answers"})


def mmbench_hits(groups, letters, truths):
    """MMBench: {group: 1 or 0}. A question is asked once for each rotation of its options; all have to be right."""
    hits = {}
    for group, letter, truth in zip(groups, letters, truths, strict=True):
        hits[group] = int(hits.get(group, 1) and letter == truth)
    return hits


# ---- Boxes ----
def read_box(text):
    """RefCOCO: the first [x1, y1, x2, y2] of a text as floats; None where there is none or it holds other things."""
    match = re.search(r"\[+(.*?),(.*?),(.*?),(.*?)\]", text)
    try:
        return [float(value) for value in match.groups()] if match else None
    except ValueError:
        return None


def iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2) in float32; 0 where both are empty."""
    a, b = np.array(a, np.float32), np.array(b, np.float32)
    width, height = np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]))
    area_a, area_b = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    union = area_a + area_b - width * height
    return float(width * height / union) if union else 0.0


def refcoco_iou(prediction, box, height, width):
    """RefCOCO: the IoU of an answer's box with `box`, in pixels of an image of this size; from 0.5 it is a hit.

    Answers are shares of the padded square (in thousandths where they are large), so that the padding is taken off.
    """
    shares = np.array(read_box(prediction) or [0, 0, 0, 0], np.float32)
    if shares.sum() >= 4:
        shares /= 1000
    pixels = shares * max(height, width)
    pixels[1::2] -= max(0, width - height) // 2
    pixels[0::2] -= max(0, height - width) // 2
    return iou(pixels, box)

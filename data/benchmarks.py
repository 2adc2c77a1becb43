"""Reads benchmark files into questions: VLMEvalKit's TSV, LLaVA's question lines, and RefCOCO's lines.

    benchmark = read_benchmark("TextVQA_VAL.tsv")
    question = benchmark.questions[0]     # .id, .prompt, .truth
    pixels = encode_once(question.images, {}, lambda image: square(image, 1536))    # [(3, 1536, 1536)]
"""
import ast
import base64
import csv
import hashlib
import io
import json
import re
from pathlib import Path
from string import ascii_uppercase
from typing import NamedTuple

from data.dataset import inside
from data.images import decode_image
from data.metrics import COGNITION, PERCEPTION

SHORT = "Answer the question using a single word or phrase."
SHORT_SENTENCES = {  # of TextVQA and DocVQA
    "training": SHORT,  # LLaVA's, which the models were tuned on
    "vlmevalkit": "Please try to answer the question with short words or phrases if possible\n.",  # March to June 2024
}
LETTER = {False: "Answer with the option's letter from the given choices directly.", True: "请直接回答选项字母。"}
DIRECTLY = {False: "Answer the question directly.", True: "请直接回答问题。"}  # True: in Chinese
BOX_QUESTION = "Please provide the bounding box coordinate of the region this sentence describes: {}."

KINDS = {  # by the name of a VLMEvalKit file; one of another name is known by its columns and answers
    "MME": "MME", "POPE": "POPE", "MMBench_DEV_EN": "MMBench", "mmbench_dev_20230712": "MMBench",
    "SEEDBench_IMG": "multiple choice", "RealWorldQA": "multiple choice", "MMMU_DEV_VAL": "MMMU",
    "MMVet": "MM-Vet", "TextVQA_VAL": "TextVQA", "DocVQA_VAL": "DocVQA",
}
LONGEST_INDEX = 64  # letters; a longer value in the column `image` is an image
ROTATION = 1_000_000  # between the indices of an MMBench question's rotations


class Question(NamedTuple):
    """One question of a benchmark.

    images: for `read_bytes`; prompt: the text after them; truth: as the kind has it, None where the file has none;
    row: the file's other columns, as text."""
    id: int | str
    images: list
    prompt: str
    truth: object
    row: dict

    @property
    def pieces(self):
        """The prompt for `encode_conversation`: in pieces, where it names each of its images, as "<image 1>"."""
        first, *others = re.split(r"<image \d+>", self.prompt)
        if len(others) != len(self.images):
            return self.prompt
        return [first, *("\n" + text for text in others)]


class Benchmark(NamedTuple):
    """kind: what is asked and how it is scored; digest: the file's sha256; num_without_image: rows left out."""
    kind: str
    questions: list
    digest: str
    num_without_image: int = 0


class TsvImage(NamedTuple):
    """Where an image's base64 stands in a TSV file."""
    path: Path
    start: int  # the byte where its row begins
    column: int
    place: int | None  # in a list of images


# ---- Images ----
def read_bytes(image):
    """The image file's bytes, of a path or a TsvImage. Raises ValueError where there is none."""
    if isinstance(image, Path):
        if not image.is_file():
            raise ValueError(f"there is no image at {image}")
        return image.read_bytes()
    with open(image.path, "rb") as file:
        file.seek(image.start)
        cell = next(csv_rows(file))[image.column]
    text = cell if image.place is None else ast.literal_eval(cell)[image.place]
    try:
        return base64.b64decode(text)
    except ValueError as error:
        raise ValueError(f"its image is not base64: {error}") from None


def encode_once(images, encoded, encode):
    """Encodes images with `encode`; one whose bytes were met before comes from `encoded`, {sha256: result}."""
    results = []
    for image in images:
        content = read_bytes(image)
        key = hashlib.sha256(content).digest()
        if key not in encoded:
            encoded[key] = encode(decode_image(io.BytesIO(content), "its image"))
        results.append(encoded[key])
    return results


def find_images(path, start, column, cell):
    """The images that a cell holds: TsvImages, or the text of an index, of the row where an image stands."""
    if not cell.startswith("["):
        return [cell if len(cell) <= LONGEST_INDEX else TsvImage(path, start, column, None)]
    items = read_list(cell)
    if items is None:
        raise ValueError("its images are no list of texts")
    return [item if len(item) <= LONGEST_INDEX else TsvImage(path, start, column, i) for i, item in enumerate(items)]


def follow(image, images_by_index):
    """The images that one entry of find_images stands for."""
    if isinstance(image, TsvImage):
        return [image]
    images = images_by_index.get(image, [])
    if not images or not all(isinstance(target, TsvImage) for target in images):
        raise ValueError(f"its image is that of row {image!r}, and there is no such row with an image")
    return images


# ---- TSV ----
def csv_rows(lines):
    """Rows of a TSV file from its lines in bytes. A quoted cell may hold line breaks, and megabytes."""
    csv.field_size_limit(2 ** 30)  # Python's own limit is 131,072
    return csv.reader((line.decode("utf-8") for line in lines), delimiter="\t", strict=True)


def read_lines(path, digest):
    """Yields (first byte, line), one at a time: the files have gigabytes. Raises ValueError where there is no file."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file of questions at {path}")
    with open(path, "rb") as file:
        start = 0
        for line in file:
            digest.update(line)
            yield start, line
            start += len(line)


def read_tsv(path, digest):
    """Yields ({column: text}, images) of each row that has an image, and None of each that has none."""
    end = 0  # of what the csv reader has taken

    def lines():
        nonlocal end
        for start, line in read_lines(path, digest):
            end = start + len(line)
            yield line

    rows = csv_rows(lines())
    header = [name.removeprefix("\ufeff") for name in next(rows, [])]
    for name in ("index", "image", "question"):
        if name not in header:
            raise ValueError(f"it has no column {name!r}, which a TSV file of questions needs")
    column = header.index("image")

    start = end
    for row in rows:
        if row and len(row) != len(header):
            raise ValueError(f"the row behind byte {start} has {len(row)} cells, and the header {len(header)}")
        if row:
            images = find_images(path, start, column, row[column]) if row[column] else None
            cells = {name: cell for name, cell in zip(header, row) if name != "image"}
            yield (cells, images) if images else None
        start = end


def read_list(text):
    """The list of texts that a cell holds in Python's notation; None where it holds another thing."""
    try:
        items = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return items if isinstance(items, list) and items and all(isinstance(item, str) for item in items) else None


def read_options(row):
    """A row's options {letter: text}; "None" and "NA" are texts as any other."""
    return {letter: row[letter] for letter in ascii_uppercase if row.get(letter)}


def kind_of_rows(rows):
    """What kind of questions the rows of a TSV file hold, by their columns and answers."""
    answers = [row.get("answer", "") for row in rows]
    if any(read_options(row) for row in rows):
        has_large_index = any(row["index"].isdigit() and int(row["index"]) >= ROTATION for row in rows)
        is_rotated = "g_index" in rows[0] or has_large_index
        return "MMBench" if is_rotated else "multiple choice"
    if all(answer.lower() in ("yes", "no") for answer in answers):
        is_mme = "image_path" in rows[0] and {row.get("category") for row in rows} <= {*PERCEPTION, *COGNITION}
        return "MME" if is_mme else "POPE"
    lists = [read_list(answer) for answer in answers]
    if all(lists):
        return "TextVQA" if all(len(answers) == 10 for answers in lists) else "DocVQA"
    return "short answers"


def make_prompt(kind, row, short_sentence):
    """The text that is asked after the image, for LLaVA's models."""
    if kind in ("MME", "POPE", "MM-Vet"):
        return row["question"]
    if kind in ("TextVQA", "DocVQA"):
        return f"{row['question']}\n{SHORT_SENTENCES[short_sentence]}"
    if kind == "short answers":
        return f"{row['question']}\n{SHORT}"

    options = read_options(row)
    lines = [row["hint"]] if row.get("hint") else []
    lines += [row["question"], *(f"{letter}. {text}" for letter, text in options.items())]
    is_chinese = bool(re.search("[\u4e00-\u9fff]", "".join(lines)))
    return "\n".join([*lines, (LETTER if options else DIRECTLY)[is_chinese]])


def read_truth(kind, row):
    """A row's answer: a text, or for TextVQA and DocVQA a list of them; None where the row has none."""
    answer = row.get("answer")
    if not answer:
        return None
    if kind in ("MME", "POPE") and answer.lower() not in ("yes", "no"):
        raise ValueError(f"its answer is {answer!r}, and should be Yes or No")
    if kind in ("TextVQA", "DocVQA"):
        answers = read_list(answer)
        if answers is None:
            raise ValueError("its answer is no list of texts")
        return answers
    return answer


def named_images(prompt, images):
    """MMMU: the images that a prompt names, as "<image 1>", in its order; all of them where it names none."""
    numbers = [int(number) for number in re.findall(r"<image (\d+)>", prompt)]
    if not all(1 <= number <= len(images) for number in numbers):
        raise ValueError(f"it names image {max(numbers)} of {len(images)}")
    return [images[number - 1] for number in numbers] or images


def read_tsv_questions(path, digest, short_sentence):
    """(kind, questions, number of rows without an image) of a VLMEvalKit file."""
    rows = list(read_tsv(path, digest))
    num_rows = len(rows)
    rows = [row for row in rows if row]
    if not rows:
        return "", [], num_rows

    kind = KINDS.get(path.stem) or kind_of_rows([row for row, _ in rows])
    if kind == "MME" and "category" not in rows[0][0]:
        raise ValueError("it has no column 'category', by which MME is scored")
    has_numbers = all(re.fullmatch(r"\d+", row["index"]) for row, _ in rows)
    images_by_index = {row["index"]: images for row, images in rows}
    questions = []
    for row, images in rows:
        try:
            prompt = make_prompt(kind, row, short_sentence)
            images = [target for image in images for target in follow(image, images_by_index)]
            images = named_images(prompt, images)
            truth = read_truth(kind, row)
        except ValueError as error:
            raise ValueError(f"row {row['index']}: {error}") from None
        questions.append(Question(int(row["index"]) if has_numbers else row["index"], images, prompt, truth, row))
    return kind, questions, num_rows - len(rows)


# ---- JSON lines ----
def read_json_questions(path, digest, folder):
    """(kind, questions) of LLaVA's question lines, or of RefCOCO's."""
    if folder == "":
        raise ValueError("it names image files: give the folder that they are in with --images")
    if folder is not None and not Path(folder).is_dir():
        raise ValueError(f"--images {folder} is no folder")
    kind, questions = "", []
    for number, (_, line) in enumerate(read_lines(path, digest), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise ValueError("it is no JSON object")
            kind = kind or ("RefCOCO" if "sent" in entry else "LLaVA")
            question = refcoco_question(number, entry) if kind == "RefCOCO" else llava_question(entry)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number}: {error}") from None
        questions.append(question._replace(images=[inside(Path(folder or ""), name) for name in question.images]))
    return kind, questions


def check_fields(entry, **types):
    for name, kinds in types.items():
        if not isinstance(entry.get(name), kinds) or isinstance(entry[name], bool):
            raise ValueError(f"it has no {name!r} as LLaVA's question lines and RefCOCO's have it")


def llava_question(entry):
    check_fields(entry, question_id=(int, str), text=str)
    names = entry.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError("its image is not a path")
    return Question(entry["question_id"], names, entry["text"], None, {"category": str(entry.get("category", ""))})


def refcoco_question(number, entry):
    """Its truth: (box in pixels of the image, height, width)."""
    check_fields(entry, image=str, sent=str, bbox=list, height=(int, float), width=(int, float))
    box = entry["bbox"]
    if len(box) != 4 or not all(isinstance(value, (int, float)) for value in box):
        raise ValueError("its bbox is not [x1, y1, x2, y2]")
    prompt = BOX_QUESTION.format(entry["sent"])
    return Question(number, [entry["image"]], prompt, (box, entry["height"], entry["width"]), {})


# ---- All ----
def read_benchmark(path, folder=None, short_sentence="training"):
    """A file's questions, their images not read yet. Raises ValueError where it cannot be used.

    folder: of the images that JSON lines name, None where they are not read; short_sentence: of SHORT_SENTENCES.
    """
    path, digest, num_without_image = Path(path), hashlib.sha256(), 0
    try:
        if path.suffix == ".tsv":
            kind, questions, num_without_image = read_tsv_questions(path, digest, short_sentence)
        elif path.suffix == ".jsonl":
            kind, questions = read_json_questions(path, digest, folder)
        else:
            raise ValueError("it should be VLMEvalKit's .tsv, or LLaVA's or RefCOCO's .jsonl")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged or of another kind: {error}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None

    if not questions:
        raise ValueError(f"{path} holds no question" + (" with an image" if num_without_image else ""))
    pairs = set()
    for question in questions:
        if (question.id, question.prompt) in pairs:
            raise ValueError(f"{path}: question {question.id} stands twice with the same prompt")
        pairs.add((question.id, question.prompt))
    return Benchmark(kind, questions, digest.hexdigest(), num_without_image)

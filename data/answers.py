"""Answer files: LLaVA's lines, a JSON object for each question, in the order of the questions."""
import fcntl
import hashlib
import json
import uuid
from pathlib import Path

from tqdm import tqdm

from data.errors import tell

WINDOW = 64  # questions that are answered together; what is written is complete up to a window's end
BEGINNING = b'{"question_id": '  # of every line


def answer_line(question, text, metadata):
    """The fields that LLaVA's programs read, in their order."""
    return dict(question_id=question.id, prompt=question.prompt, text=text, answer_id=uuid.uuid4().hex[:22],
                model_id=metadata.get("checkpoint", ""), metadata=metadata)


def parse_answers(content, path):
    """The answers that a file's bytes hold. Raises ValueError naming the first line that is none."""
    answers = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        is_answer = (isinstance(answer, dict) and isinstance(answer.get("question_id"), (int, str))
                     and all(isinstance(answer.get(name), str) for name in ("prompt", "text")))
        if not is_answer:
            raise ValueError(f"{path}, line {number}: it is no answer, which has question_id, prompt and text; "
                             "sample.py completes a file where it was interrupted")
        if not isinstance(answer.get("metadata"), dict):
            answer["metadata"] = {}
        answers.append(answer)
    return answers


def check_answers_path(path, questions_path):
    """Raises ValueError where answers cannot be written to `path`: better known before a model is loaded."""
    if not Path(path).absolute().parent.is_dir() or (Path(path).exists() and not Path(path).is_file()):
        raise ValueError(f"--answers {path} should be a file in a folder that is there")
    if Path(path).resolve() == Path(questions_path).resolve():
        raise ValueError("--answers names the file of questions: take another name")


def flat(metadata):
    """Metadata with the options beside the other fields, so that an error names the option that differs."""
    options = metadata.get("options")
    return metadata | (options if isinstance(options, dict) else {}) | {"options": None}


def find_answers(path, questions, metadata):
    """The answers to the first questions that a file holds, a half-written last line left out, and their bytes.

    Raises ValueError where they are another file's, another checkpoint's or another way's of answering.
    """
    content = Path(path).read_bytes() if Path(path).exists() else b""
    complete = content[:content.rfind(b"\n") + 1]
    half_line = content[len(complete):]
    # a half-written line may be shorter than BEGINNING, or longer
    if half_line[:len(BEGINNING)] != BEGINNING[:len(half_line)]:
        raise ValueError(f"{path} is no file of answers, and is left as it is: take another name for --answers")

    answers = parse_answers(complete, path)
    if len(answers) > len(questions):
        raise ValueError(f"{path} holds {len(answers)} answers to {len(questions)} questions: it is another file's")
    for number, (answer, question) in enumerate(zip(answers, questions), 1):
        if (answer["question_id"], answer["prompt"]) != (question.id, question.prompt):
            raise ValueError(f"{path}, line {number} answers another question than number {number} of the file: give "
                             "another name with --answers")
        older = flat(answer["metadata"])
        for name, value in flat(metadata).items():
            if older.get(name) != value:
                raise ValueError(f"{path}, line {number}: its {name} is {older.get(name)}, and now it is {value}: give "
                                 "another name with --answers")
    return answers, complete


def write_answers(path, benchmark, checkpoint, options, weight, answer_window):
    """Answers the questions that a file does not answer yet, window by window; returns how many could not be asked.

    checkpoint: its name; options: those that change answers; weight: a tensor that all of training changes, so that it
    tells checkpoints of one name apart; answer_window: of some questions, yields (its place among them, the answer,
    None or what was wrong).
    """
    digest = hashlib.sha256(weight.detach().float().cpu().numpy()).hexdigest()
    metadata = dict(checkpoint=checkpoint, weights=digest[:16], questions_sha256=benchmark.digest, options=options)
    questions = benchmark.questions
    if benchmark.num_without_image:
        tell(f"{benchmark.num_without_image} rows without an image are left out")
    with open(path, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system lets go of it when the process ends
        except OSError:
            raise ValueError(f"another program is writing {path}: let it end, or take another name for "
                             "--answers") from None
        answers, complete = find_answers(path, questions, metadata)
        file.truncate(len(complete))
        num_failed = sum("error" in answer["metadata"] for answer in answers)
        with tqdm(total=len(questions), initial=len(answers), unit="question") as bar:
            for start in range(len(answers), len(questions), WINDOW):
                window = questions[start:start + WINDOW]
                lines = [None] * len(window)
                for place, text, error in answer_window(window):
                    lines[place] = answer_line(window[place], text, metadata | ({"error": error} if error else {}))
                    num_failed += error is not None
                    bar.update()
                file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
                file.flush()
    if num_failed:
        tell(f"{num_failed} questions could not be asked: their answers are empty")
    return num_failed


def read_answers(path):
    """The answers of a finished file."""
    if not Path(path).is_file():
        raise ValueError(f"there is no file of answers at {path}")
    return parse_answers(Path(path).read_bytes(), path)


def in_order(answers, questions, path):
    """Answers in the order of their questions. Raises ValueError where some lack, or are too many."""
    by_pair = {(question.id, question.prompt): [] for question in questions}
    num_foreign = 0
    for answer in answers:
        pair = answer["question_id"], answer["prompt"]
        if pair in by_pair:
            by_pair[pair].append(answer)
        else:
            num_foreign += 1

    num_lacking = sum(not found for found in by_pair.values())
    num_twice = sum(len(found) > 1 for found in by_pair.values())
    if num_lacking or num_twice or num_foreign:
        raise ValueError(f"{path} does not fit the questions: of {len(questions)}, {num_lacking} have no answer and "
                         f"{num_twice} more than one, and {num_foreign} answers belong to another file")
    return [found[0] for found in by_pair.values()]

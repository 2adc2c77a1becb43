"""Validation of training: the loss, and the share of greedy answers that are right."""
import json
import sys

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.conversation import IGNORE, IMAGE_TOKEN
from data.dataset import TIMEOUT, collate
from data.metrics import exact_match, iou, read_box


@torch.no_grad()
def validate(model, dataset, kinds, batch, workers, autocast):
    """Returns (loss per label, {kind of sample: (right answers, all answers)}).

    kinds: a name to count each sample under; batch: samples at a time; autocast: makes the context to compute in.
    Only the first question of a conversation is asked. Raises ValueError where a sample cannot be read.
    """
    loss, num_labels, is_right = 0.0, 0, []
    loader = DataLoader(dataset, batch, collate_fn=collate, num_workers=workers, timeout=TIMEOUT if workers else 0)
    for micro in tqdm(loader, "validation"):
        if micro["unreadable"]:
            raise ValueError(f"every validation sample has to be readable: {micro['unreadable'][0]}")
        with autocast():
            # the loss of all turns, with images that are encoded once for it and for the answers
            visual = model.encode_images(micro["images"])
            loss += model(micro["input_ids"], visual, micro["labels"], divisor=1).item()
            num_labels += micro["num_labels"]

            # an answer is stopped 16 tokens after the end of the longest expected one
            prompts, images, expected = first_questions(micro, visual, model.tokenizer)
            limit = max(len(tokens) for tokens in expected) + 16
            answers = greedy_answers(model, prompts, images, limit)
        for answer, tokens in zip(answers, expected):
            is_right.append(agree(answer, model.tokenizer.decode(tokens).strip()))

    counts = {}
    for kind in sorted(set(kinds)):
        of_kind = [value for value, name in zip(is_right, kinds) if name == kind]
        counts[kind] = sum(of_kind), len(of_kind)
    return loss / num_labels, counts


def check_questions(dataset):
    """Raises ValueError where a validation sample cannot be read: better known before a phase than after it."""
    for index in range(len(dataset)):
        entry, folder, name = dataset.entry(index)
        try:
            dataset.read(entry, folder)
        except ValueError as error:
            raise ValueError(f"{name}: every validation sample has to be readable: {error}") from None


def kinds_by_id(dataset):
    """The kind of each sample, where ids are like "read-17"."""
    return [dataset.entry(i)[0]["id"].rsplit("-", 1)[0] for i in range(len(dataset))]


def first_questions(micro, visual_tokens, tokenizer):
    """Of each sample: the ids up to its first answer, the images among them (one list for all), the answer's ids."""
    prompts, images, answers = [], [], []
    visual_tokens = iter(visual_tokens)
    for ids, labels in zip(micro["input_ids"], micro["labels"]):
        start = int((labels != IGNORE).nonzero()[0])
        prompts.append(ids[:start])

        images_of_sample = [next(visual_tokens) for _ in range(int((ids == IMAGE_TOKEN).sum()))]
        images += images_of_sample[:int((ids[:start] == IMAGE_TOKEN).sum())]  # those before the first answer

        answer = labels[start:].tolist()
        if tokenizer.eos in answer:  # not where the sample was cut before it
            answer = answer[:answer.index(tokenizer.eos)]
        answers.append(answer)
    return prompts, images, answers


def greedy_answers(model, prompts, images, max_new_tokens):
    """Greedy answers of a batch, as text."""
    tokens = [[] for _ in prompts]
    for step in model.generate(prompts, images, max_new_tokens):
        for row, token in zip(tokens, step):
            if token not in (None, model.tokenizer.eos):
                row.append(token)
    return [model.tokenizer.decode(row).strip() for row in tokens]


def agree(answer, expected):
    """Whether an answer is right: the same text, or where both hold a box, boxes of an IoU of at least 0.5."""
    box, expected_box = read_box(answer), read_box(expected)
    if box and expected_box:
        return iou(box, expected_box) >= 0.5
    return exact_match(answer, expected)


def share_right(counts):
    """The share of right short answers; boxes and transcriptions count only where there is nothing else."""
    counts = {kind: count for kind, count in counts.items() if kind not in ("box", "transcription")} or counts
    return sum(right for right, _ in counts.values()) / sum(total for _, total in counts.values())


def print_report(loss, counts):
    """Prints what `validate` returns."""
    print(f"validation loss {loss:.4f}, exact match {share_right(counts):.1%}", file=sys.stderr)
    for kind, (right, total) in counts.items():
        measure = "  (IoU at least 0.5)" if kind == "box" else ""
        print(f"  {kind:13s} {right:4d} of {total:4d}  {right / total:6.1%}{measure}", file=sys.stderr)


def write_report(metrics_file, checkpoint, loss, counts):
    """Adds what `validate` returns to a run's metrics, as their last line."""
    line = dict(checkpoint=str(checkpoint), val_loss=loss, right=counts, exact_match=share_right(counts))
    with open(metrics_file, "a") as metrics:
        metrics.write(json.dumps(line) + "\n")

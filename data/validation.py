"""What a model's answers are worth: the validation loss and the exact match of greedy answers."""
from itertools import takewhile

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from data.conversation import BOX, IGNORE, IMAGE_TOKEN
from data.dataset import collate


@torch.no_grad()
def validate(model, dataset, kinds, batch, workers, autocast):
    """Loss per label, and by kind of sample the number of right answers and of all: (float, {kind: (right, all)}).

    An answer is right when it is the same; with a box [x1, y1, x2, y2], when that overlaps the expected one at an
    intersection over union of 0.5 or more. Only the first question of a conversation is asked. Raises ValueError where
    a sample cannot be read.
    """
    loss, labels, found = 0.0, 0, []
    for micro in tqdm(DataLoader(dataset, batch, collate_fn=collate, num_workers=workers), "validation"):
        if micro["unreadable"]:
            raise ValueError(f"every validation sample has to be readable: {micro['unreadable'][0]}")
        with autocast():
            visual = model.encode_images(micro["images"])
            loss += model(micro["input_ids"], visual, micro["labels"], divisor=1).item()
            labels += sum(int((label[1:] != IGNORE).sum()) for label in micro["labels"])
            ends = [int((label != IGNORE).nonzero()[0]) for label in micro["labels"]]  # the first answer's
            prompts = [ids[:end] for ids, end in zip(micro["input_ids"], ends)]
            images, first = iter(visual), []
            for ids, prompt in zip(micro["input_ids"], prompts):
                own = [next(images) for _ in range(int((ids == IMAGE_TOKEN).sum()))]
                first += own[:int((prompt == IMAGE_TOKEN).sum())]
            expected = [list(takewhile(lambda token: token != model.tokenizer.eos, label[end:].tolist()))
                        for label, end in zip(micro["labels"], ends)]  # to its </s>, which may be cut off
            said = answers(model, prompts, first, max(map(len, expected)) + 16)  # one that goes on is not waited for
        found += [agree(answer, model.tokenizer.decode(tokens).strip()) for answer, tokens in zip(said, expected)]
    right = {kind: [ok for ok, of in zip(found, kinds) if of == kind] for kind in sorted(set(kinds))}
    return loss / labels, {kind: (sum(each), len(each)) for kind, each in right.items()}


def answers(model, prompts, images, max_new_tokens):
    """Greedy answers of a batch, as text."""
    tokens = [[] for _ in prompts]
    for step in model.generate(prompts, images, max_new_tokens):
        for row, token in zip(tokens, step):
            if token not in (None, model.tokenizer.eos):
                row.append(token)
    return [model.tokenizer.decode(row).strip() for row in tokens]


def agree(said, expected):
    """Whether an answer equals the expected one; where both hold a box, whether these overlap by half."""
    boxes = [BOX.search(text) for text in (said, expected)]
    if not all(boxes):
        return said == expected
    (ax, ay, bx, by), (cx, cy, dx, dy) = ([float(v) for v in box.groups()] for box in boxes)
    shared = max(0, min(bx, dx) - max(ax, cx)) * max(0, min(by, dy) - max(ay, cy))
    union = (bx - ax) * (by - ay) + (dx - cx) * (dy - cy) - shared
    return union > 0 and shared / union >= 0.5

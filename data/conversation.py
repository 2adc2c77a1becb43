"""The one conversation encoder, for training and sampling: the Vicuna v1 template, as the published models saw it."""
import re

IMAGE_TOKEN = -200  # stands in input_ids where an image's visual tokens go
IGNORE = -100  # the label of a token that has no loss
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")

BOX = re.compile(r"\[\s*([01]\.?\d*)\s*,\s*([01]\.?\d*)\s*,\s*([01]\.?\d*)\s*,\s*([01]\.?\d*)\s*\]")  # [x1, y1, x2, y2]


def encode_conversation(tokenizer, turns):
    """Turns [(number of images, question, answer)] -> (ids, labels), two lists of equal length.

    An answer of None ends the conversation where the model is to answer. Images stand at the front of their
    turn. Only answers and their </s> have labels. Text is only text: what reads "<image>" or "</s>" in it stays so.
    Raises ValueError where it is not whole characters.
    """
    ids, labels = [tokenizer.bos], [IGNORE]
    text, prefix = SYSTEM + " ", True  # SentencePiece's dummy prefix: at the start and after an image, not after </s>
    for images, question, answer in turns:
        if any("\ud800" <= char <= "\udfff" for char in question + (answer or "")):
            raise ValueError("the text holds half a character, a lone surrogate, or what is not UTF-8")
        text += "USER: "
        for _ in range(images):
            piece = tokenizer.encode(text, prefix) + [IMAGE_TOKEN]
            ids, labels = ids + piece, labels + [IGNORE] * len(piece)
            text, prefix = "\n" if question else "", True  # a turn is stripped when its image has moved to the front
        prompt = tokenizer.encode(f"{text}{question} ASSISTANT:", prefix)
        if answer is None:
            return ids + prompt, labels + [IGNORE] * len(prompt)
        whole = tokenizer.encode(f"{text}{question} ASSISTANT: {answer}", prefix) + [tokenizer.eos]
        ids, labels = ids + whole, labels + [IGNORE] * len(prompt) + whole[len(prompt):]
        text, prefix = "", False
    return ids, labels


def parse_turns(entry):
    """A LLaVA JSON entry -> (turns, image paths). Raises ValueError saying what is wrong with it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise ValueError("it has no list of conversations")
    images = entry.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(path, str) for path in images):
        raise ValueError("its image is not a path")
    said = entry["conversations"]
    for turn in said:
        if not (isinstance(turn, dict) and turn.get("from") in ("human", "gpt") and isinstance(turn.get("value"), str)):
            raise ValueError('its conversations are not {"from": "human" or "gpt", "value": text}')
    if said and said[0]["from"] == "gpt":  # a conversation whose first turn is not the human's loses it
        said = said[1:]
    if not said or len(said) % 2 or any(t["from"] != ("human", "gpt")[i % 2] for i, t in enumerate(said)):
        raise ValueError("its turns do not alternate between human and gpt")
    turns = []
    for human, gpt in zip(said[::2], said[1::2]):
        question, count = human["value"], 0
        if images and "<image>" in question:  # without an image it is only text
            count = question.count("<image>")
            question = question.replace("<image>", "").strip()
        turns.append((count, question, gpt["value"]))
    if (count := sum(turn[0] for turn in turns)) != len(images):
        raise ValueError(f"it has {len(images)} images and {count} times <image>")
    return turns, images

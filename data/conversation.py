"""Conversations as tokens: Llama's tokenizer and the Vicuna v1 template, one for training and sampling alike.

    tokenizer = Tokenizer("vicuna-7b-v1.5/tokenizer.model")
    ids, labels = encode_conversation(tokenizer, [(1, "What is this?", "A cat sitting on a mat.")])
"""
import re
from pathlib import Path

import sentencepiece

from data.weights import not_downloaded, write_json

IMAGE_TOKEN = -200  # stands in input_ids where an image's visual tokens go
IGNORE = -100  # the label of a token that has no loss
SYSTEM = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")

# a box [x1, y1, x2, y2] of coordinates like 0, 1 and 0.25, with or without spaces around them
COORDINATE = r"\s*([01]\.?\d*)\s*"
BOX = re.compile(rf"\[{COORDINATE},{COORDINATE},{COORDINATE},{COORDINATE}\]")


class Tokenizer:
    """SentencePiece with Llama's special tokens. Text never becomes one of these: its "</s>" is only characters.

    Raises ValueError where `path` is no SentencePiece model.
    """
    bos, eos = 1, 2

    def __init__(self, path):
        if not Path(path).is_file():
            raise ValueError(f"{path} is missing, or no file: a Llama folder needs its SentencePiece tokenizer")
        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise not_downloaded(path) or ValueError(f"{path} is not a SentencePiece model: {error}") from None
        self.newline = self.pieces.encode("\n")  # two ids: the dummy prefix and a byte, which merges with nothing

    def __len__(self):
        return self.pieces.vocab_size()

    def encode(self, text, prefix=True):
        """Text -> ids. prefix: with SentencePiece's dummy prefix, a space that it puts before the text."""
        if prefix:
            return self.pieces.encode(text)
        # SentencePiece cannot leave its prefix out, so it is put before a newline that is cut off again.
        return self.pieces.encode("\n" + text)[len(self.newline):]

    def decode(self, ids):
        return self.pieces.decode(ids)

    def save(self, folder, max_length=2048):
        """Writes tokenizer.model and tokenizer_config.json."""
        (folder / "tokenizer.model").write_bytes(self.pieces.serialized_model_proto())
        write_json(folder / "tokenizer_config.json", dict(
            tokenizer_class="LlamaTokenizer", legacy=False, add_bos_token=True, add_eos_token=False,
            bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>", model_max_length=max_length))


def encode_conversation(tokenizer, turns):
    """Turns [(number of images, question, answer)] -> (ids, labels), two lists of equal length.

    An answer of None ends the conversation where the model is to answer. Only answers and their </s> have labels.
    Images stand at the front of their turn, as in all of training, or, where the question is a list of texts, between
    each two of them. Raises ValueError where the text is not whole Unicode characters.
    """
    ids, labels = [tokenizer.bos], [IGNORE]
    text = SYSTEM + " "
    prefix = True  # the original encodes with the dummy prefix at the start and after an image, but not after </s>
    for num_images, question, answer in turns:
        texts = [question]  # the turn's texts, with an image between each two
        if isinstance(question, list):
            texts = question
        elif num_images:
            # of two images: "", image, "\n", image, "\nquestion"; the original has a line break behind each image
            newline = "\n" if question else ""
            texts = ["", *[newline] * (num_images - 1), newline + question]
        if any("\ud800" <= char <= "\udfff" for char in "".join(texts) + (answer or "")):
            raise ValueError("the text holds half a character, a lone surrogate, or what is not UTF-8")

        # each image behind the text that comes before it
        text += "USER: " + texts[0]
        for next_text in texts[1:]:
            before = tokenizer.encode(text, prefix)
            ids += before + [IMAGE_TOKEN]
            labels += [IGNORE] * (len(before) + 1)
            text, prefix = next_text, True

        # the question and the answer are encoded together, as tokens may span their border; as in the original, the
        # answer's labels begin after as many ids as the prompt has alone
        prompt = tokenizer.encode(f"{text} ASSISTANT:", prefix)
        if answer is None:
            return ids + prompt, labels + [IGNORE] * len(prompt)
        turn = tokenizer.encode(f"{text} ASSISTANT: {answer}", prefix) + [tokenizer.eos]
        ids += turn
        labels += [IGNORE] * len(prompt) + turn[len(prompt):]
        text, prefix = "", False
    return ids, labels


def image_paths(entry):
    """The image paths of a LLaVA JSON entry. Raises ValueError where it has other media or no paths."""
    for key in ("video", "videos", "audio", "audios", "image_path"):
        if entry.get(key):
            raise ValueError(f"it has {key!r}, and only 'image' or 'images' are read")
    if entry.get("image") and entry.get("images"):
        raise ValueError("it has both 'image' and 'images'")
    paths = entry.get("images") if entry.get("image") in (None, []) else entry["image"]
    if paths is None:
        return []
    if isinstance(paths, str):
        paths = [paths]
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        raise ValueError("its image is not a path")
    return paths


def parse_turns(entry):
    """A LLaVA JSON entry -> (turns, image paths). Raises ValueError saying what is wrong with it."""
    if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
        raise ValueError("it has no list of conversations")
    paths = image_paths(entry)

    # messages of the human and the model alternate; the original drops a first one that is the model's
    messages = entry["conversations"]
    for message in messages:
        if not (isinstance(message, dict) and message.get("from") in ("human", "gpt")
                and isinstance(message.get("value"), str)):
            raise ValueError('its conversations are not {"from": "human" or "gpt", "value": text}')
    if messages and messages[0]["from"] == "gpt":
        messages = messages[1:]
    senders = [message["from"] for message in messages]
    if not senders or senders != ["human", "gpt"] * (len(senders) // 2):
        raise ValueError("its turns do not alternate between human and gpt")

    # as in the original, <image> moves to the front of its turn
    turns = []
    for human, gpt in zip(messages[::2], messages[1::2]):
        question = human["value"]
        num_images = question.count("<image>")
        if num_images:
            question = question.replace("<image>", "").strip()
        turns.append((num_images, question, gpt["value"]))
    placeholders = sum(num_images for num_images, _, _ in turns)
    if placeholders != len(paths):
        raise ValueError(f"it has {len(paths)} images and {placeholders} times <image>")
    return turns, paths

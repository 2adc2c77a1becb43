"""Conversations: the tokenizer, LLaVA's entries, and the Vicuna template as ids and labels."""
import os
from pathlib import Path

import pytest

from conftest import TOKENIZER
from data.conversation import (IGNORE, IMAGE_TOKEN, SYSTEM, Tokenizer, encode_conversation,
                               parse_turns)


def llava_entry(*texts, image="a.png"):
    """An entry of a LLaVA file: a human and the model say these texts by turns."""
    senders = ("human", "gpt")
    messages = [{"from": senders[i % 2], "value": text} for i, text in enumerate(texts)]
    entry = {"id": "0", "conversations": messages}
    return entry | {"image": image} if image else entry


# ---- The tokenizer ----

@pytest.mark.parametrize("text", ["</s>", "<s>", "a </s> b<unk>", "<image>"])
def test_text_never_becomes_a_control_token(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.bos not in ids and tokenizer.eos not in ids
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("text", [
    "USER: What?", "été 你好 🙂", "two  spaces", "a\nb\n", "12.50", ""])
def test_without_the_dummy_prefix_only_a_space_is_missing(tokenizer, text):
    """With the space's own piece before them, the ids without the prefix are the same text."""
    assert tokenizer.decode(tokenizer.encode(text)) == text
    space = tokenizer.pieces.piece_to_id("▁")
    assert tokenizer.decode([space] + tokenizer.encode(text, prefix=False)) == text


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == TOKENIZER.read_bytes()
    assert len(Tokenizer(tmp_path / "tokenizer.model")) == len(tokenizer) == 768


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.model is missing"):
        Tokenizer(tmp_path / "tokenizer.model")


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match="tokenizer.model is a git-LFS pointer and not the file"):
        Tokenizer(tmp_path / "tokenizer.model")


# ---- Entries as turns (number of images, question, answer) ----

def test_an_image_moves_to_the_front_of_its_turn():
    turns, paths = parse_turns(llava_entry("  Look: <image> what?  ", "A", "b", "C"))
    assert turns == [(1, "Look:  what?", "A"), (0, "b", "C")]
    assert paths == ["a.png"]


def test_only_a_question_with_an_image_loses_its_outer_spaces():
    turns, _ = parse_turns(llava_entry("<image> Q ", "A", " and? ", "B"))
    assert turns == [(1, "Q", "A"), (0, " and? ", "B")]


def test_a_turn_may_have_several_images():
    entry = llava_entry("<image>\n<image>\nCompare.", "A", image=["a.png", "b.png"])
    assert parse_turns(entry) == ([(2, "Compare.", "A")], ["a.png", "b.png"])


def test_a_first_message_of_the_model_is_dropped():
    entry = llava_entry("<image>\nQ", "A")
    entry["conversations"].insert(0, {"from": "gpt", "value": "hello"})
    assert parse_turns(entry)[0] == [(1, "Q", "A")]


@pytest.mark.parametrize("media", [{}, {"image": None}, {"image": []}, {"images": []}, {"video": ""}, {"audio": None}])
def test_an_entry_without_media_is_text_only(media):
    entry = llava_entry("Q", "A", image=None) | media
    assert parse_turns(entry) == ([(0, "Q", "A")], [])


@pytest.mark.parametrize("media", [
    {"images": ["a.png"]}, {"images": ["a.png"], "image": []}, {"images": [], "image": "a.png"}], ids=str)
def test_images_is_read_as_image(media):
    entry = llava_entry("<image>\nQ", "A", image=None) | media
    assert parse_turns(entry) == ([(1, "Q", "A")], ["a.png"])


@pytest.mark.parametrize("media, message", [
    ({"video": "a.mp4"}, "has 'video', and only 'image' or 'images' are read"),
    ({"videos": ["a.mp4"]}, "has 'videos'"),
    ({"audio": "a.wav"}, "has 'audio'"),
    ({"audios": ["a.wav"]}, "has 'audios'"),
    ({"image_path": "a.png"}, "has 'image_path'"),
    ({"image": {}}, "not a path"),
    ({"image": ""}, "not a path"),
    ({"image": [""]}, "not a path"),
    ({"image": "a.png", "images": ["a.png"]}, "both 'image' and 'images'"),
    ({}, "0 images and 1 times <image>"),
], ids=str)
def test_media_that_would_not_be_seen_are_refused(media, message):
    with pytest.raises(ValueError, match=message):
        parse_turns(llava_entry("<image>\nQ", "A", image=None) | media)


QUESTION = {"from": "human", "value": "Q"}


@pytest.mark.parametrize("entry, message", [
    ("text", "no list of conversations"),
    ({}, "no list of conversations"),
    ({"conversations": []}, "do not alternate"),
    ({"conversations": [QUESTION]}, "do not alternate"),
    ({"conversations": [QUESTION, QUESTION]}, "do not alternate"),
    ({"conversations": [1]}, "conversations are not"),
    ({"conversations": [{"from": "human", "value": 3}]}, "conversations are not"),
    ({"conversations": [{"from": "system", "value": "Q"}]}, "conversations are not"),
    (llava_entry("<image>Q", "A", image=5), "not a path"),
    (llava_entry("<image>Q", "A", image=["a.png", 5]), "not a path"),
    (llava_entry("no tag", "A"), "1 images and 0 times <image>"),
    (llava_entry("<image><image>Q", "A"), "1 images and 2 times <image>"),
])
def test_a_wrong_entry_is_refused_with_what_is_wrong(entry, message):
    with pytest.raises(ValueError, match=message):
        parse_turns(entry)


# ---- The template, as ids and labels ----

@pytest.fixture
def two_turns(tokenizer):
    """The ids and labels of a question about an image, and of one whose answer is empty."""
    return encode_conversation(tokenizer, [(1, "What is it?", "A pen."), (0, "Sure?", "")])


def test_the_prompt_is_vicunas_with_the_image_first(tokenizer, two_turns):
    ids, _ = two_turns
    image, first_end = ids.index(IMAGE_TOKEN), ids.index(tokenizer.eos)
    assert ids[0] == tokenizer.bos
    assert tokenizer.decode(ids[1:image]) == f"{SYSTEM} USER: "
    assert tokenizer.decode(ids[image + 1:first_end]) == "\nWhat is it? ASSISTANT: A pen."
    assert tokenizer.decode(ids[first_end + 1:-1]) == "USER: Sure? ASSISTANT: "
    assert ids[-1] == tokenizer.eos


def test_only_answers_and_their_ends_have_labels(tokenizer, two_turns):
    ids, labels = two_turns
    labelled = [label for label in labels if label != IGNORE]
    assert all(label in (token, IGNORE) for token, label in zip(ids, labels, strict=True))
    assert labelled.count(tokenizer.eos) == 2
    assert tokenizer.decode(labelled[:labelled.index(tokenizer.eos)]) == "A pen."


def test_sampling_prompts_with_what_training_saw(tokenizer, two_turns):
    ids, _ = two_turns
    turns = [(1, "What is it?", "A pen."), (0, "Sure?", None)]
    prompt, _ = encode_conversation(tokenizer, turns)
    assert ids[:len(prompt)] == prompt
    assert tokenizer.decode(prompt[-8:]).endswith("ASSISTANT:")


def test_an_image_without_a_question_has_no_new_line(tokenizer):
    ids, _ = encode_conversation(tokenizer, [(1, "", "A pen.")])
    assert tokenizer.decode(ids[ids.index(IMAGE_TOKEN) + 1:-1]) == " ASSISTANT: A pen."


@pytest.mark.parametrize("turn", [(0, "\udcff?", None), (0, "Q", "\ud83d")])
def test_half_a_character_is_refused(tokenizer, turn):
    with pytest.raises(ValueError, match="half a character"):
        encode_conversation(tokenizer, [turn])


# ---- The published tokenizer: what the original LLaVA code makes of two conversations ----

@pytest.fixture
def published_tokenizer():
    if "LLAMA_TOKENIZER" not in os.environ:
        pytest.skip("set LLAMA_TOKENIZER to a Llama 2's or Vicuna's tokenizer.model, which is not "
                    "part of this repository")
    return Tokenizer(Path(os.environ["LLAMA_TOKENIZER"]))


def test_one_turn_equals_the_originals(published_tokenizer):
    turns, _ = parse_turns(llava_entry("<image>\nWhat is this?", "A cat sitting on a mat."))
    ids, labels = encode_conversation(published_tokenizer, turns)
    assert len(ids) == 55
    assert [label for label in labels if label != IGNORE] == [
        319, 6635, 16246, 373, 263, 1775, 29889, 2]


def test_three_turns_equal_the_originals(published_tokenizer):
    turns, _ = parse_turns(llava_entry(
        "What is this?\n<image>", "A receipt.", "What is the total?", "$12.50",
        "And the tax?", "1.25"))
    ids, labels = encode_conversation(published_tokenizer, turns)
    first_answer = [319, 2414, 21278, 29889, 2]
    second_answer = [395, 29896, 29906, 29889, 29945, 29900, 2]
    third_answer = [29871, 29896, 29889, 29906, 29945, 2]
    assert len(ids) == 88
    assert ids[-57:] == [  # from the first USER on
        3148, 1001, 29901, 29871, IMAGE_TOKEN, 29871, 13,
        5618, 338, 445, 29973, 319, 1799, 9047, 13566, 29901, *first_answer,
        11889, 29901, 1724, 338, 278, 3001, 29973, 319, 1799, 9047, 13566, 29901, *second_answer,
        11889, 29901, 1126, 278, 8818, 29973, 319, 1799, 9047, 13566, 29901, *third_answer]
    assert [label for label in labels if label != IGNORE] == [
        *first_answer, *second_answer, *third_answer]

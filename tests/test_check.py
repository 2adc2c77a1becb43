"""data.check: what it reports about a mixture before a training run."""
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from conftest import TOKENIZER, refused, run
from data import check
from data.conversation import encode_conversation, parse_turns
from data.dataset import MAX_NAMED
from test_conversation import llava_entry

SHOWN = llava_entry("<image>Q", "A")
TEXT_ONLY = llava_entry("Q", "A", image=None)
MALFORMED = {"id": "0"}


@pytest.fixture
def mixture(tmp_path):
    """Writes a mixture of one file with these entries, which show the image a.png."""
    def call(*entries):
        Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
        (tmp_path / "entries.json").write_text(json.dumps(entries))
        part = {"annotations": "entries.json", "images": "."}
        (tmp_path / "mixture.json").write_text(json.dumps([part]))
        return tmp_path / "mixture.json"
    return call


@pytest.fixture
def checked(monkeypatch, capsys):
    """Calls the program in this process, with the tests' tokenizer: its exit status and output."""
    def call(*arguments):
        command = ["data.check", *arguments, "--llm", TOKENIZER.parent, "--workers", 0]
        monkeypatch.setattr("sys.argv", [str(argument) for argument in command])
        try:
            check.main()
            returncode = 0
        except SystemExit as end:
            returncode = end.code
        stdout, stderr = capsys.readouterr()
        return SimpleNamespace(returncode=returncode, stdout=stdout, stderr=stderr)
    return call


def num_tokens(tokenizer, entry):
    """Of an entry, an image counted as one."""
    turns, _ = parse_turns(entry)
    return len(encode_conversation(tokenizer, turns)[0])


# ---- Counts ----

@pytest.fixture
def bad_mixture(mixture, tmp_path):
    """A sample for each kind of count."""
    path = mixture(
        SHOWN, TEXT_ONLY, llava_entry("<image>Q", "word " * 3000),
        llava_entry("<image>Q", "A", image="gone.png"),
        llava_entry("<image>Q", "A", image="cut.png"),
        MALFORMED, llava_entry("<image>" + "word " * 3000, "A"))
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return path


def test_samples_are_counted_by_kind(bad_mixture):
    """Run as a command, with two data processes."""
    process = run("-m", "data.check", bad_mixture, "--workers", 2, "--resolution", 512)
    counts = {}
    for line in process.stdout.split("\n\n")[0].splitlines():
        number, name = line.split(maxsplit=1)
        counts[name] = int(number)
    assert counts == {
        f"samples in {bad_mixture.parent / 'entries.json'}": 7,
        "samples with images": 2, "text only": 1, "images": 2,
        "missing images": 1, "unreadable images": 1, "malformed samples": 2}
    assert process.returncode == 1


def test_samples_that_cannot_be_read_are_named(bad_mixture, checked):
    messages = checked(bad_mixture, "--resolution", 512).stderr
    assert "entries.json, sample 3: there is no image at" in messages
    assert "entries.json, sample 4: " in messages and "cut.png is damaged" in messages
    assert "entries.json, sample 5: it has no list of conversations" in messages
    assert "entries.json, sample 6: its answer starts after" in messages


def test_only_the_first_samples_are_named(mixture, checked):
    process = checked(mixture(*[MALFORMED] * (MAX_NAMED + 5), SHOWN))
    assert process.stderr.count("it has no list of conversations") == MAX_NAMED
    assert f"{MAX_NAMED + 5}  malformed samples" in process.stdout


@pytest.mark.parametrize("num_malformed, returncode", [(0, 0), (1, 0), (2, 1)])
def test_more_than_one_in_a_hundred_is_an_error(mixture, checked, num_malformed, returncode):
    """1 of 100 is not; 2 of 101 are."""
    process = checked(mixture(*[TEXT_ONLY] * 99, *[MALFORMED] * num_malformed))
    assert process.returncode == returncode
    assert ("training stops at 1%" in process.stderr) == (returncode == 1)


# ---- Lengths in tokens ----

def test_lengths_count_visual_tokens(mixture, checked, tokenizer):
    """An image is 576 of them, one for each 64 x 64 pixels of 1536, in place of one token."""
    shown = num_tokens(tokenizer, SHOWN) - 1 + 576
    text_only = num_tokens(tokenizer, TEXT_ONLY)
    process = checked(mixture(SHOWN, TEXT_ONLY))
    average = f"{(shown + text_only) / 2:.0f} on average"
    assert f"{average}, {shown} at most, 0 samples cut at 2048" in process.stdout


def test_a_sample_longer_than_training_keeps_is_cut(mixture, checked, tokenizer):
    """Its end is one token too long. Its answer, which lies before it, is still seen."""
    length = num_tokens(tokenizer, SHOWN) - 1 + 576
    process = checked(mixture(SHOWN), "--max-length", length - 1)
    assert f"1 samples cut at {length - 1}" in process.stdout
    assert process.returncode == 0


def test_a_sample_cut_before_its_answer_is_malformed(mixture, checked, tokenizer):
    """Its last two tokens are the answer, A, and </s>."""
    before_answer = num_tokens(tokenizer, SHOWN) - 1 + 576 - 2
    process = checked(mixture(SHOWN), "--max-length", before_answer)
    assert f"its answer starts after {before_answer} tokens" in process.stderr
    assert process.returncode == 1


def test_an_image_after_the_first_answer_does_not_delay_it(mixture, checked):
    """Its 64 tokens alone would fill most of the maximum length, 70."""
    later = llava_entry("Q", "A", "<image>More", "B")
    process = checked(mixture(later), "--resolution", 512, "--max-length", 70)
    assert "1 samples cut at 70" in process.stdout
    assert process.returncode == 0


def test_five_stages_make_a_quarter_of_the_visual_tokens(mixture, checked):
    longest = []
    for stages in (4, 5):
        output = checked(mixture(SHOWN), "--resolution", 512, "--stages", stages).stdout
        longest.append(int(output.split(" at most")[0].split()[-1]))
    assert longest[0] - longest[1] == 16 ** 2 - 8 ** 2


def test_the_histogram_has_bins_of_256_tokens(mixture, checked):
    """60 characters are all samples: here three of under 256 tokens and one of 9 x 64 and some."""
    nine_images = llava_entry("<image>" * 9 + "Q", "A", image=["a.png"] * 9)
    path = mixture(SHOWN, SHOWN, TEXT_ONLY, nine_images)
    process = checked(path, "--resolution", 512)
    bins = [line.split() for line in process.stdout.split("\n\n")[1].splitlines()[1:]]
    assert bins == [["0", "to", "255", "3", "#" * 45], ["256", "to", "511", "0"],
                    ["512", "to", "767", "1", "#" * 15]]


# ---- Errors ----

@pytest.mark.parametrize("arguments, message", [
    (["--max-length", 0], "--max-length is 0: it should be at least 1"),
    (["--workers", -1], "--workers is -1: take 0 to 999"),
    (["--workers", 1000], "--workers is 1000: take 0 to 999"),
    (["--resolution", 1000], "--resolution 1000: it should be a positive multiple of 64"),
])
def test_wrong_arguments_are_refused(mixture, ended, arguments, message):
    refused(ended(check.main, mixture(SHOWN), *arguments), message)


def test_an_annotation_file_in_place_of_a_mixture_is_refused(mixture, ended):
    refused(ended(check.main, mixture(SHOWN).parent / "entries.json"), "part 0: expected")


def test_a_missing_mixture_is_named(ended, tmp_path):
    refused(ended(check.main, tmp_path / "gone.json"), "gone.json is missing")

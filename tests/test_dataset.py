"""LLaVA-format data: mixtures, files, samples, the sampler, and the stream of micro-batches."""
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from convllava import splice
from data.conversation import IGNORE, IMAGE_TOKEN
from data.dataset import (MALFORMED, MAX_NAMED, MicroBatchSampler, LlavaDataset, collate, find_sources,
                          find_validation, micro_batches, read_mixture, take)
from data.images import square
from test_conversation import llava_entry

COMPRESSION = 64  # pixels along the side of a visual token
SHOWN = llava_entry("<image>Q", "A")
TEXT_ONLY = llava_entry("Q", "A", image=None)
NOT_ANSWERED = llava_entry("<image>Q", "A", "And the date?")  # malformed


@pytest.fixture
def write(tmp_path):
    """Writes entries as a file and beside it the image a.png that they show: (file, folder)."""
    def call(entries, name="data.json"):
        Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
        (tmp_path / name).write_text(json.dumps(entries))
        return tmp_path / name, tmp_path
    return call


@pytest.fixture
def dataset(write, tokenizer):
    """Makes a dataset of entries. An image becomes 3 x 3 visual tokens."""
    def make(*entries, max_length=512, transform=lambda image: square(image, 3 * COMPRESSION)):
        return LlavaDataset([write(entries)], tokenizer, COMPRESSION, max_length, transform)
    return make


# ---- Mixtures: which files to read ----

def test_a_mixtures_paths_start_from_its_folder(tmp_path):
    (tmp_path / "mix.json").write_text(json.dumps([{"annotations": "a.json", "images": "../b"}]))
    assert read_mixture(tmp_path / "mix.json") == [(tmp_path / "a.json", tmp_path / "../b")]


def test_an_annotation_file_in_place_of_a_mixture_is_refused(write):
    file, _ = write([SHOWN])
    with pytest.raises(ValueError, match="data.json, part 0: .* give its folder with --images"):
        read_mixture(file)


@pytest.mark.parametrize("part", [
    5, {}, {"annotations": "a.json"}, {"annotations": 1, "images": "b"}])
def test_a_mixtures_part_of_another_form_is_refused(tmp_path, part):
    (tmp_path / "odd.json").write_text(json.dumps([part]))
    with pytest.raises(ValueError, match="odd.json, part 0: expected"):
        read_mixture(tmp_path / "odd.json")


def test_a_missing_mixture_is_named(tmp_path):
    with pytest.raises(ValueError, match="gone.json is missing"):
        read_mixture(tmp_path / "gone.json")


def test_sources_are_files_with_their_folders_or_mixtures(tmp_path):
    (tmp_path / "mix.json").write_text(json.dumps([{"annotations": "a.json", "images": "b"}]))
    part = (tmp_path / "a.json", tmp_path / "b")
    assert find_sources([tmp_path / "mix.json"] * 2) == [part, part]
    assert find_sources(["a.json", "c.json"], ["b", "d"]) == [("a.json", "b"), ("c.json", "d")]
    assert find_sources(None) == []
    with pytest.raises(ValueError, match="one folder for each file"):
        find_sources(["a.json", "c.json"], ["b"])


def test_the_images_of_the_validation_are_in_the_first_folder(write):
    file, folder = write([SHOWN])
    assert find_validation(file, [folder, "other"]) == (file, folder)
    assert find_validation(None, [folder]) is None
    with pytest.raises(ValueError, match="--val needs --images"):
        find_validation(file, None)
    with pytest.raises(ValueError, match="no file of validation questions at .*gone.json"):
        find_validation(folder / "gone.json", [folder])


# ---- Files: where each sample lies ----

LAYOUTS = {
    "on one line, escaped": lambda entries: json.dumps(entries),
    "indented, not escaped": lambda entries: json.dumps(entries, ensure_ascii=False, indent=1),
    "lines ended by CR LF": lambda entries: "\n " + json.dumps(
        entries, ensure_ascii=False, indent=2).replace("\n", "\r\n") + "\n",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_are_found_in_a_file_of_any_layout(tmp_path, tokenizer, layout):
    """Also behind characters of several bytes, brackets in strings and a malformed sample."""
    answers = ("café 🙂", 'a ] and "[{" in it', "\r\n", "x" * 300)
    entries = [{"id": "malformed"}, *(llava_entry("<image>Q", answer) for answer in answers)]
    file = tmp_path / "data.json"
    file.write_bytes(LAYOUTS[layout](entries).encode())
    dataset = LlavaDataset([(file, tmp_path)], tokenizer, COMPRESSION, 512, None)
    assert [dataset.entry(i)[0] for i in range(len(dataset))] == entries


def test_several_files_are_one_dataset(write, tokenizer):
    answers = [llava_entry("<image>Q", answer) for answer in "ABCDE"]
    sources = [write(answers[:2], "first.json"), write(answers[2:], "second.json")]
    dataset = LlavaDataset(sources, tokenizer, COMPRESSION, 512, None)
    file, folder = sources[1]
    assert len(dataset) == 5
    assert [dataset.entry(i)[0] for i in range(5)] == answers
    assert dataset.entry(3) == (answers[3], folder, f"{file}, sample 1")


def test_lengths_are_the_characters_of_all_turns(dataset):
    two_turns = llava_entry("<image> Why? ", "Because.", "Sure?", "Yes.")
    data = dataset(two_turns, TEXT_ONLY)
    assert data.length.tolist() == [len("Why?Because.Sure?Yes."), len("QA")]
    assert data.has_image.tolist() == [1, 0]


def test_malformed_samples_are_counted_when_the_file_is_opened(dataset):
    data = dataset(*[SHOWN] * 5, *[NOT_ANSWERED] * 3)
    assert data.num_malformed == 3
    assert data.length.tolist() == [2] * 5 + [MALFORMED] * 3
    assert len(data.malformed) == 3
    assert data.malformed[0].endswith(
        "data.json, sample 5: its turns do not alternate between human and gpt")


def test_only_the_first_malformed_samples_are_named(dataset):
    data = dataset(SHOWN, *[NOT_ANSWERED] * (MAX_NAMED + 5))
    assert data.num_malformed == MAX_NAMED + 5
    assert len(data.malformed) == MAX_NAMED


@pytest.mark.parametrize("text, message", [
    ("{not json", "begins with '{not json' and not with"),
    ("{}\n{}", "begins with"),
    ("\ufeff[{}]", "begins with"),
    ("", "begins with ''"),
    ("[]", "Expecting value"),
    ("[{},]", "Expecting value"),
    ("[{},\u00a0{}]", "Expecting value"),  # a space, but none of JSON's
    ("[{}", "the sample that ends at character 3"),
    ("[{} {}]", "the sample that ends at character 3"),
    ("[{}] [{}]", "more follows its end"),
])
def test_a_broken_file_is_refused(tmp_path, tokenizer, text, message):
    (tmp_path / "broken.json").write_text(text, encoding="utf-8")
    expected = f"broken.json is not a JSON array of samples: .*{message}"
    with pytest.raises(ValueError, match=expected):
        LlavaDataset([(tmp_path / "broken.json", tmp_path)], tokenizer, COMPRESSION, 512, None)


def test_a_missing_file_or_folder_is_named(write, tokenizer):
    file, folder = write([SHOWN])
    with pytest.raises(ValueError, match="gone.json is missing"):
        LlavaDataset([(folder / "gone.json", folder)], tokenizer, COMPRESSION, 512, None)
    with pytest.raises(ValueError, match="no image folder at .*gone"):
        LlavaDataset([(file, folder / "gone")], tokenizer, COMPRESSION, 512, None)


def test_a_file_that_has_changed_is_noticed(dataset, write):
    data = dataset(SHOWN)
    file, _ = write([SHOWN])
    file.write_text("[" + " " * 100_000)
    with pytest.raises(ValueError, match="data.json has been changed since it was opened"):
        data[0]


def test_a_digest_tells_other_files_apart(dataset):
    digest = dataset(SHOWN).digest
    assert dataset(SHOWN).digest == digest
    assert dataset(llava_entry("<image>Q", "B")).digest != digest


# ---- Samples ----

@pytest.mark.parametrize("entry, message", [
    (llava_entry("<image>Q", "A", image="gone.png"), "there is no image at .*gone.png"),
    (llava_entry("<image>Q", "A", image="../a.png"), "leaves its folder"),
    (llava_entry("<image>Q", "A", image="/tmp/a.png"), "leaves its folder"),
    (NOT_ANSWERED, "do not alternate"),
])
def test_an_unreadable_sample_is_replaced_and_named(dataset, tmp_path, entry, message):
    """By the next one that can be read. The image outside of its folder does exist."""
    (tmp_path.parent / "a.png").touch()
    data = dataset(TEXT_ONLY, entry, SHOWN)
    item = data[1]
    assert torch.equal(item["input_ids"], data[2]["input_ids"]) and len(item["images"]) == 1
    sentence, = item["unreadable"]
    assert f"{tmp_path / 'data.json'}, sample 1: " in sentence
    assert re.search(message, sentence)


def test_a_readable_sample_names_none(dataset):
    assert dataset(SHOWN)[0]["unreadable"] == []


def test_a_replacement_is_found_behind_many_unreadable_samples(dataset):
    """200 in a row, as of a folder that is missing: more than the 100 that are tried."""
    gone = llava_entry("<image>Q", "A", image="gone.png")
    item = dataset(*[SHOWN] * 300, *[gone] * 200)[300]
    assert len(item["images"]) == 1
    assert len(item["unreadable"]) == 1 and "sample 300: " in item["unreadable"][0]


def test_where_no_sample_can_be_read_the_first_is_named(dataset):
    with pytest.raises(ValueError, match="no sample can be read from here on: .*sample 0: "):
        dataset({"id": 1})[0]


def test_an_image_behind_a_link_is_read(dataset, tmp_path):
    data = dataset(llava_entry("<image>Q", "A", image="linked/b.png"))
    elsewhere = tmp_path.parent / f"{tmp_path.name}-elsewhere"
    elsewhere.mkdir()
    Image.new("RGB", (30, 30)).save(elsewhere / "b.png")
    (tmp_path / "linked").symlink_to(elsewhere)
    assert data[0]["unreadable"] == []


# ---- The length of a sample, in tokens ----

LONG = llava_entry("<image>Q", "A long answer with many words")
NUM_VISUAL = 3 * 3


def test_a_sample_is_cut_where_the_model_sees_its_maximum_length(dataset, model):
    """Visual tokens counted: the spliced embeddings are as long as the maximum."""
    full = dataset(LONG)[0]
    max_length = len(full["input_ids"]) - 1 + NUM_VISUAL - 3
    cut = dataset(LONG, max_length=max_length)[0]
    assert cut["input_ids"].tolist() == full["input_ids"].tolist()[:-3]
    assert cut["labels"].tolist() == full["labels"].tolist()[:-3]
    visual_tokens = model.encode_images(cut["images"])
    embeds, _ = splice(model.llama.embed_tokens, [cut["input_ids"]], visual_tokens)
    assert len(embeds[0]) == max_length


def test_pixels_beyond_whole_visual_tokens_are_not_counted(dataset, model):
    wider = lambda image: torch.zeros(3, 3 * COMPRESSION + 8, 4 * COMPRESSION - 6)
    max_length = len(dataset(LONG)[0]["input_ids"]) - 1 + NUM_VISUAL
    item = dataset(LONG, max_length=max_length, transform=wider)[0]
    assert len(model.encode_images(item["images"])[0]) == NUM_VISUAL
    assert torch.equal(item["input_ids"], dataset(LONG)[0]["input_ids"])


def test_an_image_behind_the_cut_is_dropped(dataset):
    two = llava_entry("<image>Q", "A", "<image>Q", "A", image=["a.png", "a.png"])
    full = dataset(two)[0]
    second = int((full["input_ids"] == IMAGE_TOKEN).nonzero()[1])
    before_second = second - 1 + NUM_VISUAL  # tokens
    cut = dataset(two, max_length=before_second)[0]
    assert len(cut["input_ids"]) == second
    assert (len(full["images"]), len(cut["images"])) == (2, 1)


def test_a_sample_cut_before_its_answer_is_unreadable(dataset):
    with pytest.raises(ValueError, match="its first 20 tokens hold no answer"):
        dataset(SHOWN, max_length=20)[0]


# ---- The collator ----

def test_a_batch_has_its_samples_images_in_order(dataset):
    colours = iter((0.0, 1.0, 2.0))
    two = llava_entry("<image><image>Q", "A", image=["a.png", "a.png"])
    paint = lambda image: torch.full((3, 64, 64), next(colours))
    data = dataset(two, TEXT_ONLY, SHOWN, transform=paint)
    batch = collate([data[0], data[1], data[2]])
    assert [int((ids == IMAGE_TOKEN).sum()) for ids in batch["input_ids"]] == [2, 0, 1]
    assert [image[0, 0, 0].item() for image in batch["images"]] == [0, 1, 2]


def test_a_batch_names_its_unreadable_samples(dataset):
    data = dataset(NOT_ANSWERED, SHOWN, NOT_ANSWERED, SHOWN)
    batch = collate([data[0], data[1], data[2]])
    first, second = batch["unreadable"]
    assert "sample 0: " in first and "sample 2: " in second


def test_labels_are_counted_that_have_a_loss():
    """Not a sample's first token, which is predicted from nothing."""
    item = lambda labels: {"input_ids": torch.tensor(labels), "labels": torch.tensor(labels),
                           "images": [], "unreadable": []}
    assert collate([item([5, 6, IGNORE, 7]), item([IGNORE, 8])])["num_labels"] == 3


# ---- The sampler: global batches ----

def sizes(has_image, length):
    """What the sampler reads of a dataset: of each sample, whether it has images and its length."""
    return SimpleNamespace(has_image=np.array(has_image, dtype=np.int64),
                           length=np.array(length, dtype=np.int64))


@pytest.fixture
def mixture():
    """4000 samples, most of them with an image; of 5 to 3000 characters, as conversations vary."""
    rng = np.random.default_rng(0)
    return sizes(rng.random(4000) < 0.7, rng.lognormal(4.5, 1.2, 4000).clip(5, 3000))


def full_batches(dataset, batch):
    """The epoch's global batches of one modality, which come before what is left over."""
    num_images = int(dataset.has_image.sum())
    num_full = num_images // batch + (len(dataset.has_image) - num_images) // batch
    return MicroBatchSampler(dataset, batch, batch).global_batches()[:num_full]


def test_a_full_batch_has_one_modality(mixture):
    batches = full_batches(mixture, 32)
    has_image = mixture.has_image[batches]
    assert len(batches) == 124
    assert (has_image == has_image[:, :1]).all()


def test_batches_of_both_modalities_take_turns(mixture):
    """Reference: in random order, i batches with images and t without have 2it / (i + t) borders.

    Within a third.
    """
    has_image = mixture.has_image[full_batches(mixture, 32)[:, 0]]
    with_images, without = (has_image == 1).sum(), (has_image == 0).sum()
    expected = 2 * with_images * without / len(has_image)
    assert np.count_nonzero(np.diff(has_image)) == pytest.approx(expected, rel=1 / 3)


def test_lengths_in_a_batch_vary_as_in_the_whole_set(mixture):
    """Reference: the variance of a random draw is on average that of its population; within 10%."""
    for has_image in (True, False):
        batches = full_batches(mixture, 32)
        batches = batches[mixture.has_image[batches[:, 0]] == has_image]
        variances = mixture.length[batches].var(axis=1, ddof=1)
        population = mixture.length[mixture.has_image == has_image].var()
        assert variances.mean() == pytest.approx(population, rel=0.1)


def test_the_number_of_labels_varies_little_from_batch_to_batch(mixture):
    """Reference: sums of n random lengths vary sqrt(n) times less than a length; within 20%.

    Batches of like lengths would vary as much as the lengths do.
    """
    labels = mixture.length[full_batches(mixture, 128)].sum(axis=1)
    variation = labels.std() / labels.mean()
    of_one_sample = mixture.length.std() / mixture.length.mean()
    assert variation == pytest.approx(of_one_sample / 128 ** 0.5, rel=0.2)


def test_micro_batches_have_like_lengths(mixture):
    """So that they have less than a fifth of the padding of random ones."""
    mixture = sizes(np.ones_like(mixture.length), mixture.length)
    micros = np.array(list(MicroBatchSampler(mixture, 80, 4)))
    assert micros.shape == (1000, 4)
    padding = lambda batches: (mixture.length[batches].max(axis=1, keepdims=True)
                               - mixture.length[batches]).sum()
    random_draws = np.random.default_rng(0).permutation(4000).reshape(-1, 4)
    assert padding(micros) < 0.2 * padding(random_draws)


def test_every_process_gets_short_and_long_samples(mixture):
    """Within 25%; halves of a sorted batch would differ by a factor of about ten."""
    totals = []
    for rank in range(2):
        micros = list(MicroBatchSampler(mixture, 80, 4, rank, world=2))
        totals.append(mixture.length[np.array(micros)].sum())
    assert totals[0] == pytest.approx(totals[1], rel=0.25)


# ---- The sampler: an epoch ----

@pytest.mark.parametrize("num_images, num_text", [
    (1, 0), (0, 3), (16, 0), (40, 3), (45, 19), (64, 32)])
def test_an_epoch_has_enough_batches_for_every_sample(num_images, num_text):
    """ceil(samples / batch), all of them full."""
    data = sizes([True] * num_images + [False] * num_text, range(num_images + num_text))
    sampler = MicroBatchSampler(data, 16, 4)
    expected = -(-(num_images + num_text) // 16)
    assert sampler.batches_per_epoch == expected
    assert sampler.global_batches().shape == (expected, 16)


@pytest.mark.parametrize("epoch", range(3))
def test_every_sample_is_seen_in_every_epoch(dataset, epoch):
    """Also 3 without images beside 40 with, which fill no batch of their modality."""
    sampler = MicroBatchSampler(dataset(*[SHOWN] * 40, *[TEXT_ONLY] * 3), 8, 8)
    sampler.epoch = epoch
    assert set(sampler.global_batches().flatten()) == set(range(43))


def test_what_fills_no_batch_comes_last_and_is_mixed():
    """190 samples with images and 190 without: a batch of each, then 90 and 90 in random order.

    Reference: about half of each in both mixed batches; 50 of 100, within 20.
    """
    data = sizes([True] * 190 + [False] * 190, range(380))
    has_image = data.has_image[MicroBatchSampler(data, 100, 10).global_batches()]
    *full, first_mixed, second_mixed = has_image.sum(axis=1)
    assert sorted(full) == [0, 100]
    assert first_mixed == pytest.approx(50, abs=20) and second_mixed == pytest.approx(50, abs=20)


def test_the_last_batch_is_filled_up_with_samples_drawn_again():
    sampler = MicroBatchSampler(sizes([True] * 43, range(43)), 8, 8)
    *others, last = sampler.global_batches().tolist()
    before = {sample for batch in others for sample in batch}
    assert len(before) == 40  # each of them once
    assert len(last) == 8 and set(range(43)) - before < set(last)


def test_fewer_samples_than_a_batch_fill_one():
    batch, = MicroBatchSampler(sizes([True, True, False], range(3)), 64, 8).global_batches().tolist()
    assert len(batch) == 64 and set(batch) == {0, 1, 2}


def test_malformed_samples_are_never_drawn(dataset):
    """3 of them beside 40 others, in batches of 8: 5 batches, of the others once each."""
    sampler = MicroBatchSampler(dataset(*[NOT_ANSWERED] * 3, *[SHOWN] * 40), 8, 8)
    assert sampler.batches_per_epoch == 5
    for sampler.epoch in range(3):
        assert sorted(sampler.global_batches().flatten()) == list(range(3, 43))


def test_malformed_samples_do_not_fill_up_the_last_batch(dataset):
    sampler = MicroBatchSampler(dataset(*[NOT_ANSWERED] * 30, SHOWN, TEXT_ONLY), 64, 8)
    assert set(sampler.global_batches().flatten()) == {30, 31}


def test_each_epoch_and_seed_has_its_order(mixture):
    sampler = MicroBatchSampler(mixture, 16, 16, seed=3)
    first, again = sampler.global_batches(), sampler.global_batches()
    sampler.epoch = 1
    second = sampler.global_batches()
    other_seed = MicroBatchSampler(mixture, 16, 16, seed=4).global_batches()
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second) and not np.array_equal(first, other_seed)


@pytest.mark.parametrize("world, micro_batch", [(1, 2), (2, 8), (2, 2), (4, 4), (4, 1)])
def test_processes_and_micro_batches_share_the_same_global_batches(world, micro_batch):
    data = sizes([i % 3 > 0 for i in range(200)], range(200))
    expected = MicroBatchSampler(data, 16, 16, seed=3).global_batches()
    shares = []
    for rank in range(world):
        micros = list(MicroBatchSampler(data, 16, micro_batch, rank, world, seed=3))
        shares.append(np.array(micros).reshape(len(expected), 16 // world))
    together = np.concatenate(shares, axis=1)
    assert np.array_equal(np.sort(together, axis=1), np.sort(expected, axis=1))


# The stream of micro-batches ---------------------------------------------------------------------

@pytest.fixture
def samples_in_stream(dataset):
    """The ids of the samples in the first micro-batches of a stream that begins with a step.

    Of ten samples, 4 to a global batch, 2 to a micro-batch: 3 steps an epoch.
    """
    data = dataset(*(llava_entry("Q", f"answer {i}", image=None) for i in range(10)))

    def call(step, num_micros, workers=0):
        stream = micro_batches(data, MicroBatchSampler(data, 4, 2), step, workers, pin_memory=False)
        micros = [next(stream) for _ in range(num_micros)]
        stream.close()
        return [tuple(ids.tolist()) for micro in micros for ids in micro["input_ids"]]
    return call


@pytest.mark.parametrize("step", [1, 3, 4])
def test_a_stream_goes_on_from_any_step(samples_in_stream, step):
    """Also within the second epoch, which begins with step 3."""
    from_the_start = samples_in_stream(0, num_micros=12)
    assert samples_in_stream(step, num_micros=12 - 2 * step) == from_the_start[4 * step:]


def test_a_stream_has_epoch_after_epoch(samples_in_stream):
    """Of 3 global batches with 12 samples: all ten in each, in another order."""
    stream = samples_in_stream(0, num_micros=12)
    first, second = stream[:12], stream[12:]
    assert len(set(first)) == 10 and set(first) == set(second)
    assert first != second


def test_data_processes_change_nothing(samples_in_stream):
    assert samples_in_stream(0, num_micros=8, workers=2) == samples_in_stream(0, num_micros=8)


def test_a_stream_takes_none_of_the_models_random_numbers(samples_in_stream):
    state = torch.get_rng_state()
    samples_in_stream(0, num_micros=8)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_data_process_that_breaks_off_while_it_sends_is_a_fault():
    def batches():
        raise ConnectionResetError(104, "Connection reset by peer")
        yield
    log = SimpleNamespace(report=lambda sentences: None)
    micros, num_labels, num_unreadable, fault = take(batches(), 2, log)
    assert (micros, num_labels, num_unreadable) == ([], 0, 0)
    assert fault.startswith("a data process has ended or does not answer")

"""The full model: visual tokens among text, its loss, generation, answers, and its checkpoint.

That its numbers are the original's is shown in test_references.py.
"""
import json
import re
import shutil

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file

import convllava
from conftest import ROOT, small_llama
from convllava import ConvLLaVA, choose, splice
from data.conversation import IGNORE, IMAGE_TOKEN, Tokenizer, encode_conversation
from data.images import any_aspect, read_image, square
from llama import recorded_attention

NANO = ROOT / "data" / "nano" / "convllava-nano"
RECEIPT = ROOT / "data" / "nano" / "examples" / "receipt.png"


def random_prompt(num_images, length=9, seed=0):
    """Random ids (length,), the first of which are followed by image tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 768, (length,), generator=generator)
    ids[1:1 + num_images] = IMAGE_TOKEN
    return ids


def greedy(model, prompts, images, steps=12):
    """The tokens that greedy generation gives each prompt, up to </s>."""
    answers = [[] for _ in prompts]
    for tokens in model.generate(prompts, images, steps):
        for answer, token in zip(answers, tokens):
            if token is not None:
                answer.append(token)
    return answers


# ---- Visual tokens among the text ----

def test_visual_tokens_stand_where_the_image_token_was(model):
    """No, one and two images of two sizes in one batch, against embeddings put together by hand."""
    images = [torch.randn(3, 64, 128), torch.randn(3, 128, 128), torch.randn(3, 64, 128)]
    a, b, c = [model.projector(model.vision(image[None])[0].flatten(1).T) for image in images]
    text = lambda *ids: model.llama.embed_tokens(torch.tensor(ids))
    expected = [
        text(1, 5, 6),
        torch.cat([text(1), a, text(7)]),  # 1 + 2 + 1 tokens
        torch.cat([text(1), b, text(8), c, text(9)]),  # 1 + 4 + 1 + 2 + 1 tokens
    ]

    prompts = [torch.tensor(ids) for ids in (
        [1, 5, 6], [1, IMAGE_TOKEN, 7], [1, IMAGE_TOKEN, 8, IMAGE_TOKEN, 9])]
    embeds, _ = splice(model.llama.embed_tokens, prompts, model.encode_images(images))
    assert [len(row) for row in embeds] == [3, 4, 9]
    for row, expected_row in zip(embeds, expected):
        torch.testing.assert_close(row, expected_row, rtol=0, atol=1e-5)


def test_visual_tokens_have_no_labels(model):
    ids = torch.tensor([1, IMAGE_TOKEN, 8, IMAGE_TOKEN, 9])
    visual_tokens = [torch.zeros(4, 32), torch.zeros(2, 32)]
    _, (labels,) = splice(model.llama.embed_tokens, [ids], visual_tokens, [ids.clone()])
    assert labels.tolist() == [1, *[IGNORE] * 4, 8, *[IGNORE] * 2, 9]


@pytest.fixture
def two_images(model):
    """Two prompts with an image each, and the images, the first of them also as visual tokens."""
    prompts = [random_prompt(1), random_prompt(1, length=6)]
    images = [torch.randn(3, 128, 64), torch.randn(3, 64, 64)]
    encoded = [model.encode_images(images)[0].detach(), images[1]]
    return prompts, images, encoded


def test_an_image_may_be_given_as_its_visual_tokens(model, two_images):
    prompts, images, encoded = two_images
    torch.testing.assert_close(model(prompts, encoded), model(prompts, images), rtol=0, atol=1e-5)


def test_generation_takes_visual_tokens_too(model, two_images):
    prompts, images, encoded = two_images
    assert greedy(model, prompts, encoded) == greedy(model, prompts, images)


def test_ids_may_be_lists_and_images_stacked(model, tokenizer):
    ids, labels = encode_conversation(tokenizer, [(1, "What is it?", "A pen.")])
    images = torch.randn(1, 3, 64, 64)
    loss = model([torch.tensor(ids)], list(images), [torch.tensor(labels)])
    assert model([ids], images, [labels]) == loss


def test_the_number_of_images_has_to_fit(model):
    with pytest.raises(ValueError, match="hold 1 image tokens, and there are 2 images"):
        model([random_prompt(1)], [torch.zeros(3, 64, 64)] * 2)


# ---- The loss ----

@pytest.fixture
def labelled(model):
    """A batch of two prompts, one with an image of two visual tokens; labels from position 5 on."""
    prompts = [random_prompt(1, length=9), random_prompt(0, length=14, seed=1)]
    images = [torch.randn(3, 128, 64)]
    labels = [torch.where(torch.arange(len(ids)) > 4, ids, IGNORE) for ids in prompts]
    return prompts, images, labels


@pytest.mark.parametrize("chunk", [2048, 4], ids=["at once", "in chunks"])
def test_the_loss_is_the_cross_entropy_of_all_logits(model, labelled, monkeypatch, chunk):
    """To 1e-5 of its value, and the head's gradient to 1e-4 and 1e-6."""
    prompts, images, labels = labelled
    logits = model(prompts, images)  # (2, 14, vocabulary)
    targets = torch.full(logits.shape[:2], IGNORE)
    targets[0, 6:10] = labels[0][5:]  # one further, as two visual tokens replace one image token
    targets[1, 5:14] = labels[1][5:]
    expected = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE)
    expected.backward()
    expected_gradient = model.llama.lm_head.weight.grad.clone()

    model.zero_grad()
    monkeypatch.setattr(convllava, "LOSS_CHUNK", chunk)
    loss = model(prompts, images, labels)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradient = model.llama.lm_head.weight.grad
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


def test_the_loss_of_a_single_label(model, labelled):
    prompts, images, _ = labelled
    labels = [torch.full_like(ids, IGNORE) for ids in prompts]
    labels[1][5] = prompts[1][5]
    expected = -model(prompts, images).log_softmax(-1)[1, 4, prompts[1][5]]
    torch.testing.assert_close(model(prompts, images, labels), expected)


def test_the_loss_without_labels_is_zero(model, labelled):
    prompts, images, _ = labelled
    labels = [torch.full_like(ids, IGNORE) for ids in prompts]
    assert model(prompts, images, labels) == 0


def test_a_text_only_batch_gives_every_vision_weight_a_gradient_of_zero(model):
    """DDP needs a gradient for every weight."""
    ids = random_prompt(0)
    model([ids], labels=[ids]).backward()
    for name, parameter in model.vision.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_the_blank_image_of_a_text_only_batch_does_not_change_the_loss(model):
    ids = random_prompt(0)
    with_blank_image = model.train()([ids], labels=[ids])
    without = model.eval()([ids], labels=[ids])
    assert with_blank_image == without


# ---- Generation ----

def test_generation_with_the_cache_equals_generation_without(model):
    """24 greedy tokens, against those that each come from the full sequence through forward()."""
    prompt, image = random_prompt(1), torch.randn(3, 128, 128)
    ids = prompt
    for _ in range(24):
        token = model([ids], [image])[0, -1].argmax()
        ids = torch.cat([ids, token[None]])
    assert greedy(model, [prompt], [image], 24) == [ids[len(prompt):].tolist()]


def test_a_batch_of_different_prompts_equals_one_prompt_at_a_time(model):
    prompts = [random_prompt(1, 9), random_prompt(0, 5, seed=1), random_prompt(2, 17, seed=2)]
    images = [torch.randn(3, 64, 64), torch.randn(3, 128, 128), torch.randn(3, 64, 192)]
    alone = [
        greedy(model, prompts[:1], images[:1])[0],
        greedy(model, prompts[1:2], [])[0],
        greedy(model, prompts[2:], images[1:])[0],
    ]
    assert greedy(model, prompts, images) == alone
    assert len({tuple(answer) for answer in alone}) == 3


@pytest.fixture
def ending(model):
    """A model whose likeliest first token after the prompt [1, 5] is </s>."""
    head = model.llama.lm_head.weight.data
    head[Tokenizer.eos] = 0
    first, *_ = greedy(model, [torch.tensor([1, 5])], [], 1)[0]
    head[Tokenizer.eos] = 1.5 * head[first]
    return model


def test_after_a_prompts_end_its_tokens_are_none(ending):
    steps = list(ending.generate([torch.tensor([1, 5]), torch.tensor([1, 6, 7])], [], 6))
    first_prompt = [tokens[0] for tokens in steps]
    assert len(steps) > 1
    assert first_prompt == [Tokenizer.eos] + [None] * (len(steps) - 1)


def test_generation_stops_when_all_prompts_have_ended(ending):
    assert list(ending.generate([torch.tensor([1, 5])], [], 6)) == [[Tokenizer.eos]]


def test_generation_stops_at_the_contexts_end(model):
    prompt = torch.ones(510, dtype=torch.long)
    assert len(list(model.generate([prompt], max_new_tokens=9))) == 2


def test_a_prompt_longer_than_the_context_is_refused_before_it_takes_memory(model, monkeypatch):
    monkeypatch.setattr(model.llama, "embed_tokens", None)
    with pytest.raises(ValueError, match="has 512 tokens, and the model reads 512: use a shorter text"):
        next(model.generate([torch.ones(512, dtype=torch.long)]))


def test_a_prompt_that_is_too_long_with_its_image_is_refused(model):
    prompt = torch.ones(510, dtype=torch.long)
    prompt[1] = IMAGE_TOKEN
    with pytest.raises(ValueError, match="has 513 tokens with the image's, and the model reads 512"):
        next(model.generate([prompt], [torch.zeros(3, 128, 128)]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_scores_that_are_not_finite_are_refused(model, dtype, temperature):
    """In greedy generation they would be any tokens, and torch could not draw from them."""
    model.to(dtype).llama.norm.weight.data[3] = float("inf")
    with pytest.raises(ValueError, match="scores are not finite: .*--dtype bf16"):
        next(model.generate([torch.ones(5, dtype=torch.long)], temperature=temperature))


@pytest.mark.parametrize("temperature, top_p, choices", [
    (0, 1.0, {0}),  # greedy
    (1.0, 0.6, {0}),  # the likeliest token has 0.66 of the mass
    (1.0, 0.7, {0, 1}),
])
def test_top_p_draws_from_the_likeliest_tokens(temperature, top_p, choices):
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0]).repeat(4000, 1)
    drawn = choose(logits, temperature, top_p, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == choices


def test_temperature_divides_the_logits():
    """The share of the likeliest of 4,000 draws, to 0.03, almost four standard deviations."""
    logits = torch.tensor([2.0, 1.0, 0.0, -9.0])
    drawn = choose(logits.repeat(4000, 1), 2.0, 1.0, torch.Generator().manual_seed(0))
    share = (drawn == 0).float().mean()
    assert abs(share - (logits / 2).softmax(-1)[0]) < 0.03


def test_generation_passes_temperature_and_top_p_on(model):
    def generated(*settings):
        generator = torch.Generator().manual_seed(0)
        return list(model.generate([torch.tensor([1, 5, 6])], (), 6, *settings, generator))

    assert generated(9.0, 1e-9) == generated(0.0, 1.0)  # only the likeliest token may be drawn
    assert generated(9.0, 1.0) != generated(0.0, 1.0)


# ---- Looking inside ----

def test_recording_attention_changes_no_token_of_a_batch(model):
    """Greedy, in float32: three prompts of different lengths, with images of different sizes."""
    prompts = [random_prompt(1, 9), random_prompt(0, 5, seed=1), random_prompt(2, 17, seed=2)]
    images = [torch.randn(3, 64, 64), torch.randn(3, 128, 128), torch.randn(3, 64, 192)]
    expected = greedy(model, prompts, images, 24)
    with recorded_attention(model.llama) as layers:
        assert greedy(model, prompts, images, 24) == expected
    assert [len(tokens) for tokens in layers] == [max(map(len, expected))] * 2


def test_spans_say_where_the_visual_tokens_and_the_text_are(model):
    """Against the spliced embeddings, of two images side by side and one at the end."""
    prompt = torch.tensor([1, 5, IMAGE_TOKEN, IMAGE_TOKEN, 6, IMAGE_TOKEN])
    images = [torch.randn(3, 64, 128), torch.randn(3, 200, 130), torch.randn(3, 64, 64)]
    spans = model.spans(prompt, images)
    assert [(rows, columns) for _, rows, columns in spans.images] == [(1, 2), (3, 2), (1, 1)]

    visual_tokens = model.encode_images(images)
    (embeds,), _ = splice(model.llama.embed_tokens, [prompt], visual_tokens)
    for (place, _, _), expected in zip(spans.images, visual_tokens, strict=True):
        assert torch.equal(embeds[place], expected)
    ids = [[1, 5], [], [6], []]
    for place, expected in zip(spans.texts, ids, strict=True):
        assert torch.equal(embeds[place], model.llama.embed_tokens(torch.tensor(expected, dtype=torch.long)))


def test_the_spans_of_a_prompt_without_an_image(model):
    assert model.spans([1, 5, 6], []) == ([], [slice(0, 3)])


@pytest.mark.parametrize("num_images", [0, 2])
def test_spans_need_as_many_images_as_the_prompt_has(model, num_images):
    with pytest.raises(ValueError):
        model.spans([1, IMAGE_TOKEN], [torch.zeros(3, 64, 64)] * num_images)


def test_the_readmes_page_about_attention_prints_what_it_says(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "tests" / "README.md").read_text(), re.DOTALL)
    page, = [block for block in blocks if "recorded_attention" in block]
    names = {}
    exec(page, names)
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    on_receipt, on_form, with_layer, without_layer = printed

    assert names["model"].tokenizer.decode(names["answer"]) == "141.21"
    assert "# layer 3: 0.78, then 0.05" in page
    assert (on_receipt[3], on_form[3]) == pytest.approx((0.78, 0.05), abs=0.011)
    assert len(on_receipt) == len(on_form) == 5
    assert min(with_layer) > -0.1
    assert min(without_layer) < -2


# ---- Answers: one call ----

@pytest.fixture(scope="module")
def shipped():
    return ConvLLaVA.from_pretrained(NANO)


def test_an_answer_is_what_the_longer_way_gives(shipped):
    prompt, _ = encode_conversation(shipped.tokenizer, [(1, "What is the total?", None)])
    pixels = square(read_image(RECEIPT), shipped.resolution)
    tokens, = greedy(shipped, [prompt], [pixels])
    assert tokens[-1] == Tokenizer.eos
    expected = shipped.tokenizer.decode(tokens[:-1])
    assert shipped.answer(RECEIPT, "What is the total?") == expected


def test_an_answer_takes_visual_tokens_in_place_of_a_path(shipped):
    visual_tokens = shipped.encode_image(RECEIPT)
    for question in ("What is the total?", "What is the date?"):
        assert shipped.answer(visual_tokens, question) == shipped.answer(RECEIPT, question)


@pytest.fixture
def generate_calls(monkeypatch):
    """The arguments of each call of generate, which answers with </s> only."""
    calls = []

    def generate(model, *arguments):
        calls.append(arguments)
        return iter([[Tokenizer.eos]])

    monkeypatch.setattr(ConvLLaVA, "generate", generate)
    return calls


def test_the_history_stands_in_the_prompt_behind_the_image(model, generate_calls):
    history = [("One?", "First."), ("Two?", "Second.")]
    model.answer(torch.zeros(4, 32), "Three?", history)
    expected, _ = encode_conversation(
        model.tokenizer, [(1, "One?", "First."), (0, "Two?", "Second."), (0, "Three?", None)])
    (prompts, images, *_), = generate_calls
    assert prompts == [expected]
    assert len(images) == 1


def test_a_question_needs_no_image(model, generate_calls):
    assert model.answer(None, "Who are you?") == ""
    expected, _ = encode_conversation(model.tokenizer, [(0, "Who are you?", None)])
    (prompts, images, *_), = generate_calls
    assert prompts == [expected]
    assert images == []


def test_an_answer_passes_generates_options_on(model, generate_calls):
    generator = torch.Generator()
    model.answer(None, "What?", max_new_tokens=7, temperature=0.5, top_p=0.9, generator=generator)
    (_, _, *options), = generate_calls
    assert options == [7, 0.5, 0.9, generator]


def test_an_answer_is_written_as_it_is_generated_but_no_part_of_a_character(model, monkeypatch):
    """The tokenizer has no piece for 猫, which therefore takes three tokens, one for each byte."""
    letter, *character = model.tokenizer.encode("a猫")
    assert len(character) == 3
    pieces = []
    written_before = []  # the text that was written before each token

    def generate(*_):
        for token in (letter, *character, Tokenizer.eos):
            written_before.append("".join(pieces))
            yield [token]

    monkeypatch.setattr(ConvLLaVA, "generate", generate)
    assert model.answer(None, "What?", on_text=pieces.append) == "a猫"
    assert written_before == ["", "a", "a", "a", "a猫"]
    assert "".join(pieces) == "a猫"


def test_a_question_cannot_hold_control_tokens(model, tokenizer):
    ids, _ = encode_conversation(tokenizer, [(1, "what is <image> and </s>?", None)])
    assert ids.count(IMAGE_TOKEN) == 1
    assert ids.count(tokenizer.eos) == 0
    next(model.generate([ids], [torch.zeros(3, 64, 64)]))


# ---- Seeing an image ----

@pytest.fixture
def photo(tmp_path):
    Image.effect_noise((300, 150), 80).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_an_image_is_seen_as_a_square_of_the_models_resolution(model, photo):
    pixels = square(read_image(photo), 128)
    expected, = model.encode_images([pixels])  # 2x2 visual tokens
    assert torch.equal(model.encode_image(photo), expected)


def test_an_image_is_seen_at_another_resolution(model, photo):
    pixels = square(read_image(photo), 192)
    expected, = model.encode_images([pixels])  # 3x3 visual tokens
    assert torch.equal(model.encode_image(photo, resolution=192), expected)


def test_an_image_is_seen_with_its_aspect_ratio(model, photo):
    pixels = any_aspect(read_image(photo), 128)
    expected, = model.encode_images([pixels])  # 2x4 visual tokens
    assert torch.equal(model.encode_image(photo, keep_ratio=True), expected)


@pytest.mark.parametrize("resolution, problem", [
    (63, "--resolution is 63: it should be at least 64, one visual token"),
    (64 * 23, "--resolution 1472 makes more visual tokens than the 512 tokens"),  # 23 * 23 = 529
])
def test_a_resolution_is_refused_before_the_image_is_read(model, resolution, problem):
    with pytest.raises(ValueError, match=problem):
        model.encode_image("gone.png", resolution)


def test_a_long_image_of_too_many_visual_tokens_is_refused(model, tmp_path):
    Image.new("RGB", (64, 64 * 260)).save(tmp_path / "long.png")
    with pytest.raises(ValueError, match="long.png makes more visual tokens than the 512 tokens"):
        model.encode_image(tmp_path / "long.png", keep_ratio=True)


# ---- The checkpoint ----

@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint", torch.float32)
    return tmp_path / "checkpoint"


def change_config(checkpoint, **changes):
    config = json.loads((checkpoint / "config.json").read_text()) | changes
    (checkpoint / "config.json").write_text(json.dumps(config))


def test_a_saved_model_is_loaded_again(model, checkpoint):
    prompt, image = random_prompt(1), torch.randn(3, 128, 128)
    loaded = ConvLLaVA.from_pretrained(checkpoint)
    assert torch.equal(loaded([prompt], [image]), model([prompt], [image]))
    assert (loaded.resolution, loaded.max_length) == (128, 512)
    assert not loaded.training


def test_the_config_has_the_released_names(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    assert config["mm_projector_type"] == "mlp2x_gelu"
    assert config["mm_hidden_size"] == 24


def test_a_loaded_model_may_be_saved_over_its_files(checkpoint):
    loaded = ConvLLaVA.from_pretrained(checkpoint)
    loaded.save_pretrained(str(checkpoint), torch.bfloat16)
    assert ConvLLaVA.from_pretrained(checkpoint).projector[0].weight.dtype == torch.bfloat16
    assert list(checkpoint.parent.iterdir()) == [checkpoint]


def test_a_copy_with_other_weights(model):
    prompt, image = random_prompt(1), torch.randn(3, 128, 128)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model([prompt], [image])
    for parameter in model.parameters():
        parameter.data.zero_()
    copy = model.with_weights(weights)
    assert torch.equal(copy([prompt], [image]), expected)
    assert (copy.resolution, copy.max_length, copy.tokenizer) == (128, 512, model.tokenizer)


def test_training_samples_have_2048_tokens_where_the_model_reads_4096(
        backbones, tmp_path, tokenizer):
    llama = small_llama(max_position_embeddings=4096)
    llama.save_pretrained(tmp_path / "llm", tokenizer=tokenizer)
    model = ConvLLaVA.from_backbones(backbones / "vision", tmp_path / "llm", 128)
    assert model.max_length == 2048


def test_a_tokenizer_of_another_size_than_the_embedding_is_refused(backbones, tmp_path):
    shutil.copytree(backbones / "llm", tmp_path / "llm")
    small_llama(vocab_size=700).save_pretrained(tmp_path / "llm")
    shutil.copy(backbones / "llm" / "tokenizer.model", tmp_path / "llm")
    with pytest.raises(ValueError, match="has 768 pieces, and config.json says 700"):
        ConvLLaVA.from_backbones(backbones / "vision", tmp_path / "llm", 128)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors"])
def test_a_checkpoint_that_lacks_a_file_is_refused(checkpoint, name):
    (checkpoint / name).unlink()
    with pytest.raises(ValueError, match="missing|holds no weights"):
        ConvLLaVA.from_pretrained(checkpoint)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint folder"):
        ConvLLaVA.from_pretrained(tmp_path / "gone")


# ---- The vision weights, which may lie in several places ----

@pytest.fixture
def tower(checkpoint):
    """The folder of the checkpoint's vision weights, moved out of it."""
    return (checkpoint / "vision_tower").rename(checkpoint.parent / "tower")


def put_in_the_shards(checkpoint, tower, change=0):
    """Adds the vision weights, plus a change, to the file of the language model's."""
    tensors = load_file(checkpoint / "model.safetensors")
    for name, value in load_file(tower / "model.safetensors").items():
        tensors[convllava.VISION_PREFIX + name] = value + change
    save_file(tensors, checkpoint / "model.safetensors")


def assert_same_vision(loaded, model):
    """To 1e-5, on a random image."""
    image = torch.randn(3, 64, 64)
    torch.testing.assert_close(
        loaded.encode_images([image])[0], model.encode_images([image])[0], rtol=0, atol=1e-5)


def test_vision_weights_are_read_from_the_shards(model, checkpoint, tower):
    put_in_the_shards(checkpoint, tower)
    assert_same_vision(ConvLLaVA.from_pretrained(checkpoint), model)


def test_vision_weights_are_read_where_the_config_says(model, checkpoint, tower):
    change_config(checkpoint, mm_vision_tower=str(tower))
    assert_same_vision(ConvLLaVA.from_pretrained(checkpoint), model)


def test_vision_weights_are_read_from_a_folder_of_their_published_name_beside(
        model, checkpoint, tower):
    change_config(checkpoint, mm_vision_tower="ConvLLaVA/tower")
    assert_same_vision(ConvLLaVA.from_pretrained(checkpoint), model)


def test_vision_weights_are_read_from_the_folder_that_is_asked_for(model, checkpoint, tower):
    assert_same_vision(ConvLLaVA.from_pretrained(checkpoint, vision_tower=tower), model)


def test_the_folder_that_is_asked_for_goes_before_the_shards(model, checkpoint, tower):
    put_in_the_shards(checkpoint, tower, change=1)
    assert_same_vision(ConvLLaVA.from_pretrained(checkpoint, vision_tower=tower), model)


def test_a_checkpoint_without_vision_weights_is_refused_with_what_to_do(checkpoint, tower):
    with pytest.raises(ValueError, match="give its folder with --vision-tower"):
        ConvLLaVA.from_pretrained(checkpoint)

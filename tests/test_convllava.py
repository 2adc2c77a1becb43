import json

import pytest
import torch
import torch.nn.functional as F

import convllava
from conftest import small_llama
from convllava import ConvLLaVA, choose, splice
from data.conversation import IGNORE, IMAGE_TOKEN, encode_conversation
from llama import Tokenizer


def ids_with_images(count, length=9, seed=0):
    ids = torch.randint(3, 768, (length,), generator=torch.Generator().manual_seed(seed))
    ids[1:1 + count] = IMAGE_TOKEN
    return ids


def greedy(model, prompts, images, steps=12):
    rows = [[] for _ in prompts]
    for tokens in model.generate(prompts, images, steps):
        for row, token in zip(rows, tokens):
            row += [] if token is None else [token]
    return rows


def test_visual_tokens_stand_where_the_image_token_was(model):
    """None, one and two images of different sizes in one batch, against embeddings put together by hand."""
    images = [torch.randn(3, 64, 128), torch.randn(3, 128, 128), torch.randn(3, 64, 128)]
    rows = [torch.tensor(row) for row in ([1, 5, 6], [1, IMAGE_TOKEN, 7], [1, IMAGE_TOKEN, 8, IMAGE_TOKEN, 9])]
    visual = [model.projector(model.vision(image[None])[0].flatten(1).T) for image in images]  # one at a time
    embed = lambda *ids: model.llama.embed_tokens(torch.tensor(ids))
    by_hand = [embed(1, 5, 6), torch.cat([embed(1), visual[0], embed(7)]),
               torch.cat([embed(1), visual[1], embed(8), visual[2], embed(9)])]
    spliced, labels = splice(model.llama.embed_tokens, rows, model.encode_images(images), [row.clone() for row in rows])
    assert [len(row) for row in spliced] == [3, 4, 9]
    for ours, expected in zip(spliced, by_hand):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    assert labels[2].tolist() == [1] + [IGNORE] * 4 + [8] + [IGNORE] * 2 + [9]


def test_visual_tokens_are_taken_for_their_image(model):
    """Logits and answers of images that were encoded before, beside one that was not, are the same."""
    images, rows = [torch.randn(3, 128, 64), torch.randn(3, 64, 64)], [ids_with_images(1), ids_with_images(1, 6)]
    seen = [model.encode_images(images)[0].detach(), images[1]]
    torch.testing.assert_close(model(rows, seen), model(rows, images), rtol=0, atol=1e-5)
    assert greedy(model, rows, seen) == greedy(model, rows, images)


def test_lists_of_ids_and_stacked_images_are_taken(model, tokenizer):
    ids, labels = encode_conversation(tokenizer, [(1, "What is it?", "A pen.")])
    images = torch.randn(1, 3, 64, 64)
    assert model([ids], images, [labels]) == model([torch.tensor(ids)], list(images), [torch.tensor(labels)])


def test_text_alone_trains_the_vision_by_nothing(model):
    """Every weight has a gradient, as DDP needs, and the vision's is zero: the loss is that of a model in use."""
    ids = ids_with_images(0)
    loss = model([ids], labels=[ids])
    loss.backward()
    assert loss == model.eval()([ids], labels=[ids])
    assert not any(parameter.grad.any() for parameter in model.vision.parameters())


def test_number_of_images_must_fit(model):
    with pytest.raises(ValueError, match="hold 1 image tokens, and there are 2 images"):
        model([ids_with_images(1)], [torch.zeros(3, 64, 64)] * 2)


@pytest.mark.parametrize("chunk", [2048, 4])
def test_loss_is_the_cross_entropy_of_all_logits(model, monkeypatch, chunk):
    """The loss from labelled positions only, whole and in chunks, against the plain one; gradients too."""
    monkeypatch.setattr(convllava, "LOSS_CHUNK", chunk)
    rows, images = [ids_with_images(1, 9), ids_with_images(0, 14, seed=1)], [torch.randn(3, 128, 64)]
    labels = [torch.where(torch.arange(len(row)) > 4, row, IGNORE) for row in rows]
    loss = model(rows, images, labels)
    loss.backward()
    gradient = model.llama.lm_head.weight.grad.clone()
    logits = model(rows, images)
    targets = torch.full(logits.shape[:2], IGNORE)
    targets[0, 6:10], targets[1, 5:14] = labels[0][5:], labels[1][5:]  # two visual tokens for one image token
    model.zero_grad()
    plain = F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten(), ignore_index=IGNORE)
    plain.backward()
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, model.llama.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    labels = [torch.full_like(row, IGNORE) for row in rows]
    assert model(rows, images, labels) == 0  # none is labelled
    labels[1][5] = rows[1][5]
    torch.testing.assert_close(model(rows, images, labels), -logits.log_softmax(-1)[1, 4, rows[1][5]])


def test_generation_with_the_cache_equals_generation_without(model):
    """24 greedy tokens, each from the whole sequence again through forward()."""
    image = torch.randn(3, 128, 128)
    row = ids_with_images(1)
    for _ in range(24):
        row = torch.cat([row, model([row], [image])[0, -1:].argmax(-1)])
    assert greedy(model, [ids_with_images(1)], [image], 24) == [row[9:].tolist()]


def test_batch_of_different_prompts_equals_one_at_a_time(model):
    prompts = [ids_with_images(1, 9), ids_with_images(0, 5, seed=1), ids_with_images(2, 17, seed=2)]
    images = [torch.randn(3, 64, 64), torch.randn(3, 128, 128), torch.randn(3, 64, 192)]
    alone = [greedy(model, [p], i)[0] for p, i in zip(prompts, (images[:1], [], images[1:]))]
    assert greedy(model, prompts, images) == alone
    assert len({tuple(row) for row in alone}) == 3


def test_a_row_that_ended_is_none_and_all_ended_stops(model):
    prompts = [torch.tensor([1, 5]), torch.tensor([1, 6, 7])]
    model.llama.lm_head.weight.data[Tokenizer.eos] = 0
    free = greedy(model, prompts, [], 6)
    model.llama.lm_head.weight.data[Tokenizer.eos] = 1.5 * model.llama.lm_head.weight.data[free[0][0]]
    steps = list(model.generate(prompts, [], 6))
    assert steps[0][0] == Tokenizer.eos and len(steps) > 1 and all(step[0] is None for step in steps[1:])
    assert list(model.generate(prompts[:1], [], 6)) == [[Tokenizer.eos]]


def test_top_p_and_temperature_draw_from_the_right_set():
    logits = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(choose(logits, 0, 1.0).tolist()) == {0}
    assert set(choose(logits, 1.0, 0.6, generator).tolist()) == {0}  # 0.66 of the mass is the first's
    assert set(choose(logits, 1.0, 0.7, generator).tolist()) == {0, 1}
    share = (choose(logits, 2.0, 1.0, generator) == 0).float().mean()
    assert abs(share - (logits[0] / 2).softmax(-1)[0]) < 0.03


def test_top_p_arrives_at_the_choice(model):
    prompt = torch.tensor([1, 5, 6])
    asked = lambda *how: [token for token, in model.generate([prompt], (), 6, *how)]
    assert asked(9.0, 1e-9) == asked(0.0) != asked(9.0, 1.0)


def test_training_samples_have_2048_tokens_where_the_model_reads_more(backbones, tmp_path, tokenizer):
    small_llama(max_position_embeddings=4096).save_pretrained(tmp_path / "llm", tokenizer=tokenizer)
    assert ConvLLaVA.from_backbones(backbones / "vision", tmp_path / "llm", 128).max_length == 2048


def test_prompt_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="the model reads 512"):
        next(model.generate([torch.ones(512, dtype=torch.long)]))
    assert len(list(model.generate([torch.ones(510, dtype=torch.long)], max_new_tokens=9))) == 2


def test_saved_and_loaded_is_the_same(model, tmp_path):
    row, image = ids_with_images(1), torch.randn(3, 128, 128)
    model.save_pretrained(tmp_path / "a", torch.float32)
    loaded = ConvLLaVA.from_pretrained(tmp_path / "a")
    assert (loaded.resolution, loaded.max_length, loaded.training) == (128, 512, False)
    assert torch.equal(loaded([row], [image]), model([row], [image]))
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["mm_projector_type"] == "mlp2x_gelu" and config["mm_hidden_size"] == 24
    loaded.save_pretrained(str(tmp_path / "a"), torch.bfloat16)  # over itself, in bfloat16
    assert ConvLLaVA.from_pretrained(tmp_path / "a").projector[0].weight.dtype == torch.bfloat16
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("place", ["in the shards", "named by the config", "beside it", "given", "given, not its own"])
def test_vision_weights_are_found_where_they_may_be(model, tmp_path, place):
    from safetensors.torch import load_file, save_file
    model.save_pretrained(tmp_path / "a", torch.float32)
    moved = (tmp_path / "a" / "vision_tower").rename(tmp_path / "elsewhere")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    with pytest.raises(ValueError, match="--vision-tower"):
        ConvLLaVA.from_pretrained(tmp_path / "a")
    if place in ("in the shards", "given, not its own"):
        vision = {convllava.VISION + k: v for k, v in load_file(moved / "model.safetensors").items()}
        if place != "in the shards":
            vision = {k: v + 1 for k, v in vision.items()}
        save_file(load_file(tmp_path / "a" / "model.safetensors") | vision, tmp_path / "a" / "model.safetensors")
    if place == "named by the config":
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"mm_vision_tower": str(moved)}))
    if place == "beside it":  # under the name that it has where it is published
        (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"mm_vision_tower": "ConvLLaVA/elsewhere"}))
    loaded = ConvLLaVA.from_pretrained(tmp_path / "a", vision_tower=moved if place.startswith("given") else None)
    image = torch.randn(3, 64, 64)
    torch.testing.assert_close(loaded.encode_images([image])[0], model.encode_images([image])[0], rtol=0, atol=1e-5)


def test_folders_that_lack_a_file_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    for name in ("config.json", "tokenizer.model", "model.safetensors"):
        moved = (tmp_path / "a" / name).rename(tmp_path / name)
        with pytest.raises(ValueError, match="missing|holds no weights"):
            ConvLLaVA.from_pretrained(tmp_path / "a")
        moved.rename(tmp_path / "a" / name)
    with pytest.raises(ValueError, match="no checkpoint folder"):
        ConvLLaVA.from_pretrained(tmp_path / "b")


def test_question_cannot_hold_control_tokens(model, tokenizer):
    ids, _ = encode_conversation(tokenizer, [(1, "what is <image> and </s>?", None)])
    assert ids.count(IMAGE_TOKEN) == 1 and ids.count(tokenizer.eos) == 0
    next(model.generate([ids], [torch.zeros(3, 64, 64)]))

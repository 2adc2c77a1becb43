import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import llama
import train
from conftest import ENVIRONMENT, ROOT, launcher, needs_torch_2_7, refused, run, small_config, train_main
from convllava import ConvLLaVA
from convnext import CONVNEXT_L, CONVNEXT_L_DAGGER, ConvNeXt
from data.conversation import IGNORE, IMAGE_TOKEN, encode_conversation
from data.dataset import LlavaDataset, read_mixture
from data.images import square
from data.validation import agree, validate
from llama import Llama, LlamaConfig

# Table 15: what each phase trains; stage 5 is stages.4
EXPECTED = {
    1: {"vision.stages.4", "projector.0", "projector.2"},
    2: {"vision.stages.2", "vision.stages.3", "vision.stages.4", "projector.0", "projector.2", "llama.embed_tokens",
        "llama.layers.0", "llama.layers.1", "llama.norm", "llama.lm_head"},
    3: {"projector.0", "projector.2", "llama.embed_tokens", "llama.layers.0", "llama.layers.1", "llama.norm",
        "llama.lm_head"},
}


def module_of(name):
    part = name.split(".")
    return ".".join(part[:3] if part[1] in ("stages", "layers") else part[:2])


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_trainable_parameters_are_the_papers_and_frozen_ones_stay(model, phase):
    train.freeze(model, train.RECIPES["table15"][phase][0])
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {module_of(name) for name in names} == EXPECTED[phase]
    assert not {n for n, _ in model.named_parameters() if module_of(n) in EXPECTED[phase]} - names
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0)
    ids = torch.tensor([1, IMAGE_TOKEN, 7, 8, 9])
    for _ in range(3):
        model([ids], [torch.randn(3, 64, 64)], [ids.clamp(min=3)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved <= names and {module_of(name) for name in moved} == EXPECTED[phase]


@pytest.fixture
def parsed(monkeypatch):
    """train.py's arguments as it reads them."""
    def parse(*command):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, command)])
        return train.arguments()
    return parse


@pytest.mark.parametrize("gpu, processor, command, dtype", [
    (False, True, [], "bf16"), (False, False, [], "fp32"), (True, False, [], "bf16"),
    (False, False, ["--dtype", "bf16"], "bf16"), (True, True, ["--dtype", "fp32"], "fp32"),
    (False, False, ["--plan"], "bf16"), (True, False, ["--plan"], "bf16")])
def test_bf16_is_the_default_where_it_is_quick(parsed, monkeypatch, gpu, processor, command, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: processor)
    args = parsed("--phase", 1, *command)
    assert args.dtype == dtype and args.device == ("cuda:0" if gpu and "--plan" not in command else "cpu")
    if not gpu:
        with args.autocast():
            assert torch.is_autocast_enabled("cpu") == (dtype == "bf16")


@pytest.mark.parametrize("batch, micro, world, nearest", [
    (8, 16, 3, 9), (128, 16, 12, 132), (256, 16, 24, 264), (5, 2, 1, 4), (250, 16, 4, 256)])
def test_a_batch_that_does_not_divide_is_refused_with_the_nearest_that_does(parsed, monkeypatch, batch, micro, world,
                                                                          nearest):
    monkeypatch.setenv("WORLD_SIZE", str(world))
    command = ["--phase", 1, "--micro-batch", micro, "--batch"]
    with pytest.raises(ValueError, match=f"--batch {batch} does not divide .*the nearest that does is {nearest}$"):
        parsed(*command, batch)
    args = parsed(*command, nearest)
    assert args.micro_batch * args.accumulation * world == nearest


def full_size(stages):
    with torch.device("meta"):
        vision = ConvNeXt(**{4: CONVNEXT_L, 5: CONVNEXT_L_DAGGER}[stages])
        return ConvLLaVA(vision, Llama(LlamaConfig(num_hidden_layers=1)))


@pytest.mark.parametrize("recipe, phase, lr, batch, samples, vision", [
    ("table12", 1, 1e-3, 256, 558_000, []), ("table12", 2, 2e-5, 128, 665_000, []),
    ("table13", 1, 1e-3, 256, 558_000, []), ("table13", 3, 2e-5, 128, 665_000, []),
    ("table13", 2, 2e-5, 256, 1_200_000, [*(f"stages.2.blocks.{i}" for i in range(12, 27)), "stages.3"]),
    ("table14", 1, 3e-4, 256, 1_200_000, ["stages.4"]), ("table14", 3, 2e-5, 128, 665_000, []),
    ("table14", 2, 2e-5, 256, 1_200_000, ["stages.2", "stages.3", "stages.4"]),
    ("table15", 1, 3e-4, 256, 2_000_000, ["stages.4"]), ("table15", 3, 2e-5, 128, 665_000, []),
    ("table15", 2, 2e-5, 256, 2_900_000, ["stages.2", "stages.3", "stages.4"])])
def test_recipes_are_the_papers_tables(parsed, recipe, phase, lr, batch, samples, vision):
    args = parsed("--phase", phase, "--preset", "convllava-7b", "--recipe", recipe, "--plan")
    assert (args.lr, args.batch, args.samples) == (lr, batch, samples)
    stages, resolution = (4, 768) if recipe in ("table12", "table13") else (5, 1536)
    assert args.resolution == resolution
    model = full_size(stages)
    train.freeze(model, args.parts)
    trained = {name for name, p in model.vision.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.vision.named_parameters() if n.startswith(tuple(v + "." for v in vision))}
    assert all(p.requires_grad for p in model.projector.parameters())
    assert all(p.requires_grad == (phase > 1) for p in model.llama.parameters())
    if recipe == "table13" and phase == 2:  # "the last 18 blocks"
        blocks = {name.split(".gamma")[0] for name in trained if name.endswith("gamma")}
        assert len(blocks) == 18
        with pytest.raises(ValueError, match="has no phase 3"):
            parsed("--phase", 3, "--recipe", "table12", "--plan")


@pytest.mark.parametrize("preset, phase, schedule, resolution, val", [  # val: nano's only
    ("nano", 1, (2e-3, 8, 8, 400, 1), 512, "val-captions.json"),
    ("nano", 2, (8e-4, 8, 8, 1000, 1), None, "val-captions.json"),
    ("nano", 3, (8e-4, 8, 8, 650, 1), None, "val-instructions.json"),
    ("convllava-7b", 1, (3e-4, 256, 4, None, 4), 1536, None), ("convllava-7b", 2, (2e-5, 256, 2, None, 4), None, None),
    ("convllava-7b", 3, (2e-5, 128, 4, None, 4), None, None)])
def test_a_phase_is_the_whole_command(parsed, preset, phase, schedule, resolution, val):
    """Learning rate, batch, micro-batch, steps and data processes, resolution and data where nothing else is asked."""
    args = parsed("--phase", phase, "--preset", preset)
    assert (args.lr, args.batch, args.micro_batch, args.steps, args.workers) == schedule
    assert (args.resolution, args.save_every, args.keep, args.seed, args.sharded) == (resolution, 250, 2, 0, False)
    pairs = read_mixture(ROOT / "data" / (preset if val else "table15") / f"phase{phase}.json")
    assert [*zip(args.data, args.images)] == pairs and args.generated == bool(val)
    assert args.stage5 == ((2, 320) if val else (6, 3072))
    assert val is None or args.val == ROOT / "data" / "nano" / "out" / val
    backbones = ROOT / "data" / "nano" / "backbones"
    own = (backbones / "open_clip_model.safetensors", backbones / "vicuna-nano") if val else (None, None)
    assert (args.vision, args.llm) == own
    args = parsed("--phase", phase, "--preset", preset, "--vision", "a", "--llm", "b", "--plan")
    assert (args.vision, args.llm, args.plan) == ("a", "b", [8, 140, 400])
    other = parsed("--phase", phase, "--preset", preset, "--data", ROOT / "data" / "table14" / "phase1.json")
    assert len(other.data) == 1 and not (other.generated or other.val)


def test_a_phase_has_to_be_named(parsed):
    with pytest.raises(SystemExit, match="2"):
        parsed()


def test_one_process_shards_nothing(parsed, monkeypatch):
    assert not parsed("--phase", 3, "--parallel", "fsdp").sharded
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert parsed("--phase", 3, "--parallel", "fsdp").sharded and not parsed("--phase", 3).sharded


def test_what_the_appendix_ablates_can_be_chosen(parsed):
    for depth in (3, 6, 9):  # tables 10 and 11
        args = parsed("--phase", 1, "--preset", "convllava-7b", "--stage5-depth", depth, "--plan")
        assert args.stage5 == (depth, 3072)
    for first in (2, 3, 4):  # table 9
        args = parsed("--phase", 2, "--first-stage", first, "--plan")
        assert args.parts == (*(f"vision.stages.{i}" for i in range(first - 1, 5)), "projector", "llama")
    first = parsed("--phase", 2, "--recipe", "table13", "--first-stage", 3, "--plan")
    assert first.parts == ("vision.stages.2", "vision.stages.3", "projector", "llama")
    assert parsed("--phase", 1).resolution == 512 and parsed("--phase", 1, "--evaluate", "any").resolution is None
    four = parsed("--phase", 1, "--stage5-depth", 0, "--plan")
    assert four.stage5 is None and four.parts == ("projector",)
    with pytest.raises(ValueError, match="the recipe trains vision.stages.4, and the model has 4 stages"):
        train.freeze(full_size(4), train.RECIPES["table15"][1][0])


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_a_phase_starts_from_any_checkpoint(parsed, phase):
    """At its resolution, where another is not asked for; phase 1 at the preset's, which is the same here."""
    nano = ROOT / "data" / "nano" / "convllava-nano"
    weights = ConvLLaVA.from_pretrained(nano, dtype=torch.float32).state_dict()
    for more, resolution in ([], 512), (["--resolution", 256], 256):
        model = train.load_model(parsed("--phase", phase, "--init", nano, *more), None, "cpu")
        assert model.resolution == resolution
        assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_frozen_matrices_in_bfloat16_change_nothing(model):
    """Autocast rounds them in any case: loss and gradients are equal to the bit."""
    rows, images, labels = batch_of("mixed")
    model.llama.load_state_dict({k: v.bfloat16().float() for k, v in model.llama.state_dict().items()})
    train.freeze(model, train.RECIPES["table15"][1][0])
    found = []
    for slim in (False, True):
        if slim:
            train.slim(model)
            assert model.llama.lm_head.weight.dtype == model.vision.stages[0].blocks[0].fc1.bias.dtype == torch.bfloat16
            assert model.llama.embed_tokens.weight.dtype == model.projector[0].weight.dtype == torch.float32
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows, images, labels)
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("dtype, frozen", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_run_keeps_frozen_matrices_in_its_type(command, parsed, dtype, frozen):
    """And in bf16 on a processor it takes out of autocast what is slow in that."""
    model, *_ = train.prepare(parsed(*command()[1:], "--dtype", dtype), None)
    assert model.llama.lm_head.weight.dtype == model.vision.stages[0].blocks[0].fc1.weight.dtype == frozen
    assert model.vision.stages[4].blocks[0].fc1.weight.dtype == model.projector[0].weight.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        attended = model.llama.layers[0].self_attn.attend(*torch.zeros(3, 1, 2, 4, 8, dtype=torch.bfloat16))
    assert attended.dtype == (torch.float32 if dtype == "bf16" else torch.bfloat16)


@pytest.mark.parametrize("more", [[], ["--checkpointing"]])
def test_every_part_recomputes_its_activations_where_told(command, parsed, more):
    model, *_ = train.prepare(parsed(*command()[1:], *more), None)
    assert {part.checkpointing for part in (*model.vision.stages, model.llama)} == {bool(more)}


def batch_of(kind):
    """Micro-batches without images, with one, and with two in one sample: (ids, images, labels)."""
    g = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 768, (n,), generator=g) for n in (12, 9, 15, 11)]
    count = {"text": (0, 0, 0, 0), "images": (1, 1, 1, 1), "mixed": (0, 1, 2, 0)}[kind]
    for row, n in zip(rows, count):
        row[1:1 + n] = IMAGE_TOKEN
    labels = [torch.where(torch.arange(len(row)) > 5, row, IGNORE) for row in rows]
    return rows, [torch.randn(3, 64, 64 + 64 * (i % 2), generator=g) for i in range(sum(count))], labels


@pytest.mark.parametrize("kind", ["text", "images", "mixed"])
def test_paths_agree_on_loss_and_gradients(model, kind):
    """Recomputed activations: 1e-6 of the gradient's norm; two accumulated halves: 1e-5; bfloat16: 5%, loss 1%.

    With what leaves autocast on a processor 5% too, and as there recomputed activations change nothing.
    """
    rows, images, labels = batch_of(kind)
    total = sum(int((label[1:] != IGNORE).sum()) for label in labels)

    def gradients(parts=((0, 4),), dtype=torch.float32, checkpointing=False):
        for part in (*model.vision.stages, model.llama):
            part.checkpointing = checkpointing
        model.zero_grad()
        loss = 0
        for a, b in parts:
            skip = sum(int((row == IMAGE_TOKEN).sum()) for row in rows[:a])
            count = sum(int((row == IMAGE_TOKEN).sum()) for row in rows[a:b])
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                part = model(rows[a:b], images[skip:skip + count], labels[a:b], divisor=total)
            part.backward()
            loss += part.item()
        return loss, torch.cat([p.grad.flatten() for p in model.parameters()])

    loss, plain = gradients()
    assert plain.norm() > 0
    for options, tolerance in ((dict(checkpointing=True), 1e-6), (dict(parts=((0, 2), (2, 4))), 1e-5),
                               (dict(dtype=torch.bfloat16), 0.05)):
        other_loss, other = gradients(**options)
        assert (other - plain).norm() <= tolerance * plain.norm(), options
        assert abs(other_loss - loss) <= max(tolerance / 5, 1e-6) * loss, options
    train.leave_autocast(model)
    depthwise = model.vision.stages[1].blocks[0].conv_dw
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise(torch.zeros(1, 12, 4, 4)).dtype == torch.float32
        assert model.llama.layers[0].self_attn.attend(*torch.zeros(3, 1, 2, 4, 8)).dtype == torch.float32
    _, left = gradients(dtype=torch.bfloat16)
    assert 0 < (left - plain).norm() <= 0.05 * plain.norm()
    _, recomputed = gradients(dtype=torch.bfloat16, checkpointing=True)
    assert (recomputed - left).norm() <= 1e-6 * left.norm()


def test_learning_rate_warms_up_and_falls_to_zero():
    rates = [train.learning_rate(step, 1000, 2e-5) for step in range(1000)]
    assert rates.index(max(rates)) in (29, 30) and max(rates) == 2e-5
    assert rates[:30] == pytest.approx([2e-5 * step / 30 for step in range(1, 31)]) and rates[-1] < 1e-9
    assert rates[515] == pytest.approx(1e-5, rel=0.01)  # half-way down the cosine
    assert [train.learning_rate(step, 2, 1.0) for step in range(2)] == [1, 1]  # too few to warm up and to fall


def with_steps_told(*arguments):
    """Their settings on stdout, of gradients a hundred times as large. Signals are then heeded as before."""
    step, clip = torch.optim.AdamW.step, torch.nn.utils.clip_grad_norm_
    handlers = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]

    def told(optimizer, *more):
        group, = optimizer.param_groups
        norm = torch.stack([p.grad.norm() for p in group["params"]]).norm().item()
        print(json.dumps([group["lr"], group["weight_decay"], norm]))
        return step(optimizer, *more)
    torch.optim.AdamW.step = told
    torch.nn.utils.clip_grad_norm_ = lambda group, most: ([p.grad.mul_(100) for p in group], clip(group, most))[1]
    train_main(*arguments)
    assert handlers == [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]


def test_a_step_has_the_papers_settings(command, forked, tmp_path):
    """The scheduled learning rate, no weight decay, gradients clipped at a norm of 1 (tables 12 to 15, LLaVA's)."""
    done = forked(*command(steps=4), "--lr", 0.1, function=with_steps_told)
    assert done.returncode == 0, done.stderr
    rates, decays, norms = zip(*map(json.loads, done.stdout.splitlines()))
    assert rates == tuple(train.learning_rate(i, 4, 0.1) for i in range(4)) and set(decays) == {0}
    lines = map(json.loads, (tmp_path / "runs" / "phase1.metrics.jsonl").read_text().splitlines())
    before = [line["grad_norm"] for line in lines]
    assert max(before) > 1 > min(before) and norms == pytest.approx([min(1, norm) for norm in before], rel=1e-3)


def test_loss_and_labels_are_those_of_the_whole_batch(command, forked, parsed, pages, tmp_path):
    """What is logged for two micro-batches on each of two processes, against every sample alone: within 1e-5. One of
    them evaluates."""
    arguments = [*command(batch=24, steps=1), "--micro-batch", 6, "--dtype", "fp32",  # all of the 24 pages
                 "--val", pages / "val.json"]
    done = forked(*arguments, processes=2)
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    model, _, dataset, _ = train.prepare(parsed(*arguments[1:]), None)
    total = count = 0
    for sample in map(dataset.__getitem__, range(24)):
        labels = int((sample["labels"][1:] != IGNORE).sum())
        with torch.no_grad():
            loss = model([sample["input_ids"]], sample["images"], [sample["labels"]])
        total, count = total + labels * loss.item(), count + labels
    line, evaluated = map(json.loads, (tmp_path / "runs" / "phase1.metrics.jsonl").read_text().splitlines())
    assert line["labels"] == count and line["loss"] == pytest.approx(total / count, rel=1e-5)
    assert evaluated["right"]["all"][1] == 6
    moving, size = (sum(p.numel() for p in model.parameters() if p.requires_grad or frozen) / 1e6
                    for frozen in (False, True))
    assert moving > 0.1
    assert "Warning" not in done.stderr, done.stderr
    assert done.stderr.count(" 0/24 ") == 1 and " 24/24 " in done.stderr, done.stderr  # rank 0's bar alone, to its end
    assert f"phase 1: {moving:.1f}M of {size:.1f}M parameters trained, 1 steps of 24 samples\n" in done.stderr


def test_resolution_leaves_room_for_text(model):
    model.max_length = 23 ** 2
    for resolution in (64, 22 * 64):
        model.resolution = resolution
        train.check_resolution(model)
    for resolution, said in ((-64, "multiple of 64"), (0, "multiple of 64"), (32, "multiple of 64"),
                             (1440, "multiple of 64"), (23 * 64, "makes 529 visual tokens")):
        model.resolution = resolution
        with pytest.raises(ValueError, match=said):
            train.check_resolution(model)


def test_answers_agree_by_text_or_by_overlap():
    assert agree("12.50", "12.50") and not agree("12.5", "12.50")
    assert agree("[0.10, 0.10, 0.30, 0.30]", "[0.10, 0.10, 0.30, 0.20]")  # half of it
    assert not agree("[0.10, 0.10, 0.30, 0.32]", "[0.10, 0.10, 0.30, 0.20]")
    assert agree("Tea 2.50 [0.10, 0.10, 0.30, 0.30]", "Tea 2.56 [0.10, 0.10, 0.30, 0.20]")  # the box is what was asked
    assert not agree("over there", "[0.10, 0.10, 0.30, 0.20]")
    assert not agree("[0.10, 0.10, 0.10, 0.10]", "[0.50, 0.50, 0.50, 0.50]")


def test_an_answer_that_was_cut_is_validated(model, tmp_path):
    said = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "one two three four five six seven"}]
    (tmp_path / "val.json").write_text(json.dumps([{"conversations": said}]))
    dataset = lambda: LlavaDataset([(tmp_path / "val.json", tmp_path)], model, None)
    model.max_length = len(dataset()[0]["input_ids"]) - 4
    loss, counts = validate(model.eval(), dataset(), ["all"], 1, 0, nullcontext)
    assert loss > 0 and counts == {"all": (0, 1)}


def test_validation_encodes_an_image_once_and_its_first_question_is_asked(model, pages, monkeypatch, tmp_path):
    """The loss is of all turns; a second image, which the first question is not about, is not in its prompt."""
    turns = [("human", "<image>\nWhat is it?"), ("gpt", "a page"), ("human", "<image>\nAnd this?"), ("gpt", "another")]
    image = json.loads((pages / "val.json").read_text())[0]["image"]
    sample = {"image": [image, image], "conversations": [{"from": who, "value": said} for who, said in turns]}
    (tmp_path / "two.json").write_text(json.dumps([sample]))
    dataset = LlavaDataset([(tmp_path / "two.json", pages)], model, partial(square, resolution=128))
    encoded, asked, forward = [], [], model.vision.forward
    prompt, _ = encode_conversation(model.tokenizer, [(1, "What is it?", None)])
    monkeypatch.setattr(model.vision, "forward", lambda pixels: encoded.append(len(pixels)) or forward(pixels))
    monkeypatch.setattr(model, "generate", lambda prompts, images, steps: asked.extend([*prompts, *images]) or [])
    loss, _ = validate(model.eval(), dataset, ["all"], 1, 0, nullcontext)
    assert encoded == [2] and asked[0].tolist() == prompt and [len(visual) for visual in asked[1:]] == [4]
    sample = dataset[0]
    assert loss == pytest.approx(model([sample["input_ids"]], sample["images"], [sample["labels"]]).item(), rel=1e-6)


def test_an_answer_may_be_as_long_as_the_expected_one(model, tmp_path, monkeypatch):
    said = [{"from": "human", "value": "Read it."}, {"from": "gpt", "value": "one two three four " * 80}]
    (tmp_path / "val.json").write_text(json.dumps([{"conversations": said}]))
    dataset = LlavaDataset([(tmp_path / "val.json", tmp_path)], model, None)
    expected = [token for token in dataset[0]["labels"].tolist() if token != IGNORE]
    assert 256 < len(expected) < model.max_length
    right = lambda prompts, images, max_new_tokens: ([token] for token in expected[:max_new_tokens])
    monkeypatch.setattr(model, "generate", right)
    assert validate(model.eval(), dataset, ["all"], 1, 0, nullcontext)[1] == {"all": (1, 1)}
    asked = []  # and one that never ends is not waited for
    monkeypatch.setattr(model, "generate", lambda prompts, images, max_new_tokens: asked.append(max_new_tokens) or [])
    assert validate(model, dataset, ["all"], 1, 0, nullcontext)[1] == {"all": (0, 1)}
    assert len(expected) <= asked[0] < len(expected) + 20


@pytest.mark.parametrize("generated, counts, said", [
    (False, {"all": (1, 4)}, ["validation loss 1.5000, exact match 25.0%", "  all             1 of    4   25.0%"]),
    (True, {"box": (3, 4), "text": (1, 2)}, [  # a box need not be met exactly
        "validation loss 1.5000, exact match 50.0%", "  box             3 of    4   75.0%  (IoU at least 0.5)",
        "  text            1 of    2   50.0%"]),
    (True, {"box": (3, 4)}, [
        "validation loss 1.5000, exact match 75.0%", "  box             3 of    4   75.0%  (IoU at least 0.5)"])])
def test_evaluation_says_what_answers_are_right(model, pages, tmp_path, monkeypatch, capsys, generated, counts, said):
    """At the checkpoint's resolution or the one asked for; logged where it follows a phase."""
    model.save_pretrained(tmp_path / "checkpoint")
    ids = [sample["id"] for sample in json.loads((pages / "val.json").read_text())]
    for dtype, resolution in (("bf16", None), ("fp32", 64)):
        def validated(model, dataset, kinds, *rest):
            assert model.llama.lm_head.weight.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
            assert dataset[0]["images"][0].shape[-1] == (resolution or 128)
            assert kinds == [name.rsplit("-", 1)[0] if generated else "all" for name in ids]
            assert rest == (8, 0, nullcontext)
            return 1.5, counts
        monkeypatch.setattr(train, "validate", validated)
        args = SimpleNamespace(device="cpu", dtype=dtype, resolution=resolution, val=pages / "val.json", images=[pages],
                               generated=generated, micro_batch=2, workers=0, autocast=nullcontext, out=tmp_path,
                               phase=3, evaluate=resolution and tmp_path / "checkpoint")
        train.evaluate(args, tmp_path / "checkpoint")
        assert capsys.readouterr().err.splitlines() == said
    line = json.loads((tmp_path / "phase3.metrics.jsonl").read_text())  # one: of what was not only evaluated
    assert line == dict(checkpoint=str(tmp_path / "checkpoint"), val_loss=1.5, exact_match=float(said[0][-5:-1]) / 100,
                        right={kind: list(count) for kind, count in counts.items()})


def with_words_for_work(*command):
    """train.py's main, which says what it would draw, train and evaluate."""
    def say(*words):
        os.write(1, f"{' '.join(words)}\n".encode())  # at once, where print may be cut by another rank's

    def draw(folder, files):
        time.sleep(1)  # for a rank that does not wait
        say("draw", *files)
    train.generate = draw
    train.train = lambda args: say("train") or "runs/phase1"
    train.evaluate = lambda args, checkpoint: say("evaluate", checkpoint)
    train_main(*command)


@pytest.mark.parametrize("processes, options, said", [
    (2, [], ["draw captions.json val-captions.json", "train", "train", "evaluate runs/phase1"]),
    (1, ["--evaluate", "any"], ["draw val-captions.json", "evaluate any"])])
def test_one_process_draws_the_small_models_data_and_the_others_wait(forked, processes, options, said):
    """Then all train and one evaluates, or it only evaluates."""
    done = forked("train.py", "--phase", 1, *options, processes=processes, function=with_words_for_work)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == said[0] and sorted(lines) == sorted(said)  # either rank may be the last to train


@pytest.fixture
def command(backbones, pages, tmp_path):
    """A two-step run of phase 1 on generated captions; data and steps can be given."""
    def make(data=pages / "captions.json", images=pages, steps=2, phase=1, out=tmp_path / "runs", batch=4):
        return ["train.py", "--phase", phase, "--vision", backbones / "vision", "--llm", backbones / "llm",
                "--resolution", 64, "--data", data, "--images", images, "--batch", batch, "--out", out,
                "--workers", 0, *(["--steps", steps] if steps else [])]
    return make


def losses(out, phase=1):
    lines = map(json.loads, (out / f"phase{phase}.metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def without_kernels(*command):
    """train.py's main, its compiled programs run by torch's own operations: building kernels takes a minute.

    Each block has to be one program, not several with Python between."""
    torch.compile = partial(torch.compile, backend="eager")
    train_main(*command)
    assert not counters["graph_break"], counters["graph_break"]


def test_three_phases_follow_each_other(command, forked, pages, tmp_path):
    """The third for an epoch: each step of 4 samples, with or without images."""
    shown = ["image" in entry for entry in json.loads((pages / "instructions.json").read_text())]
    epoch = sum(shown.count(kind) // 4 for kind in (True, False))
    for phase, workers, *whole in ((1, 0), (2, 0), (3, 1, "--preset", "convllava-7b", "--micro-batch", 2)):
        # forked, a data process gets the dataset pickled, as on macOS
        done = forked(*command(pages / "instructions.json", steps=None if whole else 2, phase=phase), *whole, "--val",
                      pages / "val.json", "--workers", workers)
        assert done.returncode == 0, done.stderr
        assert len(losses(tmp_path / "runs", phase)) == (epoch if whole else 2)
        assert done.stdout == "" and "exact match" in done.stderr
        last = json.loads((tmp_path / "runs" / f"phase{phase}.metrics.jsonl").read_text().splitlines()[-1])
        assert last["val_loss"] > 0 and sum(total for _, total in last["right"].values()) == 6
    saved = [load_file(tmp_path / "runs" / f"phase{p}" / "vision_tower" / "model.safetensors") for p in (1, 2, 3)]
    kernel = lambda phase, stage: saved[phase][f"encoder.stages.{stage}.layers.0.dwconv.weight"]
    same = lambda a, b, stage: torch.equal(kernel(a, stage), kernel(b, stage))
    assert same(0, 1, 0) and same(1, 2, 4) and not same(0, 1, 2)
    assert ConvLLaVA.from_pretrained(tmp_path / "runs" / "phase3").resolution == 64


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Annotation files: text only, mixed with one and two images, and one that alternates."""
    folder = tmp_path_factory.mktemp("mixtures")
    for i in range(2):
        Image.effect_noise((50, 40 + 20 * i), 80).save(folder / f"{i}.png")
    say = lambda q, a: [{"from": "human", "value": q}, {"from": "gpt", "value": a}]
    text = [{"id": f"t{i}", "conversations": say(f"What is {i}?", "x" * (i + 1))} for i in range(8)]
    two = [{"id": f"i{i}", "image": ["0.png", "1.png"],
            "conversations": say("<image>\n<image>\nCompare.", f"They differ {i}.")} for i in range(8)]
    for name, entries in (("text", text), ("two", two), ("both", [e for pair in zip(text, two) for e in pair])):
        (folder / f"{name}.json").write_text(json.dumps(entries))
    return folder


@pytest.mark.parametrize("name, phase", [("text", 1), ("two", 2), ("both", 3)])
def test_two_processes_equal_one(command, forked, mixtures, tmp_path, name, phase):
    """Same global batch of 4: losses within 1e-5, bfloat16-saved weights within 1e-2 of each tensor's largest value."""
    found = {}
    for processes in (1, 2):
        out = tmp_path / str(processes)
        start = ["--init", tmp_path / "init"] if phase > 1 else []
        if start and processes == 1:
            prepared = forked(*command(mixtures / "two.json", mixtures, steps=1, out=tmp_path / "before"))
            assert prepared.returncode == 0, prepared.stderr
            (tmp_path / "before" / "phase1").rename(tmp_path / "init")
        done = forked(*command(mixtures / f"{name}.json", mixtures, steps=4, phase=phase, out=out), *start,
                      "--dtype", "fp32", processes=processes)
        assert done.returncode == 0, done.stderr
        tensors = load_file(out / f"phase{phase}" / "model.safetensors")
        vision = load_file(out / f"phase{phase}" / "vision_tower" / "model.safetensors")
        found[processes] = losses(out, phase), tensors | vision
    assert found[1][0] == pytest.approx(found[2][0], rel=1e-5) and len(found[1][0]) == 4
    for key, value in found[1][1].items():
        assert (value - found[2][1][key]).abs().max() <= 1e-2 * value.abs().max(), key


SPAWNING = "import multiprocessing; multiprocessing.set_start_method('spawn'); import train; train.main()"


@pytest.mark.parametrize("processes, program", [(1, ["train.py"]), (1, ["-c", SPAWNING]), (2, ["train.py"])])
def test_interrupted_run_says_how_to_go_on_and_ends_the_same(command, forked, pages, tmp_path, processes, program):
    """On one process and on two, data processes beside them, forked or, as on macOS, not. Bit for bit on each number
    of processes."""
    data = spoiled(pages, tmp_path, bad=0, total=200)  # less than an epoch: Ctrl-C ends a process that only starts
    whole = forked(*command(data, steps=40, out=tmp_path / "whole"), processes=processes)
    assert whole.returncode == 0 and "stopped" not in whole.stderr and "from step" not in whole.stderr, whole.stderr
    arguments = [*map(str, command(data, steps=40, out=tmp_path / "cut")), "--workers", "1"]
    process = subprocess.Popen([*launcher(processes), *program, *arguments[1:]], cwd=ROOT, env=ENVIRONMENT,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    metrics = tmp_path / "cut" / "phase1.metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.01)
    if SPAWNING not in program and multiprocessing.get_start_method() == "fork":
        kill(tmp_path / "cut", kind=signal.SIGTERM)  # to each process, as SLURM does; torchrun sends its ranks another
    else:
        os.killpg(process.pid, signal.SIGINT)  # to the group, as Ctrl-C does
    _, errors = process.communicate(timeout=120)
    assert errors.count("--resume goes on") == 1 and not (tmp_path / "cut" / "phase1").exists(), errors
    refused(forked(*arguments, "--resume", "--batch", 8), "batch", "give the same")
    resumed = forked(*arguments, "--resume", processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)
    a, b = (load_file(tmp_path / d / "phase1" / "model.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def kill(out, only="", kind=signal.SIGKILL):
    """A signal to every process that writes to `out`, or to those with `only` in their environment."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if str(out) in (folder / "cmdline").read_text() and only in (folder / "environ").read_text():
                os.kill(int(folder.name), kind)
        except OSError:  # it has ended by now
            pass


def kill_at(command, out, signs):
    """Starts a run and sends SIGKILL to all of its processes when one of the paths `signs` is there."""
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE)
    while process.poll() is None and not any(sign.exists() for sign in signs):
        time.sleep(0.0005)
    assert process.poll() is None, "the run ended before it could be killed"
    kill(out)
    process.communicate()


def told_to_stop_before_its_first_step(*arguments):
    stream = train.batch_stream
    train.batch_stream = lambda *what: os.kill(os.getpid(), signal.SIGTERM) or stream(*what)
    train_main(*arguments)


@pytest.mark.parametrize("processes, micro", [(1, 1), (3, 2)])  # one row's rounding may depend on where it lies
def test_killed_runs_lose_no_more_than_the_steps_since_the_last_state(command, forked, tmp_path, processes, micro):
    """SIGKILL in training and while a state is written; bit for bit the same end on each number of processes.

    So too of one stopped before its optimizer has taken a step."""
    more = ["--save-every", 2, "--micro-batch", micro, "--dtype", "fp32"]
    whole = forked(*command(steps=12, batch=12, out=tmp_path / "whole"), *more, processes=processes)
    assert whole.returncode == 0, whole.stderr
    arguments = [*map(str, command(steps=12, batch=12, out=tmp_path / "cut")), *map(str, more)]
    states, resume = tmp_path / "cut" / "phase1.partial", []
    for signs in (["step-0000004"], ["step-0000008.saving", "step-0000008"]):  # a whole state; one being written
        kill_at([*launcher(processes), *arguments, *resume], tmp_path / "cut", [states / sign for sign in signs])
        resume = ["--resume"]
        assert sum(1 for _ in states.glob("step-*[0-9]")) <= 3  # two are kept, a third while it is written
    newest = max(states.glob("step-*[0-9]"))
    shutil.copytree(newest, states / "step-0000099")  # one that a disk has damaged
    (states / "step-0000099" / "training.pt").write_bytes(b"half")
    shutil.copytree(newest, states / "step-0000098")
    os.truncate(states / "step-0000098" / "model.safetensors", 1000)
    resumed = forked(*arguments, "--resume", processes=processes)
    assert resumed.returncode == 0, resumed.stderr
    assert "step-0000099 is passed over" in resumed.stderr and "step-0000098 is passed over" in resumed.stderr
    assert f"from step {int(newest.name[5:])} in" in resumed.stderr
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and not states.exists()
    early, states = [*command(steps=12, batch=12, out=tmp_path / "early"), *more], tmp_path / "scratch"
    (states / "mine").mkdir(parents=True), (tmp_path / "early").mkdir()
    (tmp_path / "early" / "phase1.partial").symlink_to(states)
    written = set()
    for resume in ([], ["--resume"]):
        stopped = forked(*early, *resume, processes=processes, function=told_to_stop_before_its_first_step)
        assert stopped.returncode == 1 and "stopped at step 0 of 12" in stopped.stderr, stopped.stderr
        written.add((states / "step-0000000").stat().st_ino)
    assert len(written) == 1  # a state that is there is not written again
    resumed = forked(*early, "--resume", processes=processes)
    assert resumed.returncode == 0 and [path.name for path in states.iterdir()] == ["mine"], resumed.stderr
    a, *others = (load_file(tmp_path / d / "phase1" / "model.safetensors") for d in ("whole", "cut", "early"))
    assert all(torch.equal(a[key], other[key]) for other in others for key in a)


def test_damaged_and_half_written_states_are_not_kept(model, tmp_path, monkeypatch):
    args = SimpleNamespace(rank=0, world=1, keep=2, lr=1, parallel="ddp", micro_batch=1, compile=False)
    optimizer, states = torch.optim.AdamW(model.parameters()), tmp_path / "states"
    for before, step in ((None, 1), (1, 2)):
        train.save_state(states, before, args, model, optimizer, {}, step)
    for name in ("step-0000002.saving", "step-0000004"):
        (states / name).mkdir()
    for name, file in (("step-0000005", "config.json"), ("step-0000009", "tokenizer.model")):
        shutil.copytree(states / "step-0000002", states / name)
        (states / name / file).unlink()
    folder, state = train.newest_state(states)
    assert folder.name == "step-0000002" and state["step"] == 2
    train.save_state(states, 2, args, model, optimizer, {}, 5)
    assert sorted(folder.name for folder in states.iterdir()) == ["step-0000002", "step-0000005"]

    class Runs:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'was-run'}",)
    shutil.copytree(states / "step-0000005", states / "step-0000006")
    torch.save({"step": 6, "optimizer": Runs()}, states / "step-0000006" / "training.pt")
    assert train.newest_state(states)[0].name == "step-0000005" and not (tmp_path / "was-run").exists()

    def full(*what):
        raise RuntimeError("PytorchStreamWriter failed\nand more")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot be written: PytorchStreamWriter failed$"):
        train.save_state(states, 5, args, model, optimizer, {}, 6)
    assert sorted(folder.name for folder in states.iterdir()) == ["step-0000002", "step-0000005"]


def told_to_stop_while_it_saves(*arguments):
    save = torch.save
    torch.save = lambda *what: (os.kill(os.getpid(), signal.SIGTERM), save(*what))
    train_main(*arguments)


def test_a_stopped_run_is_not_taken_for_another(command, forked, tmp_path, pages):
    """Without --resume it is not overwritten, and with it data, batch, seed or recipe may not have changed."""
    first = forked(*command(spoiled(pages, tmp_path, bad=3, total=200), steps=40), function=told_to_stop_while_it_saves)
    assert first.returncode == 2 and "--resume goes on" in first.stderr
    again = command(tmp_path / "spoiled.json", steps=40)
    refused(forked(*again), "there is a stopped run", "--resume")
    refused(forked(*again, "--resume", "--stage5-depth", 1), "has a stage 5 of 2 blocks")
    for change, said in ((["--batch", 8], "batch"), (["--recipe", "table12"], "parts"), (["--seed", 7], "seed"),
                         (["--resolution", 128], "resolution")):
        refused(forked(*again, "--resume", *change), said, "give the same")
    spoiled(pages, tmp_path, bad=2, total=200)
    refused(forked(*again, "--resume"), "data", "give the same")


def test_steps_without_a_finite_gradient_are_skipped(command, forked, tmp_path):
    """On two processes alike; ten in a row end the run, the state of before is left, and a lower lr goes on from it."""
    states = tmp_path / "runs" / "phase1.partial"
    arguments = [*map(str, command(steps=40)), "--dtype", "fp32", "--save-every", "3"]
    kill_at([*launcher(2), *arguments], tmp_path / "runs", [states / "step-0000003"])
    before = max(states.glob("step-*[0-9]"))
    done = forked(*arguments, "--resume", "--lr", 1e30, "--save-every", 1, processes=2)
    assert done.returncode != 0 and "10 steps in a row were skipped" in done.stderr, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs" / "phase1.metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped"] == lines[-11]["skipped"] + 10 and not lines[-1]["grad_norm"] <= train.EXPLODED
    assert max(states.glob("step-*[0-9]")) == before  # nothing of it was saved, nor what the first step made
    older = torch.load(before / "training.pt", weights_only=True)
    del older["compile"]  # as in a state from before there was --compile
    torch.save(older, before / "training.pt")
    done = forked(*arguments, "--resume", "--micro-batch", 1, "--compile", processes=2, function=without_kernels)
    assert done.returncode == 0 and f"from step {int(before.name[5:])} in" in done.stderr, done.stderr
    assert "had micro_batch 2, this one has 1" in done.stderr and "had compile False, this one has True" in done.stderr
    last = forked(*command(steps=11, out=tmp_path / "last"), "--dtype", "fp32", "--lr", 1e30)  # the last ten of all
    assert last.returncode == 2, last.stderr
    assert "10 steps in a row were skipped, their gradient norm was not finite or above 1000" in last.stderr
    assert "begin anew" in last.stderr and not (tmp_path / "last" / "phase1.partial").exists()
    assert max(losses(tmp_path / "runs")) < 10


def with_steps_skipped(*arguments, exploding=(4, 7)):
    """With step 7 comes a SIGTERM. On stdout is where the random numbers stand."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def clipped(*what):
        calls.append(len(calls) + 1)
        if calls[-1] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            print(torch.get_rng_state().tolist())
        return clip(*what) * (float("inf") if calls[-1] in exploding else 1)
    torch.nn.utils.clip_grad_norm_ = clipped
    train_main(*arguments)


def told_to_stop_after_a_step(*arguments):
    """Which takes two seconds."""
    update, clock = train.update, iter((1, 3))
    train.time = SimpleNamespace(time=lambda: next(clock))
    train.update = lambda *what: (update(*what), os.kill(os.getpid(), signal.SIGTERM),
                                  print(torch.get_rng_state().tolist()))[0]
    train_main(*arguments)


def test_states_are_saved_when_the_next_gradient_is_good(command, forked, tmp_path):
    """Later where it explodes; also at a stop, which ruined weights do not outlive."""
    arguments, states = [*command(steps=40), "--save-every", 3], tmp_path / "runs" / "phase1.partial"
    done = forked(*arguments, function=with_steps_skipped)
    assert done.returncode == 1 and "goes on from step 7" in done.stderr, done.stderr
    assert sorted(state.name for state in states.iterdir()) == ["step-0000004", "step-0000007"]
    lines = (tmp_path / "runs" / "phase1.metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["skipped"] for line in lines] == [0, 0, 0, 1, 1, 1, 2]
    random = done.stdout
    early = forked(*command(steps=40, out=tmp_path / "early"), function=partial(with_steps_skipped, exploding=(7, 8)))
    assert early.returncode == 1 and "goes on from step 7" in early.stderr, early.stderr  # there was no state before
    assert [state.name for state in (tmp_path / "early" / "phase1.partial").iterdir()] == ["step-0000007"]
    done = forked(*arguments, "--resume", "--lr", 1e30, function=told_to_stop_after_a_step)
    assert random and set(done.stdout.splitlines()) == set(random.splitlines())  # stage 5's first weights took some
    assert done.returncode == 1 and "stopped at step 8 of 40" in done.stderr, done.stderr
    assert "goes on from step 7" in done.stderr
    assert "28/160" in done.stderr and "32/160" in done.stderr and "loss=" in done.stderr  # samples of all 40 steps
    line = json.loads((tmp_path / "runs" / "phase1.metrics.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 8 and line["samples_per_s"] == 2  # of this run's one step


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=needs_torch_2_7)])
def test_compiled_training_equals_the_other(command, forked, mixtures, tmp_path, parallel):
    """Phase 2 on two processes, with and without images: float32 losses within 1e-5."""
    prepared = forked(*command(mixtures / "two.json", mixtures, steps=1, out=tmp_path / "before"))
    assert prepared.returncode == 0, prepared.stderr
    for out, more in ((tmp_path / "other", []), (tmp_path / "compiled", ["--compile"])):
        done = forked(*command(mixtures / "both.json", mixtures, steps=4, phase=2, out=out), "--init",
                      tmp_path / "before" / "phase1", "--dtype", "fp32", "--parallel", parallel, *more,
                      processes=2, function=without_kernels)
        assert done.returncode == 0, done.stderr
        assert "_limit" not in done.stderr  # torch's warning that further programs are not compiled
    assert losses(tmp_path / "other", 2) == pytest.approx(losses(tmp_path / "compiled", 2), rel=1e-5)


def test_blocks_are_compiled_to_one_program_a_stage_for_all_sizes(command, parsed, monkeypatch):
    torch._dynamo.reset(), counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for more in ([], ["--compile"]):
        model, *_ = train.prepare(parsed(*command()[1:], "--dtype", "fp32", *more), None)
        blocks = *model.llama.layers, *(block for stage in model.vision.stages for block in stage.blocks)
        assert all((block._compiled_call_impl is not None) == bool(more) for block in blocks)
    model.requires_grad_()
    for images, side, length in ((2, 256, 5), (3, 320, 9), (3, 512, 12)):
        model.vision(torch.zeros(images, 3, side, side)).sum().backward()
        model.llama(torch.zeros(images, length, dtype=torch.long)).sum().backward()
    assert not counters["graph_break"] and not torch._dynamo.config.optimize_ddp
    assert counters["stats"]["unique_graphs"] == 1 + len(model.vision.stages) + 1  # the trial's, and the layers'


def test_without_a_compiler_compiling_is_refused(model, monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler\nand more")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match="^--compile does not work here, leave it out: no compiler$"):
        train.compile_blocks(model, SimpleNamespace(device="cpu"))


@pytest.mark.parametrize("rank, device", [(0, "cpu"), (1, "meta")])
def test_one_process_alone_reads_what_will_be_sharded(command, parsed, monkeypatch, rank, device):
    monkeypatch.setenv("RANK", str(rank)), monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "shard", lambda model, args: model)
    model, *_ = train.prepare(parsed(*command()[1:], "--parallel", "fsdp"), None)
    assert {parameter.device.type for parameter in model.parameters()} == {device}


def test_tied_embeddings_are_not_sharded():
    tied = SimpleNamespace(llama=Llama(small_config(tie_word_embeddings=True)))
    with pytest.raises(ValueError, match="does not support tied embeddings: use --parallel ddp"):
        train.shard(tied, SimpleNamespace())


def with_angles_in_float32(*command):
    """train.py's main, which fails where the Llama's layers are given rounded angles."""
    rotate = llama.rotate

    def checked(x, *angles):
        assert {angle.dtype for angle in angles} == {torch.float32}
        return rotate(x, *angles)
    llama.rotate = checked
    train_main(*command)


@needs_torch_2_7
def test_sharded_training_equals_ddp(command, forked, mixtures, tmp_path):
    """Phase 2 on two processes: fp32 losses within 1e-5, weights saved in bfloat16 within 1e-2 of each tensor's
    largest; bf16 losses within 2%. The checkpoint's files and names are the same, and a stopped run goes on."""
    prepared = forked(*command(mixtures / "two.json", mixtures, steps=1, out=tmp_path / "before"))
    assert prepared.returncode == 0, prepared.stderr
    found = {}
    for parallel in ("ddp", "fsdp"):
        for dtype in ("fp32", "bf16"):
            out = tmp_path / parallel / dtype
            start = command(mixtures / "both.json", mixtures, steps=4, phase=2, out=out)
            done = forked(*start, "--init", tmp_path / "before" / "phase1", "--parallel", parallel, "--dtype", dtype,
                          "--micro-batch", 1, "--checkpointing", "--save-every", 3, processes=2,
                          function=with_angles_in_float32)
            assert done.returncode == 0, done.stderr
            saved = out / "phase2"
            tensors = load_file(saved / "model.safetensors") | load_file(saved / "vision_tower" / "model.safetensors")
            files = sorted(str(file.relative_to(saved)) for file in saved.rglob("*"))
            found[parallel, dtype] = losses(out, 2), tensors, files
    for dtype, tolerance in (("fp32", 1e-5), ("bf16", 0.02)):
        (losses_a, a, files_a), (losses_b, b, files_b) = found["ddp", dtype], found["fsdp", dtype]
        assert losses_a == pytest.approx(losses_b, rel=tolerance) and files_a == files_b and a.keys() == b.keys()
    a, b = found["ddp", "fp32"][1], found["fsdp", "fp32"][1]
    assert all((a[key] - b[key]).abs().max() <= 1e-2 * a[key].abs().max() for key in a)


@needs_torch_2_7
def test_sharded_run_is_resumed_to_the_bit(command, forked, mixtures, tmp_path):
    """On as many processes; on one, which is said, its losses are within 1% in bfloat16."""
    for name, stop in (("whole", None), ("cut", 2)):
        arguments = [*command(mixtures / "two.json", mixtures, steps=6, out=tmp_path / name), "--parallel", "fsdp",
                     "--save-every", 2]
        if stop:
            kill_at([*launcher(2), *map(str, arguments)], tmp_path / name,
                    [tmp_path / name / "phase1.partial" / "step-0000002"])
            arguments.append("--resume")
            shutil.copytree(tmp_path / "cut", tmp_path / "alone")
        done = forked(*arguments, processes=2)
        assert done.returncode == 0, done.stderr
    done = forked(*command(mixtures / "two.json", mixtures, steps=6, out=tmp_path / "alone"), "--resume")
    assert done.returncode == 0 and "had world 2, this one has 1" in done.stderr, done.stderr
    assert losses(tmp_path / "alone") == pytest.approx(losses(tmp_path / "whole"), rel=1e-2)
    a, b = (load_file(tmp_path / d / "phase1" / "vision_tower" / "model.safetensors") for d in ("whole", "cut"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_rank_that_dies_ends_the_job(command, tmp_path):
    """One of two processes is killed: the other does not wait for it."""
    process = subprocess.Popen([*launcher(2), *map(str, command(steps=5000))], cwd=ROOT, env=ENVIRONMENT,
                               stderr=subprocess.PIPE, text=True)
    metrics = tmp_path / "runs" / "phase1.metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.01)
    kill(tmp_path / "runs", only="RANK=1")
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and "SIGKILL" in errors, errors


def test_an_error_that_was_not_foreseen_ends_the_data_processes_too(command):
    """Python waits for them as it ends, and they heed no other's SIGTERM."""
    done = run("-c", "import train; train.update = None; train.main()", *command()[1:], "--workers", 1)
    assert done.returncode == 1 and "TypeError" in done.stderr, done.stderr


def test_an_error_on_several_processes_ends_the_job_with_its_sentence(command, pages, tmp_path):
    entries = json.loads((pages / "captions.json").read_text())
    (tmp_path / "gone.json").write_text(json.dumps([entry | {"image": "gone.jpg"} for entry in entries]))
    done = run(*command(tmp_path / "gone.json"), processes=2)
    assert done.returncode != 0 and "train.py: no sample can be read" in done.stderr, done.stderr
    assert done.stderr.index("no sample can be read") < done.stderr.index("ChildFailed")


def spoiled(pages, folder, bad, total):
    entries = (json.loads((pages / "captions.json").read_text()) * 20)[:total]
    entries = [entry | {"image": "gone.jpg"} if i < bad else entry for i, entry in enumerate(entries)]
    (folder / "spoiled.json").write_text(json.dumps(entries))
    return folder / "spoiled.json"


def save_slowly(*arguments):
    save = torch.save
    torch.save = lambda *what: (time.sleep(2), save(*what))
    train_main(*arguments)


def test_unreadable_samples_are_counted_and_end_the_run_above_one_percent(command, forked, pages, tmp_path):
    done = forked(*command(spoiled(pages, tmp_path, bad=2, total=200), steps=100, batch=4))  # two epochs
    assert done.returncode == 0 and done.stderr.count("gone.jpg") == 4 and "4 unreadable samples" in done.stderr
    done = forked(*command(spoiled(pages, tmp_path, bad=3, total=200), steps=50, batch=4, out=tmp_path / "other"),
                  processes=2, function=save_slowly)  # no rank leaves, which ends the others, before all is written
    assert done.returncode == 2 and "3 samples could not be read, more than 1%" in done.stderr
    assert "Traceback" not in done.stderr
    lines = (tmp_path / "other" / "phase1.metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["unreadable"] <= 2  # the step that met the third was not made
    assert list((tmp_path / "other" / "phase1.partial").glob("step-*[0-9]/training.pt"))  # what was trained is kept
    assert not (tmp_path / "other" / "phase1").exists()


def test_wrong_arguments_are_one_sentence(command, parsed, ended, tmp_path):
    refused(run(*command(phase=2)), "run phase 1 first")
    options = lambda **changes: command(**changes)[1:]
    refused(ended(train.main, *options(data="gone.json")), "gone.json")
    refused(ended(train.main, *options(), "--vision", "gone.safetensors"), "gone.safetensors")
    refused(ended(train.main, *options(phase=2), "--init", ROOT / "data/nano/convllava-nano", "--stage5-depth", 3),
            "of 2 blocks")
    refused(ended(train.main, *options(batch=5), "--micro-batch", "2"), "--batch 5 does not divide", "4")
    refused(ended(train.main, *options(), "--resume"), "leave --resume out")
    refused(ended(train.main, *options(batch=960)), "do not fill one batch")
    refused(ended(train.main, *options(), "--resolution", 100), "multiple of 64")
    refused(ended(train.main, *options(), "--resolution", 6400), "visual tokens")
    files = ["--data", "a.json", "b.json", "--images", tmp_path]
    for wrong, said in ((["--seed", -1], "--seed is -1"), (["--workers", -1], "--workers is -1"),
                        (["--seed", 2 ** 32], "take 0 to 4294967295"), (["--workers", 1000], "take 0 to 999"),
                        (["--stage5-depth", 1000], "take 0 to 999"), (files, "one folder for each file"),
                        (["--images", tmp_path], "training needs --data"),
                        (["--val", __file__], "--val needs --images"),
                        (["--preset", "convllava-7b", "--evaluate", "any"], "--evaluate needs --val"),
                        (["--lr", "inf"], "--lr is inf"), (["--batch", 0], "--batch is 0"), (["--plan", 0], "--plan"),
                        (["--plan", 1, 140, 400, 1], "up to three numbers"),
                        (["--plan", 7], "--batch 8 does not divide .* on 7 processes: .* is 7"),
                        (["--recipe", "table12", "--stage5-depth", 3], "four stages"),
                        (["--first-stage", 2], "leave --first-stage out")):
        with pytest.raises(ValueError, match=said):
            parsed("--phase", 1, *wrong)
    assert parsed("--phase", 1, "--plan", 1, 2, 3, "--seed", 2 ** 32 - 1).plan == [1, 2, 3]
    asked = parsed("--phase", 3, "--evaluate", "any", "--val", __file__, "--images", tmp_path)
    assert asked.data is None and not asked.generated
    for one in ([], ["--vision", "gone"], ["--llm", "gone"]):
        refused(ended(train.main, "--phase", "1", "--preset", "convllava-7b", *one), "phase 1 starts from pretrained")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs" / "phase1").mkdir(parents=True)
    (tmp_path / "runs" / "phase1" / "notes.txt").write_text("mine")
    refused(ended(train.main, *options()), "holds other things")
    assert not list((tmp_path / "runs").glob("*metrics*"))  # before training


def test_a_full_gpu_is_one_sentence(command, ended, monkeypatch):
    def full(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee the documentation.")
    monkeypatch.setattr(train, "train", full)
    refused(ended(train.main, *command()[1:]), "memory is full", "--micro-batch", "--checkpointing")


def test_ctrl_c_before_the_first_step_is_no_traceback(command, ended, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train", interrupted)
    done = ended(train.main, *command()[1:])
    assert done.returncode == 130 and not done.stdout + done.stderr


def test_accumulation_on_two_processes_equals_one_batch(command, forked, tmp_path):
    """Losses of three steps within 1e-4: the sum of micro-batches in another order."""
    found = []
    for processes, micro in ((1, 8), (2, 2)):
        out = tmp_path / str(micro)
        done = forked(*command(batch=8, steps=3, out=out), "--micro-batch", micro, "--dtype", "fp32",
                      processes=processes)
        assert done.returncode == 0, done.stderr
        found.append(losses(out))
    assert found[0] == pytest.approx(found[1], rel=1e-4) and len(found[0]) == 3


def test_wrong_folders_and_files_are_named_before_training(command, ended, forked, pages, tmp_path):
    refused(ended(train.main, *command(images=tmp_path / "none")[1:]), "no image folder", "none")
    (tmp_path / "empty").mkdir()
    done = forked(*command(images=tmp_path / "empty"), "--workers", 1)
    assert done.returncode == 2 and "no sample can be read" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    refused(ended(train.main, *command()[1:], "--val", tmp_path / "none.json"), "no file of validation questions")
    refused(ended(train.main, "--phase", 3, "--val", pages / "val.json"), "--images")
    refused(ended(train.main, "--phase", 3, "--val", pages / "val.json", "--images", pages), "training needs --data")

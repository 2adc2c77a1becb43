"""What training computes in: the default type, frozen matrices in bf16, recomputation, compiled blocks."""
import time
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

import train
from conftest import run_of
from data.conversation import IGNORE, IMAGE_TOKEN


# ---- The default type ----
@pytest.mark.parametrize("bf16_seconds, fp32_seconds, faster", [
    ([9, 1, 1], [2, 2, 2], "bf16"), ([3, 3, 3], [9, 2, 2], "fp32"), ([1, 1, 1], [1, 1, 1], "fp32")])
def test_a_processor_computes_in_the_type_of_the_faster_matrix_product(
        monkeypatch, bf16_seconds, fp32_seconds, faster):
    """By the quickest of several, as the first has threads to start."""
    measured = iter([bf16_seconds, fp32_seconds])
    monkeypatch.setattr(train.timeit, "repeat", lambda *what, **how: next(measured))
    assert train.faster_dtype("cpu") == faster


def test_the_measurement_is_quick():
    """Some 50 ms; up to 5 s beside other programs."""
    start = time.perf_counter()
    assert train.faster_dtype("cpu") in ("bf16", "fp32")
    assert time.perf_counter() - start < 5


def test_a_gpu_computes_in_bf16_and_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(train, "timeit", None)
    assert train.faster_dtype("cuda:0") == "bf16"


def with_different_measurements():
    """Prints the type that a process computes in; fp32 is faster on the first, bf16 on the second."""
    rank, _, device = train.start_processes()
    measured = iter([2, 1] if rank == 0 else [1, 2])
    train.timeit.repeat = lambda *what, **how: [next(measured)]
    print(f"{rank} {train.faster_dtype(device)}", flush=True)
    dist.destroy_process_group()


def test_all_processes_compute_in_the_type_that_the_first_has_measured(forked):
    done = forked(processes=2, function=with_different_measurements)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["0 fp32", "1 fp32"]


@pytest.mark.parametrize("has_gpu, device", [(False, "cpu"), (True, "cuda:3")])
def test_a_process_computes_on_the_gpu_of_its_number_where_there_is_one(monkeypatch, has_gpu, device):
    for name, value in dict(RANK="0", LOCAL_RANK="3", WORLD_SIZE="1").items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert train.start_processes() == (0, 1, device)


@pytest.mark.parametrize("option, stopped, measured, dtype", [
    (None, None, "fp32", "fp32"), (None, None, "bf16", "bf16"), ("bf16", None, "fp32", "bf16"),
    (None, "bf16", "fp32", "bf16"), ("fp32", "bf16", "bf16", "fp32")])
def test_dtype_goes_before_the_stopped_runs_type_and_that_before_the_faster(
        options, monkeypatch, option, stopped, measured, dtype):
    state = {"changeable": {"dtype": stopped}} if stopped else None
    runs = []
    monkeypatch.setattr(train, "find_state", lambda *what, **how: (None, state))
    monkeypatch.setattr(train, "faster_dtype", lambda device: measured)
    monkeypatch.setattr(train, "train", lambda run, *start: runs.append(run))
    command = [*options(), "--dtype", option] if option else options()
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, command)])
    train.main()
    assert [run.dtype for run in runs] == [dtype]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_autocast_is_on_in_bf16_alone(dtype):
    with run_of("--phase", 1, dtype=dtype).autocast():
        assert torch.is_autocast_enabled("cpu") == (dtype == "bf16")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


# ---- The model of a run ----
def prepared(*arguments, dtype="fp32"):
    """The model as a run trains it."""
    run = run_of(*arguments, dtype=dtype)
    model, *_ = train.prepare(run, train.find_data(run)[0])
    return model


def first_matrix(model, stage):
    """Of a stage's first block."""
    return model.vision.stages[stage - 1].blocks[0].fc1.weight


@pytest.mark.parametrize("dtype, frozen", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_run_holds_frozen_matrices_in_its_type_and_trained_ones_in_float32(options, dtype, frozen):
    model = prepared(*options(), dtype=dtype)
    assert first_matrix(model, stage=1).dtype == model.llama.lm_head.weight.dtype == frozen
    assert first_matrix(model, stage=5).dtype == model.projector[0].weight.dtype == torch.float32


@pytest.mark.parametrize("option", [[], ["--checkpointing"]])
def test_every_part_recomputes_its_activations_where_told(options, option):
    model = prepared(*options(), *option)
    assert {part.checkpointing for part in (*model.vision.stages, model.llama)} == {bool(option)}


# ---- Loss and gradients ----
def batch_of(kind):
    """A batch without images, with one in each sample, or with none, one and two: (ids, images, labels)."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 768, (length,), generator=generator) for length in (12, 9, 15, 11)]
    num_images = {"text": (0, 0, 0, 0), "images": (1, 1, 1, 1), "mixed": (0, 1, 2, 0)}[kind]
    for row, number in zip(rows, num_images):
        row[1:1 + number] = IMAGE_TOKEN
    images = [torch.randn(3, 64, 64 + 64 * (i % 2), generator=generator) for i in range(sum(num_images))]
    labels = [torch.where(torch.arange(len(row)) > 5, row, IGNORE) for row in rows]
    return rows, images, labels


def gradients(model, kind, parts=((0, 4),), bf16=False, checkpointing=False):
    """Loss and gradient of a batch, taken in parts [(first sample, behind the last)]."""
    rows, images, labels = batch_of(kind)
    num_labels = sum(int((label[1:] != IGNORE).sum()) for label in labels)
    for part in (*model.vision.stages, model.llama):
        part.checkpointing = checkpointing
    model.zero_grad()

    loss, images = 0, iter(images)
    for start, end in parts:
        num_images = sum(int((row == IMAGE_TOKEN).sum()) for row in rows[start:end])
        images_of_part = [next(images) for _ in range(num_images)]
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            part = model(rows[start:end], images_of_part, labels[start:end], divisor=num_labels)
        part.backward()
        loss += part.item()
    return loss, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def distance(gradient, reference):
    """Of two gradients, as a share of the second's norm."""
    return ((gradient - reference).norm() / reference.norm()).item()


KINDS = pytest.mark.parametrize("kind", ["text", "images", "mixed"])


@KINDS
@pytest.mark.parametrize("bf16", [False, True])
def test_recomputed_activations_give_the_same(model, kind, bf16):
    """The gradient within 1e-6 of its norm, the loss within 1e-6."""
    loss, plain = gradients(model, kind, bf16=bf16)
    other_loss, recomputed = gradients(model, kind, bf16=bf16, checkpointing=True)
    assert distance(recomputed, plain) <= 1e-6
    assert other_loss == pytest.approx(loss, rel=1e-6)


@KINDS
def test_two_halves_of_a_batch_give_the_gradient_of_all(model, kind):
    """Within 1e-5 of its norm, the loss within 2e-6."""
    loss, plain = gradients(model, kind)
    other_loss, halves = gradients(model, kind, parts=((0, 2), (2, 4)))
    assert distance(halves, plain) <= 1e-5
    assert other_loss == pytest.approx(loss, rel=2e-6)


@KINDS
def test_bf16_is_close_to_float32(model, kind):
    """The gradient within 5% of its norm, the loss within 1%; not equal, as otherwise nothing was in bf16."""
    loss, plain = gradients(model, kind)
    other_loss, rounded = gradients(model, kind, bf16=True)
    assert 0 < distance(rounded, plain) <= 0.05
    assert other_loss == pytest.approx(loss, rel=0.01)


def test_frozen_matrices_in_bf16_change_nothing(model):
    """Autocast rounds them in any case: loss and gradients are equal to the bit."""
    train.freeze(model, train.RECIPES["table15"][0].trained)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rows, images, labels = batch_of("mixed")

    def loss_and_gradients():
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(rows, images, labels)
        loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in trained)]

    before = loss_and_gradients()
    train.frozen_to_bf16(model)
    after = loss_and_gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_only_frozen_matrices_are_stored_in_bf16(model):
    """Embeddings and norms, which autocast leaves alone, and what is trained stay in float32."""
    train.freeze(model, train.RECIPES["table15"][0].trained)
    train.frozen_to_bf16(model)
    assert first_matrix(model, stage=1).dtype == model.llama.lm_head.weight.dtype == torch.bfloat16
    assert first_matrix(model, stage=5).dtype == model.projector[0].weight.dtype == torch.float32
    assert model.llama.embed_tokens.weight.dtype == model.llama.norm.weight.dtype == torch.float32
    assert model.vision.stages[0].blocks[0].norm.weight.dtype == torch.float32


def test_tied_embeddings_stay_in_float32(model):
    """They are also looked up, which autocast does not round."""
    model.llama.lm_head.weight = model.llama.embed_tokens.weight
    train.freeze(model, train.RECIPES["table15"][0].trained)
    train.frozen_to_bf16(model)
    assert model.llama.embed_tokens.weight.dtype == torch.float32
    assert model.llama.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


# ---- What leaves a processor's autocast, as it is slow in bf16 there ----
def test_the_depthwise_convolution_leaves_autocast(model):
    """Its result is the one without autocast, to the bit."""
    convolution = model.vision.stages[1].blocks[0].conv_dw
    pixels = torch.randn(1, 12, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = convolution(pixels)
        of_rounded = convolution(pixels.bfloat16())
    assert torch.equal(inside, convolution(pixels))
    assert torch.equal(of_rounded, convolution(pixels.bfloat16().float()))


def test_attention_leaves_autocast(model):
    """Its result is the one without autocast, to the bit."""
    attend = partial(model.llama.layers[0].self_attn.attend, mask=None, causal=True)
    q, k, v = torch.randn(3, 1, 4, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = attend(q, k, v)
        of_rounded = attend(q.bfloat16(), k.bfloat16(), v.bfloat16())
    assert torch.equal(inside, attend(q, k, v))
    q, k, v = q.bfloat16().float(), k.bfloat16().float(), v.bfloat16().float()
    assert torch.equal(of_rounded, attend(q, k, v))


def test_without_autocast_a_bf16_model_computes_in_bf16(model):
    """As sampling does."""
    attention = model.llama.layers[0].self_attn
    q, k, v = torch.zeros(3, 1, 4, 5, 8, dtype=torch.bfloat16)
    assert attention.attend(q, k, v, mask=None, causal=True).dtype == torch.bfloat16
    convolution = model.vision.stages[1].blocks[0].conv_dw.bfloat16()
    assert convolution(torch.zeros(1, 12, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


# ---- --compile ----
@pytest.fixture
def without_kernels(monkeypatch):
    """Has torch.compile run its programs by torch's own operations: building kernels takes a minute."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


def blocks_of(model):
    return [*model.llama.layers, *(block for stage in model.vision.stages for block in stage.blocks)]


@pytest.mark.parametrize("option", [[], ["--compile"]])
def test_every_block_is_compiled_where_told(options, without_kernels, option):
    for block in blocks_of(prepared(*options(), *option)):
        assert (block._compiled_call_impl is not None) == bool(option)


def test_blocks_are_compiled_to_one_program_a_stage_for_all_sizes(options, without_kernels):
    """Besides the trial's there is one of each stage and one of the Llama's layers, each in one piece."""
    model = prepared(*options(), "--compile")
    model.requires_grad_()
    for num_images, side, length in ((2, 256, 5), (3, 320, 9), (3, 512, 12)):
        model.vision(torch.zeros(num_images, 3, side, side)).sum().backward()
        model.llama(torch.zeros(num_images, length, dtype=torch.long)).sum().backward()
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1 + len(model.vision.stages) + 1


def test_layers_are_not_cut_where_ddps_buckets_end(options, without_kernels):
    prepared(*options(), "--compile")
    assert not torch._dynamo.config.optimize_ddp


def test_without_a_compiler_compiling_is_refused(model, monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler\nand more")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(ValueError, match="^--compile does not work here, leave it out: no compiler$"):
        train.compile_blocks(model, "cpu")

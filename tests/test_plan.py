"""The plan's FLOPs, bytes and hours, against torch's counter, the allocator, counted storages and the paper."""
import argparse
import contextlib
import io
import json
import os
import re
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench
import convllava
import train
from conftest import needs_torch_2_7, refused, run_of, small_llama
from convllava import ConvLLaVA
from convnext import ConvNeXt, DepthwiseConv
from data.conversation import IGNORE, IMAGE_TOKEN
from llama import Attention, Llama, LlamaConfig
from plan import as_a_gpu_computes, flops, make_model, parameters_in_order, peak_bytes, state_bytes


# ---- FLOPs ----
@pytest.mark.parametrize("phase", [1, 2, 3])
def test_flops_are_what_torch_counts_in_the_real_model(model, phase):
    """Forward and backward of one image and 40 labelled tokens: equal.

    All but the backward pass of the convolutions, where torch takes a depthwise one for a dense one.
    """
    train.freeze(model, train.RECIPES["table15"][phase - 1].trained)
    side, text = 192, 40
    ids = torch.randint(3, 768, (text + 1,))
    ids[3] = IMAGE_TOKEN
    labels = ids.clone()
    labels[3] = IGNORE

    # count with torch
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = model([ids], [torch.randn(3, side, side)], [labels])
        forward = counter.get_total_flops()
        loss.backward()
    convolutions = counter.get_flop_counts()["Global"].get(torch.ops.aten.convolution_backward, 0)
    both = counter.get_total_flops() - convolutions

    # ours, without the convolutions' backward pass
    expected_forward, expected_both = map(sum, zip(*flops(model, side, text).values()))
    trained_before = False
    for _, parameter, positions in parameters_in_order(model, side, text):
        if parameter.dim() == 4:
            expected_both -= 2 * positions * parameter.numel() * (parameter.requires_grad + trained_before)
        trained_before = trained_before or parameter.requires_grad

    # the first token has no label, as nothing predicts it
    head = model.llama.lm_head.weight
    assert forward == expected_forward - 2 * head.numel()
    assert both == expected_both - 2 * head.numel() * (2 + head.requires_grad)


# ---- What is printed ----
def printed_plan(*options):
    """What `bench.py plan` prints: (its text, {name of a row: its columns})."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        bench.main(["plan", *map(str, options)])
    rows = {}
    for line in out.getvalue().splitlines():
        name, *columns = re.split(" {2,}", line)
        rows[name] = [float(column) if re.fullmatch(r"[\d.]+", column) else column for column in columns]
    return out.getvalue(), rows


@pytest.fixture(scope="module")
def paper_plan():
    """Phase 3 of the paper's model on 8 A800, each at 34% of its 312 TFLOP/s."""
    return printed_plan("--phase", 3, "--preset", "convllava-7b", "--gpus", 8, "--tflops", 106)


def test_phase_3_takes_the_papers_nine_hours(paper_plan):
    text, _ = paper_plan
    assert "1536x1536 pixels: 576 visual tokens, and 400 text tokens" in text
    assert "665,000 samples on 8 GPUs" in text
    hours = float(re.search(r"([\d.]+) hours", text)[1])
    assert hours == pytest.approx(9, rel=0.1)


def test_plan_counts_the_papers_model(paper_plan):
    _, rows = paper_plan
    parts = ["stage 1", "stage 2", "stage 3", "stage 4", "stage 5", "projector", "language model"]
    assert rows["part"] == ["trained", "frozen", "forward", "training", "(millions; TFLOPs a sample)"]
    assert rows["language model"][:2] == pytest.approx([6738.4, 0], abs=0.1)  # Vicuna-7B
    assert rows["together"][1] == pytest.approx(669, abs=1)  # the ConvNeXt
    assert rows["stage 4"][2] == rows["stage 4"][3]  # frozen, as is all before it: no backward pass
    assert [sum(column) for column in zip(*(rows[part] for part in parts))] == pytest.approx(rows["together"], abs=0.05)


def test_plan_of_ddp_holds_everything_on_each_gpu(paper_plan):
    text, rows = paper_plan
    weights, gradients, optimizer, gathered, *_ = rows["ddp"]
    assert " ".join(rows["GB per GPU"]) == "weights gradients optimizer gathered activations together"
    assert weights == pytest.approx(4 * 6.768 + 2 * 0.669, rel=0.01)  # float32, and frozen matrices in bf16
    assert optimizer == gradients == pytest.approx(8 * 6.768, rel=0.01)  # DDP's two copies, as it accumulates
    assert gathered == 0
    assert "a micro-batch of 4 a GPU" in text


def test_plan_of_fsdp_shards_and_gathers(paper_plan):
    _, rows = paper_plan
    weights, gradients, optimizer, gathered, *_ = rows["fsdp on 8"]
    assert [weights, gradients, optimizer] == pytest.approx([4 * 7.437 / 8, 4 * 6.768 / 8, 8 * 6.768 / 8], rel=0.01)
    # in bf16: what lies outside the layers and its gradients, a layer and its gradients, and the next layer
    layer = 0.20238
    assert gathered == pytest.approx(2 * (2 * (6.768 - 32 * layer) + 3 * layer), abs=0.02)


@pytest.mark.parametrize("way", ["ddp", "fsdp on 8"])
def test_checkpointing_halves_the_activations_at_least(paper_plan, way):
    _, rows = paper_plan
    plain, checkpointing = rows[way], rows[way + ", checkpointing"]
    assert sum(plain[:5]) == pytest.approx(plain[5], abs=0.03)
    assert plain[:4] == checkpointing[:4]
    assert plain[4] > 2 * checkpointing[4]


@pytest.mark.parametrize("options, gradients, gathered", [
    (("--gpus", 1, "--micro-batch", 8), 0.01, None),  # nobody to exchange gradients with
    (("--gpus", 2, "--micro-batch", 8), 0.01, 0.00),  # nothing to sum
    (("--gpus", 2, "--micro-batch", 4), 0.02, 0.00),
    (("--gpus", 2, "--micro-batch", 8, "--dtype", "fp32"), 0.01, 0.01)])
def test_plan_knows_what_is_summed_and_gathered(options, gradients, gathered):
    """Of the small model's 2.7M trained parameters, in GB."""
    text, rows = printed_plan("--phase", 3, "--batch", 16, *options)
    assert "\n10,400 samples on" in text  # 650 steps of 16
    assert rows["ddp"][1] == gradients
    assert "fsdp on 1" not in rows
    assert rows.get("fsdp on 2", [None] * 4)[3] == gathered


def test_plan_of_another_language_model(backbones):
    _, rows = printed_plan("--phase", 3, "--llm", backbones / "llm")
    size = sum(parameter.numel() for parameter in small_llama().parameters())
    assert rows["language model"][0] == pytest.approx(size / 1e6, abs=0.01)


def test_four_stages_are_planned_at_768_pixels():
    run = run_of("--phase", 2, "--recipe", "table13", "--preset", "convllava-7b")
    model = make_model(run)
    assert model.vision.depths == [3, 3, 27, 3]
    assert model.resolution == 768


def test_what_does_not_fit_is_refused_in_a_sentence(ended):
    refused(ended(bench.main, "plan", "--phase", 3, "--resolution", 100), "multiple of 64")
    refused(ended(bench.main, "plan", "--phase", 3, "--text", 1985), "room for 1984 beside the visual tokens")
    text, _ = printed_plan("--phase", 3, "--text", 1984)
    assert "1984 text tokens" in text


# ---- What a GPU computes in which type ----
def test_types_are_a_gpus_and_then_a_processors_again():
    model = make_model(run_of("--phase", 3, dtype="bf16"))
    block = model.vision.stages[0].blocks[0]
    attention = model.llama.layers[0].self_attn
    assert block.fc1.weight.dtype == torch.bfloat16  # frozen
    originals = DepthwiseConv.forward, Attention.attend, nn.LayerNorm.forward

    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", torch.bfloat16):
        block.to_empty(device="cpu")
        image = torch.empty(1, 24, 8, 8, dtype=torch.bfloat16)
        query = torch.empty(1, 4, 8, 48, dtype=torch.bfloat16)

        def types():
            outputs = (block.conv_dw(image), attention.attend(query, query, query, None, True),
                       block.norm(image.permute(0, 2, 3, 1)))
            return [output.dtype for output in outputs]

        with as_a_gpu_computes():
            assert types() == [torch.bfloat16, torch.bfloat16, torch.float32]
        assert types() == [torch.float32, torch.float32, torch.bfloat16]
    assert originals == (DepthwiseConv.forward, Attention.attend, nn.LayerNorm.forward)


# ---- Bytes: a small model's, against the allocator ----
def compare(forked, function, cases, tolerance):
    """Compares the bytes that `function` prints for each case, measured and planned; two cases run at a time."""
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda case: forked(case, function=function), cases)
        for case, done in zip(cases, results):
            assert done.returncode == 0, done.stderr
            measured, planned = json.loads(done.stdout.splitlines()[-1])
            assert planned == pytest.approx(measured, rel=tolerance), case


class Case(NamedTuple):
    phase: int
    checkpointing: bool
    dtype: torch.dtype = torch.bfloat16
    batch: int = 2
    side: int = 256  # pixels
    text: int = 200  # tokens
    vocabulary: int = 1000
    # Where weights take the most, the peak can lie in a convolution's gradient, for which oneDNN takes up to 19 MB of
    # scratch that no plan knows. Elsewhere the peak lies in the language model.
    onednn: bool = True


def small_model(case):
    vision = ConvNeXt((1, 1, 3, 2, 2), (24, 48, 96, 192, 384))
    model = ConvLLaVA(vision, Llama(LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4)))
    train.freeze(model, train.RECIPES["table15"][case.phase - 1].trained)
    if case.dtype == torch.bfloat16:
        train.frozen_to_bf16(model)
    for part in (*model.vision.stages, model.llama):
        part.checkpointing = case.checkpointing
    return model.train()


def measure(case):
    """Prints the most bytes that steps of a small model allocate, and what is planned for them.

    On several processes it is DDP, over two micro-batches a step.
    """
    is_ddp = "WORLD_SIZE" in os.environ
    with torch.device("meta"):
        model = small_model(case)
    planned = sum(state_bytes(model, accumulating=is_ddp).values())
    planned += sum(peak_bytes(model, case.batch, case.side, case.text, case.dtype, case.checkpointing))

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        with torch.backends.mkldnn.flags(enabled=case.onednn):
            two_steps(case, is_ddp)
    print(json.dumps([peak_of(profiled), planned]))


def two_steps(case, is_ddp):
    """A step, and the backward pass of a second one, beside which the optimizer's moments exist."""
    model = small_model(case)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
    images = [torch.randn(3, case.side, case.side) for _ in range(case.batch)]
    ids = torch.randint(3, 1000, (case.text + 1,))
    ids[5] = IMAGE_TOKEN
    labels = ids.where(ids >= 0, torch.tensor(IGNORE))
    accumulation = 1
    if is_ddp:
        accumulation = 2
        torch.distributed.init_process_group("gloo")
        # Where gloo's thread frees the buffer in which rank 0 sends its weights, the profiler does not see it.
        nn.parallel.distributed._sync_module_states = lambda **settings: None
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)

    for step in range(2):
        for i in range(accumulation):
            model.require_backward_grad_sync = i + 1 == accumulation
            with torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == torch.bfloat16):
                loss = model([ids] * case.batch, images, [labels] * case.batch)
            loss.backward()
        if step == 0:
            optimizer.step()
            if is_ddp:  # one process keeps its gradients, as if the second step went on with them
                optimizer.zero_grad()


def peak_of(profiled):
    """The most bytes that were allocated at a time while torch's profiler recorded."""
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def test_bytes_are_what_the_allocator_counts(forked):
    """Within 5%: a phase that freezes most of the model and one that trains most of it."""
    compare(forked, measure, [Case(phase=1, checkpointing=False), Case(phase=2, checkpointing=False)], 0.05)


def test_bytes_with_checkpointing_are_what_the_allocator_counts(forked):
    """Within 5%, in float32 too, of which autocast makes no copies."""
    compare(forked, measure, [
        Case(phase=2, checkpointing=True),
        Case(phase=2, checkpointing=True, dtype=torch.float32, batch=1, side=64, text=20, onednn=False)], 0.05)


def test_bytes_of_the_loss_are_what_the_allocator_counts(forked):
    """Within 5%, where the logits of a large vocabulary take the most."""
    compare(forked, measure, [Case(phase=1, checkpointing=False, side=64, vocabulary=16_000)], 0.05)


def test_bytes_of_ddp_are_what_the_allocator_counts(forked):
    """Within 5%, where weights, autocast's copies of them, gradients and DDP's buckets take the most."""
    case = Case(phase=2, checkpointing=True, batch=1, side=64, text=20, onednn=False)
    compare(partial(forked, processes=2), measure, [case], 0.05)


# ---- Bytes: at full size, against counted storages ----
class Storages(TorchDispatchMode):
    """Counts the bytes of the storages that exist, and the most at a time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.bytes, self.peak = {}, 0, 0
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage, size):  # how FSDP frees what it gathered
            resize(storage, size)
            self.set(storage._cdata, size)
        torch.UntypedStorage.resize_ = resize_and_count

    def set(self, key, size):
        self.bytes += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    def remove(self, key):
        self.set(key, 0)
        del self.sizes[key]

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a sharded one
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.set(storage._cdata, storage.nbytes())
                weakref.finalize(storage, self.remove, storage._cdata)
        return result


class FullSize(NamedTuple):
    phase: int
    resolution: int
    batch: int
    checkpointing: bool
    text: int
    gpus: int = 0  # of FSDP; 0: DDP


def measure_full_size(case):
    """Prints the most bytes of a micro-batch of ConvLLaVA-7B on tensors without memory, and what is planned for it."""
    # FSDP stores all weights in float32
    run = run_of("--phase", case.phase, "--preset", "convllava-7b", "--resolution", case.resolution,
                 dtype="fp32" if case.gpus else "bf16")
    model = make_model(run).train()
    for part in (*model.vision.stages, model.llama):
        part.checkpointing = case.checkpointing

    with as_a_gpu_computes():
        planned = sum(state_bytes(model, case.gpus).values())
        planned += sum(peak_bytes(model, case.batch, case.resolution, case.text, torch.bfloat16, case.checkpointing,
                                  sharded=case.gpus > 0))
        if case.gpus:
            model = shard_without_processes(model, case.gpus)
        leave_values_out(case.text)
        with FakeTensorMode(allow_non_fake_inputs=True), Storages() as storages:
            model.to_empty(device="cpu")
            run_micro_batch(model, case)
    print(json.dumps([storages.peak, planned]))


def shard_without_processes(model, gpus):
    """The model as train.py shards it, where the other processes and their answers are only pretended."""
    from torch.distributed._tools import fake_collectives  # noqa: F401  # torch 2.7 to 2.10 need it for all-gather
    from torch.testing._internal.distributed.fake_pg import FakeStore
    torch.distributed.init_process_group("fake", rank=1, world_size=gpus, store=FakeStore())
    make_mesh = train.init_device_mesh
    train.init_device_mesh = lambda device, shape: make_mesh("cpu", shape)
    train.set_model_state_dict = lambda *args, **settings: None
    return train.shard(model, argparse.Namespace(rank=1, world=gpus, device="meta", dtype="bf16"))


def leave_values_out(text):
    """Replaces splicing and the choice of labelled positions, which ask for values: a text follows every image."""
    def splice(embed_tokens, input_ids, visual_tokens, labels):
        rows = [torch.cat((visual.to(embed_tokens.weight.dtype), embed_tokens(ids)))
                for ids, visual in zip(input_ids, visual_tokens)]
        return rows, input_ids

    def next_token_loss(llama, hidden, targets, divisor):
        hidden = hidden[:, -text - 1:-1].flatten(0, 1)  # (B, T, C) -> (B * text, C)
        return convllava.sum_of_losses(llama.lm_head, hidden, targets.flatten())
    convllava.splice, convllava.next_token_loss = splice, next_token_loss


def run_micro_batch(model, case):
    """Forward and backward, beside gradients of a micro-batch before and the optimizer's moments."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)

    # a step, in groups: the time of sharded tensors' dispatch grows with the square of a list's length
    groups = [trained[i:i + 20] for i in range(0, len(trained), 20)]
    for group in groups:
        nn.utils.clip_grad_norm_(group, 1.0)
    optimizer = torch.optim.AdamW([dict(params=group) for group in groups], weight_decay=0, fused=True)
    optimizer.step()

    ids = [torch.empty(case.text, dtype=torch.long) for _ in range(case.batch)]
    images = [torch.empty(3, case.resolution, case.resolution) for _ in range(case.batch)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, images, ids)
    loss.backward()


def test_bytes_of_ddp_at_full_size(forked):
    """Within 6%."""
    compare(forked, measure_full_size, [FullSize(1, 1536, 4, False, text=1472),
                                        FullSize(2, 768, 4, True, text=400)], 0.06)


@needs_torch_2_7
def test_bytes_of_fsdp_at_full_size(forked):
    """Within 6%."""
    compare(forked, measure_full_size, [FullSize(2, 1536, 2, False, text=1472, gpus=8),
                                        FullSize(3, 1536, 4, True, text=1472, gpus=8),
                                        FullSize(1, 768, 1, True, text=400, gpus=2)], 0.06)

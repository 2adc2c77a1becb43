import json
import os
import re
import weakref
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import convllava
import train
from conftest import needs_torch_2_7, refused, small_llama
from convllava import ConvLLaVA
from convnext import CONVNEXT_L_DAGGER, ConvNeXt
from data.conversation import IGNORE, IMAGE_TOKEN
from data.plan import flops, matrices, peak_bytes, state_bytes
from llama import Llama, LlamaConfig


@pytest.mark.parametrize("parts", [train.RECIPES["table15"][phase][0] for phase in (1, 2, 3)])
def test_flops_are_what_torch_counts_in_the_real_model(model, parts):
    """Forward and backward of one image and 40 labelled tokens: equal.

    All but the backward pass of the convolutions, where torch takes a depthwise one for a dense one.
    """
    train.freeze(model, parts)
    side, text = 192, 40
    ids = torch.randint(3, 768, (text + 1,))
    ids[3] = IMAGE_TOKEN
    labels = ids.clone()  # all but the first, which nothing predicts
    labels[3] = -100
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        loss = model([ids], [torch.randn(3, side, side)], [labels])
        forward = counter.get_total_flops()
        loss.backward()
    both = counter.get_total_flops() - counter.get_flop_counts()["Global"].get(
        torch.ops.aten.convolution_backward, 0)
    ours, behind = [sum(column) for column in zip(*flops(model, side, text).values())], 0
    for _, parameter, positions in matrices(model, side, text):
        if parameter.dim() == 4:
            ours[1] -= 2 * positions * parameter.numel() * (parameter.requires_grad + behind)
        behind = max(behind, int(parameter.requires_grad))
    head = 2 * model.llama.lm_head.weight.numel()  # the first token has no label
    assert ours == [forward + head, both + head * (2 + model.llama.lm_head.weight.requires_grad)]


def tables(done):
    """The rows that a plan printed: {name: what follows in its columns}."""
    assert done.returncode == 0, done.stderr
    return {name: row for name, *row in (re.split(" {2,}", line) for line in done.stdout.splitlines())}


def test_plan_of_the_paper_model(forked):
    """Phase 3 at 1536: the paper's 9 hours on 8 A800, at the 34% of their 312 TFLOP/s that this comes to."""
    done = forked("train.py", "--phase", 3, "--preset", "convllava-7b", "--plan", 8, 106)
    rows = tables(done)
    assert rows["part"][:4] == ["trained", "frozen", "forward", "training"]
    assert " ".join(rows["GB per GPU"]) == "weights gradients optimizer gathered activations together"
    found = {name: [float(number) for number in row] for name, row in rows.items() if row and row[0][0].isdigit()}
    *parts, together = list(found.values())[:8]
    assert [sum(column) for column in zip(*parts)] == pytest.approx(together, abs=0.05)
    assert "576 visual tokens" in done.stdout
    assert found["language model"][:2] == pytest.approx([6738.4, 0], abs=0.1)  # Vicuna-7B
    assert found["together"][1] == pytest.approx(669, abs=1)
    assert found["stage 4"][2] == found["stage 4"][3]  # frozen, as is all before it: no backward pass
    assert found["together"][3] == pytest.approx(42, rel=0.05)  # TFLOPs a sample
    assert float(done.stdout.split(" hours")[0].split()[-1]) == pytest.approx(9, rel=0.1)
    weights, gradients, optimizer, gathered, *_ = found["ddp"]
    assert weights == pytest.approx(4 * 6.768 + 2 * 0.669, rel=0.01)  # fp32 masters, frozen matrices in bf16
    assert optimizer == gradients == pytest.approx(8 * 6.768, rel=0.01)  # of ddp's two copies, as it accumulates
    assert gathered == 0 and "a micro-batch of 4 a GPU" in done.stdout
    weights, gradients, optimizer, gathered, *_ = found["fsdp on 8"]
    assert [weights, gradients, optimizer] == pytest.approx([4 * 7.437 / 8, 4 * 6.768 / 8, 8 * 6.768 / 8], rel=0.01)
    # in bf16 what lies outside the layers and its gradients, a layer and its gradients, and the next layer
    layer = 0.20238
    assert gathered == pytest.approx(2 * (2 * (6.768 - 32 * layer) + 3 * layer), abs=0.02)
    for way in ("ddp", "fsdp on 8"):
        assert sum(found[way][:5]) == pytest.approx(found[way][5], abs=0.03)
        assert found[way][:4] == found[way + ", checkpointing"][:4]
        assert found[way][4] > 2 * found[way + ", checkpointing"][4]
    refused(forked("train.py", "--phase", 3, "--resolution", 100, "--plan"), "multiple of 64")
    big = "train.py", "--phase", 3, "--preset", "convllava-7b", "--plan", 8, 140
    refused(forked(*big, 1473), "room for 1472 beside the visual ones")
    assert forked(*big, 1472).returncode == 0


@pytest.mark.parametrize("options, gradients, gathered", [
    (("--plan", 1, "--batch", 16, "--micro-batch", 8), "0.01", None),  # it has no one to exchange them with
    (("--plan", 2, "--batch", 16, "--micro-batch", 8), "0.01", "0.00"),  # nothing to sum
    (("--plan", 2, "--batch", 16, "--micro-batch", 4), "0.02", "0.00"),
    (("--plan", 2, "--batch", 16, "--micro-batch", 8, "--dtype", "fp32"), "0.01", "0.01")])
def test_plan_knows_what_is_summed_and_gathered(forked, options, gradients, gathered):
    """Of 2.7M trained parameters, in GB."""
    rows = tables(forked("train.py", "--phase", 3, *options))
    assert rows["ddp"][1] == gradients and any(name.startswith("10,400 samples on") for name in rows)  # 650 steps of 16
    assert rows.get("fsdp on 2", [None] * 4)[3] == gathered and "fsdp on 1" not in rows


def test_plan_of_another_language_model(forked, backbones):
    rows = tables(forked("train.py", "--phase", 3, "--llm", backbones / "llm", "--plan"))
    assert rows["language model"][0] == f"{sum(p.numel() for p in small_llama().parameters()) / 1e6:.2f}"


def test_plan_is_of_what_a_gpu_computes(monkeypatch):
    """Norms in float32, and frozen matrices in bfloat16."""
    planned = []
    monkeypatch.setattr("sys.argv", ["train.py", "--phase", "1", "--plan"])
    monkeypatch.setattr(train, "print_plan", lambda model, args: planned.append(model))
    train.main()
    block = planned[0].vision.stages[0].blocks[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert block.norm(torch.empty(4, 24, dtype=torch.bfloat16, device="meta")).dtype == torch.float32
    assert block.fc1.weight.dtype == torch.bfloat16


def measure(checkpointing, phase, batch, side, text, bf16, vocabulary=1000):
    """Prints the allocator's peak in bytes over a step and the micro-batch after it, and what the plan says, for a
    small model; on several processes, with DDP, over two micro-batches before a step and two after."""
    parts = train.RECIPES["table15"][phase][0]
    make = lambda: ConvLLaVA(ConvNeXt((1, 1, 3, 2, 2), (24, 48, 96, 192, 384)), Llama(LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4)))
    with torch.device("meta"):
        planned = make()
    train.freeze(planned, parts)
    if bf16:
        train.slim(planned)
    train.leave_autocast(planned)  # as on processors: the workspace of their bf16 kernels is not for the plan to know
    autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    several = "WORLD_SIZE" in os.environ
    expected = sum(state_bytes(planned, accumulating=several).values()) + sum(peak_bytes(
        planned, batch, side, text, autocast, checkpointing))
    # nor is the scratch of oneDNN, up to 19 MB for the gradient of a convolution here
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, \
            torch.backends.mkldnn.flags(enabled=False):
        model = make().train()
        train.freeze(model, parts)
        if bf16:
            train.slim(model)
        train.leave_autocast(model)
        for part in (*model.vision.stages, model.llama):
            part.checkpointing = checkpointing
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], weight_decay=0)
        images, ids = [torch.randn(3, side, side) for _ in range(batch)], torch.randint(3, 1000, (text + 1,))
        ids[5] = IMAGE_TOKEN
        if several:
            torch.distributed.init_process_group("gloo")
            # rank 0's weights are not sent: where gloo's own thread frees their buffer, the profiler does not see it
            torch.nn.parallel.distributed._sync_module_states = lambda **what: None
            model = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        for micro in range(4 if several else 2):  # the last with the gradients of the one before and optimizer state
            model.require_backward_grad_sync = micro % 2
            with autocast():
                loss = model([ids] * batch, images, [ids.where(ids >= 0, torch.tensor(IGNORE))] * batch)
            loss.backward()
            if micro == several:  # after the first, DDP's after the second
                optimizer.step()
                if several:
                    optimizer.zero_grad()
    live = peak = 0
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    print(json.dumps([peak, expected]))


def compared(forked, function, cases, tolerance):
    """The bytes that `function` prints, measured and planned, for each case; two run at a time, a core each."""
    with ThreadPoolExecutor(2) as pool:
        for case, done in zip(cases, pool.map(lambda case: forked(*case, function=function), cases)):
            assert done.returncode == 0, done.stderr
            measured, planned = json.loads(done.stdout.splitlines()[-1])
            assert planned == pytest.approx(measured, rel=tolerance), case


def test_bytes_are_what_steps_take(forked):
    """In processes of their own, within 5%."""
    compared(forked, measure, [(False, 1, 2, 256, 200, True), (True, 1, 2, 256, 200, True),
                               (False, 2, 2, 256, 200, True), (True, 2, 2, 256, 200, True),
                               (True, 2, 1, 64, 20, True), (True, 2, 1, 64, 20, False),
                               (False, 1, 2, 64, 200, True, 16_000)], 0.05)  # the loss takes the most
    compared(partial(forked, processes=2), measure, [(True, 2, 1, 64, 20, True)], 0.05)


class Storages(TorchDispatchMode):
    """Counts the bytes of the storages that exist, and the most at a time."""

    def __init__(self):
        super().__init__()
        self.sizes, self.bytes, self.peak, resize = {}, 0, 0, torch.UntypedStorage.resize_

        def resized(storage, size):  # how fsdp frees what it gathered
            resize(storage, size)
            self.set(storage._cdata, size)
        torch.UntypedStorage.resize_ = resized

    def set(self, key, size):
        self.bytes += size - self.sizes.get(key, 0)
        self.sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            tensor = getattr(tensor, "_local_tensor", tensor)  # of a sharded one
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.set(storage._cdata, storage.nbytes())
                weakref.finalize(storage, lambda key: (self.set(key, 0), self.sizes.pop(key)), storage._cdata)
        return result


def full_size(phase, resolution, batch, checkpointing, gpus, text):
    """Prints the most bytes of a micro-batch of ConvLLaVA-7B on tensors without memory, and what the plan says.

    gpus: this is a rank of fsdp on so many; 0: of ddp. Of the model only `splice` and the choice of labelled positions
    are other code, since they depend on values.
    """
    autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    with torch.device("meta"):
        model = ConvLLaVA(ConvNeXt(**CONVNEXT_L_DAGGER), Llama(LlamaConfig())).train()
    train.freeze(model, train.RECIPES["table15"][phase][0])
    if not gpus:
        train.slim(model)
    train.norms_in_float32(model)
    for part in (*model.vision.stages, model.llama):
        part.checkpointing = checkpointing
    planned = sum(state_bytes(model, gpus).values()) + sum(peak_bytes(
        model, batch, resolution, text, autocast, checkpointing, torch.bfloat16 if gpus else None))
    # every sample is an image and then the text, all of it labelled
    convllava.splice = lambda embed_tokens, ids, visual, labels: (
        [torch.cat((v.to(embed_tokens.weight.dtype), embed_tokens(row))) for row, v in zip(ids, visual)], ids)
    convllava.next_token_loss = lambda llama, hidden, targets, divisor: convllava.sum_of_losses(
        llama.lm_head, hidden[:, -text - 1:-1].flatten(0, 1), targets.flatten())
    if gpus:
        from torch.distributed._tools import fake_collectives  # noqa: F401  # torch 2.7 to 2.10 need it for all-gather
        from torch.testing._internal.distributed.fake_pg import FakeStore
        torch.distributed.init_process_group("fake", rank=1, world_size=gpus, store=FakeStore())
        train.init_device_mesh, train.set_model_state_dict = partial(
            lambda make, device, shape: make("cpu", shape), train.init_device_mesh), lambda *args, **kwargs: None
        model = train.shard(model, Namespace(rank=1, world=gpus, device="meta", dtype="bf16"))
    with FakeTensorMode(allow_non_fake_inputs=True), Storages() as storages:
        model.to_empty(device="cpu")
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:  # of a micro-batch before
            parameter.grad = torch.empty_like(parameter)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer = torch.optim.AdamW(trained, weight_decay=0, fused=True)  # it keeps its state
        optimizer.step()
        ids = [torch.empty(text, dtype=torch.long) for _ in range(batch)]
        images = [torch.empty(3, resolution, resolution) for _ in range(batch)]
        with autocast():
            loss = model(ids, images, ids)
        loss.backward()
    print(json.dumps([storages.peak, planned]))


def test_bytes_at_full_size(forked):
    """A step on tensors without memory, within 6%."""
    compared(forked, full_size, [(1, 1536, 4, False, 0, 1472), (2, 768, 4, True, 0, 400)], 0.06)


@needs_torch_2_7
def test_sharded_bytes_at_full_size(forked):
    compared(forked, full_size, [(1, 768, 1, True, 2, 400), (1, 1536, 16, True, 8, 400), (2, 1536, 2, False, 8, 1472),
                                 (2, 1536, 8, True, 8, 1472), (3, 1536, 4, False, 8, 1472)], 0.06)

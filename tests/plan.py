"""What a phase costs, from the model's shapes alone: parameters, FLOPs, memory and hours.

    python tests/bench.py plan --phase 3 --preset convllava-7b --gpus 8 --tflops 140 --text 400
"""
import copy
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import train
from convllava import LOSS_CHUNK, ConvLLaVA
from convnext import CONVNEXT_L, NANO, ConvNeXt, DepthwiseConv
from data.images import check_resolution
from llama import Attention, Llama, LlamaConfig

BACKBONES = {"convllava-7b": CONVNEXT_L, "nano": NANO}  # the ConvNeXt that a preset's phase 1 starts from


# ---- The model ----
def make_model(run, layers=None, device="meta"):
    """A new model of the run's sizes, trained and frozen as in its phase; on "meta" it has shapes and no memory.

    layers: of the language model, where it should not have all.
    """
    preset = train.PRESETS[run.args.preset]
    resolution = run.resolution or (preset.resolution if run.stage5 else min(768, preset.resolution))
    with torch.device(device):
        vision = ConvNeXt(**BACKBONES[run.args.preset])
        if run.stage5:
            vision.add_stage(*run.stage5)
        model = ConvLLaVA(vision, Llama(llama_config(run, layers)), resolution=resolution)

    check_resolution(resolution, vision.compression, model.max_length)
    train.freeze(model, run.phase.trained)
    if run.dtype == "bf16":
        train.frozen_to_bf16(model)
    return model


def llama_config(run, layers=None):
    """The sizes of the run's language model: of --llm, or else of the small model's or Vicuna-7B."""
    folder = run.args.llm
    if not folder and run.args.preset == "nano":
        folder = train.NANO / "backbones" / "vicuna-nano"
    config = LlamaConfig.from_json(Path(folder) / "config.json") if folder else LlamaConfig()
    config.num_hidden_layers = layers or config.num_hidden_layers
    return config


@contextmanager
def as_a_gpu_computes():
    """Under a processor's autocast, uses the types that a GPU's would: a plan is of a GPU and is made on a processor.

    There a depthwise convolution and attention compute in bf16, and LayerNorm in float32.
    """
    norm = nn.LayerNorm.forward

    def norm_in_float32(self, x):
        with torch.autocast("cpu", enabled=False):
            return norm(self, x.float())

    def attend(self, q, k, v, mask, causal):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.grouped)

    with (patch.object(DepthwiseConv, "forward", nn.Conv2d.forward),
          patch.object(Attention, "attend", attend),
          patch.object(nn.LayerNorm, "forward", norm_in_float32)):
        yield


# ---- FLOPs ----
def parameters_in_order(model, resolution, text):
    """Every parameter in the order of its use, as (part, parameter, positions that it is multiplied with)."""
    rows = []
    for i, stage in enumerate(model.vision.stages):
        positions = (resolution // 2 ** (i + 2)) ** 2
        rows += [(f"stage {i + 1}", parameter, positions) for parameter in stage.parameters()]
    visual = positions  # the last stage's are the visual tokens
    rows += [("projector", parameter, visual) for parameter in model.projector.parameters()]

    llama, part = model.llama, "language model"
    rows += [(part, llama.embed_tokens.weight, 0)]
    rows += [(part, parameter, visual + text) for parameter in llama.layers.parameters()]
    return [*rows, (part, llama.norm.weight, 0), (part, llama.lm_head.weight, text)]


def flops(model, resolution, text=0):
    """FLOPs of one image and `text` tokens, each with a label: {part: [forward, forward and backward]}.

    A multiplication and its addition are two. The backward pass has as many again for the gradient of every trained
    matrix, and for that of its input where anything before it is trained.
    """
    counts, trained_before = {}, False
    for part, parameter, positions in parameters_in_order(model, resolution, text):
        forward = 2 * positions * parameter.numel() if parameter.dim() > 1 else 0
        row = counts.setdefault(part, [0, 0])
        row[0] += forward
        row[1] += forward * (1 + parameter.requires_grad + trained_before)
        trained_before = trained_before or parameter.requires_grad

    # attention's two products have no matrix; each has two inputs, whose gradients are two products
    tokens = (resolution // model.vision.compression) ** 2 + text
    attention = 4 * tokens ** 2 * model.llama.config.hidden_size * len(model.llama.layers)
    counts["language model"][0] += attention
    counts["language model"][1] += attention * (1 + 2 * trained_before)
    return counts


# ---- Memory ----
def num_parameters(module, trained_only=False):
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)


def state_bytes(model, gpus=None, accumulating=False):
    """Bytes per GPU of weights, gradients and optimizer: sharded over so many by FSDP, or of DDP.

    accumulating: each process of DDP sums several micro-batches, beside DDP's buckets, before it exchanges them.
    """
    num_trained = num_parameters(model, trained_only=True)
    if gpus:
        weights, gradients, optimizer = 4 * num_parameters(model), 4 * num_trained, 8 * num_trained
        return dict(weights=weights // gpus, gradients=gradients // gpus, optimizer=optimizer // gpus)
    weights = sum(parameter.nbytes for parameter in model.parameters())  # frozen matrices may be in bf16
    return dict(weights=weights, gradients=4 * num_trained * (1 + accumulating), optimizer=8 * num_trained)


def peak_bytes(model, batch, resolution, text, dtype, checkpointing, sharded=False):
    """The most that a micro-batch takes beside `state_bytes`: (bytes that FSDP gathers, bytes of activations).

    dtype: that autocast computes in, or FSDP where the model is sharded.
    """
    stages, projector_saved, layers = measure_blocks(model, batch, resolution, text, dtype, sharded)

    # FSDP gathers one unit after the other, and for the step's length what lies outside of them
    units = [*model.vision.stages, *model.llama.layers]
    size = dtype.itemsize if sharded else 0  # of a gathered weight
    weights = [size * num_parameters(unit) for unit in units]
    gradients = [size * num_parameters(unit, trained_only=True) for unit in units]
    outside_weights = size * num_parameters(model) - sum(weights)
    outside_gradients = size * num_parameters(model, trained_only=True) - sum(gradients)

    saved, moments = 0, []  # bytes for the backward pass so far; (gathered, activations) over time
    for i, blocks in enumerate([*stages, *layers]):
        if i == len(stages):
            saved += projector_saved

        # the unit's forward pass; with checkpointing only each block's input is saved
        gathered = outside_weights + weights[i]
        for block in blocks:
            saved += block.input if checkpointing and block.saved else block.saved
            moments.append((gathered, saved + block.passing))

        # its backward pass, when the units behind are done: gradients are there, and the unit before is gathered too
        largest = max(block.saved for block in blocks)
        if largest:
            gathered += outside_gradients + gradients[i] + (weights[i - 1] if i else 0)
            inside = largest // 2  # the gradients in a block are about half of what it saves
            if checkpointing:
                inside += largest
            moments.append((gathered, saved + inside))

    # the loss: in float32 the log-softmax of the logits, its gradient and that of the logits
    logits = min(batch * text, LOSS_CHUNK) * model.llama.config.vocab_size * 3 * 4
    if checkpointing and not sharded and dtype == torch.bfloat16:
        saved += 2 * num_parameters(model, trained_only=True)  # autocast's copies; else the blocks save them
    moments.append((outside_weights, saved + logits))
    return max(moments, key=sum)


class BlockBytes(NamedTuple):
    """What a block takes of memory."""
    input: int
    saved: int  # for the backward pass; 0 where nothing up to here is trained
    passing: int  # in its forward pass, of a block that saves nothing


def measure_blocks(model, batch, resolution, text, dtype, sharded):
    """(BlockBytes of each stage's blocks, bytes that the projector saves, BlockBytes of each layer, a list of one).

    The blocks run on fake tensors, which have a shape, a type and no memory. Of blocks that are alike only one runs.
    """
    fake = copy.deepcopy(model).to(dtype if sharded else None)
    measured = {}

    def run(block, x, *inputs):
        trained = tuple(parameter.requires_grad for parameter in block.parameters())
        alike = type(block), x.shape, x.stride(), x.dtype, x.requires_grad, trained
        if alike not in measured:
            y, saved = run_and_count(block, x, *inputs)
            passing = 0
            if not saved:  # it takes for a moment about what it would save if it were trained
                _, passing = run_and_count(block.requires_grad_(), x, *inputs)
            measured[alike] = y, BlockBytes(x.nbytes, saved, passing)
        return measured[alike]

    stages, layers = [], []
    with FakeTensorMode(allow_non_fake_inputs=True), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        fake.to_empty(device="cpu")
        x = torch.empty(batch, 3, resolution, resolution, dtype=dtype if sharded else None)
        for stage in fake.vision.stages:
            stages.append([])
            for block in (stage.downsample, *stage.blocks):
                x, block_bytes = run(block, x)  # (B, C, H, W)
                stages[-1].append(block_bytes)

        visual, projector_saved = run_and_count(fake.projector, x.flatten(2).transpose(1, 2))  # (B, N, hidden)
        words = fake.llama.embed_tokens(torch.empty(batch, text, dtype=torch.long))
        x = torch.cat((words, visual.to(words.dtype)), dim=1)  # (B, T, hidden)
        rotary = torch.empty(2, x.shape[1], fake.llama.config.head_dim).unbind()
        for layer in fake.llama.layers:
            x, block_bytes = run(layer, x, rotary, None)
            layers.append([block_bytes])
    return stages, projector_saved, layers


def run_and_count(module, *inputs):
    """A module's output, and the bytes that it saves for the backward pass beside its parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage  # stays alive, so that no other storage gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs)
    return output, sum(storage.nbytes() for storage in storages.values())


# ---- The tables ----
def print_plan(run, tflops, text):
    """Prints what the run's phase costs on run.world GPUs. Raises ValueError where the sizes do not fit together.

    tflops: TFLOP/s that each GPU does; text: tokens of a sample, each with a label.
    """
    model = make_model(run)
    visual = (model.resolution // model.vision.compression) ** 2
    if text > model.max_length - visual:
        raise ValueError(f"--text is {text}: a training sample has room for {model.max_length - visual} beside the "
                         "visual tokens")

    print(f"{model.resolution}x{model.resolution} pixels: {visual} visual tokens, and {text} text tokens, each with "
          "a label\n")
    training = print_work(model, text)
    with as_a_gpu_computes():
        print_memory(model, run, text)
    samples = run.steps * run.phase.batch if run.steps else run.phase.samples
    hours = samples * training / (run.world * tflops) / 3600
    print(f"{samples:,} samples on {run.world} GPUs at {tflops} TFLOP/s each: {hours:.1f} hours, nothing recomputed")


def print_work(model, text):
    """Prints parameters and FLOPs by part; returns the TFLOPs of a sample, forward and backward."""
    print(f"{'part':16s}{'trained':>12s}{'frozen':>12s}{'forward':>12s}{'training':>12s}   (millions; TFLOPs a sample)")
    totals = [0, 0, 0, 0]
    for part, (forward, training) in flops(model, model.resolution, text).items():
        rows = parameters_in_order(model, model.resolution, text)
        parameters = {id(parameter): parameter for name, parameter, _ in rows if name == part}  # tied ones once
        trained = sum(p.numel() for p in parameters.values() if p.requires_grad)
        frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
        numbers = trained / 1e6, frozen / 1e6, forward / 1e12, training / 1e12
        totals = [total + number for total, number in zip(totals, numbers)]
        print_work_row(part, numbers)
    print_work_row("together", totals)
    print()
    return totals[-1]


def print_work_row(name, numbers):
    trained, frozen, forward, training = numbers
    print(f"{name:16s}{trained:12.2f}{frozen:12.2f}{forward:12.4f}{training:12.4f}")


def print_memory(model, run, text):
    """Prints the GB that a GPU needs with DDP and FSDP, with and without checkpointing."""
    kinds = "weights", "gradients", "optimizer", "gathered", "activations", "together"
    print(f"{'GB per GPU':28s}" + "".join(f"{kind:>12s}" for kind in kinds))
    dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
    accumulating = run.world > 1 and run.accumulation > 1
    ways = {"ddp": state_bytes(model, accumulating=accumulating)}
    if run.world > 1:  # one GPU shards nothing
        ways[f"fsdp on {run.world}"] = state_bytes(model, run.world)

    for way, state in ways.items():
        for checkpointing in (False, True):
            peak = peak_bytes(model, run.micro_batch, model.resolution, text, dtype, checkpointing,
                              sharded=way != "ddp")
            numbers = [*state.values(), *peak]
            numbers.append(sum(numbers))
            name = way + (", checkpointing" if checkpointing else "")
            print(f"{name:28s}" + "".join(f"{number / 1e9:12.2f}" for number in numbers))
    print(f"gathered and activations: when they are most together, with a micro-batch of {run.micro_batch} a GPU\n")

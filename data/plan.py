"""What a phase costs, from the model's shapes alone: parameters, FLOPs, memory and hours."""
import copy

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from convllava import LOSS_CHUNK


def matrices(model, resolution, text):
    """Every parameter in the order of its use, as (part, parameter, positions that it is multiplied with)."""
    found = []
    for i, stage in enumerate(model.vision.stages):
        positions = (resolution // 2 ** (i + 2)) ** 2
        found += [(f"stage {i + 1}", p, positions) for p in stage.parameters()]
    found += [("projector", p, positions) for p in model.projector.parameters()]
    llama, language = model.llama, "language model"
    found += [(language, llama.embed_tokens.weight, 0)]
    found += [(language, p, positions + text) for p in llama.layers.parameters()]
    return found + [(language, llama.norm.weight, 0), (language, llama.lm_head.weight, text)]


def flops(model, resolution, text=0):
    """FLOPs of one image and `text` tokens, each with a label: {part: [forward, forward and backward]}.

    A multiplication and its addition are two. The backward pass has as many again for the gradient of every trained
    matrix, and for that of its input where anything before it is trained.
    """
    counts, behind = {}, 0
    for part, parameter, positions in matrices(model, resolution, text):
        forward = 2 * positions * parameter.numel() if parameter.dim() > 1 else 0
        row = counts.setdefault(part, [0, 0])
        row[0] += forward
        row[1] += forward * (1 + parameter.requires_grad + behind)
        behind = max(behind, int(parameter.requires_grad))
    tokens = (resolution // model.vision.compression) ** 2 + text
    attention = 4 * tokens ** 2 * model.llama.config.hidden_size * len(model.llama.layers)
    counts["language model"][0] += attention
    counts["language model"][1] += attention * (1 + 2 * behind)
    return counts


def kept(module, *inputs):
    """A module's output, and the bytes that it keeps for the backward pass beside its parameters."""
    own, storages = {p.untyped_storage()._cdata for p in module.parameters()}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage  # held, so that no other storage gets its address
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(*inputs)
    return output, sum(storage.nbytes() for storage in storages.values())


def activation_bytes(model, batch, resolution, text, device, autocast, dtype=torch.float32):
    """Most bytes at a time of a micro-batch's activations: with all of them kept, and with checkpointing.

    Every block runs on fake tensors, which have a shape, a type and a device, and no memory.
    """
    plain = recomputed = largest = 0

    def through(block, *inputs):
        nonlocal plain, recomputed, largest
        output, size = kept(block, *inputs)
        plain += size
        if size:  # it has a graph
            recomputed += inputs[0].nbytes
        largest = max(largest, size)
        return output

    fake = copy.deepcopy(model).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True), autocast():
        fake.to_empty(device=device)
        x = torch.empty(batch, 3, resolution, resolution, device=device, dtype=dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        for stage in fake.vision.stages:
            x = through(stage.downsample, x)
            for block in stage.blocks:
                x = through(block, x)
        visual = through(fake.projector, x.flatten(2).transpose(1, 2))
        words = fake.llama.embed_tokens(torch.empty(batch, text, device=device, dtype=torch.long))
        x = torch.cat((words, visual), dim=1)
        rotary = torch.empty(2, 1, 1, x.shape[1], fake.llama.config.head_dim, device=device).unbind()
        for layer in fake.llama.layers:
            x = through(layer, x, rotary, None)
    logits = min(batch * text, LOSS_CHUNK) * model.llama.config.vocab_size * (2 + 4 + 4)  # bf16, fp32, their softmax
    passing = largest // 2  # the gradients inside the block that the backward pass is at, about half of what it keeps
    # autocast keeps its bf16 copies of the trained weights to the forward pass's end; with all kept they are counted
    copies = 2 * sum(p.numel() for p in model.parameters() if p.requires_grad and dtype == torch.float32)
    return plain + passing + logits, recomputed + max(largest + passing, copies) + logits


def state_bytes(model, gpus, bf16=True):
    """Bytes per GPU beside the activations, by kind, for DDP and for FSDP on so many."""
    size = 2 if bf16 else 4
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    slim = sum(p.numel() for m in model.modules() if isinstance(m, nn.Linear)
               for p in m.parameters() if not p.requires_grad)  # frozen matrices
    units = [sum(p.numel() for p in unit.parameters()) for unit in (*model.vision.stages, *model.llama.layers)]
    ddp = dict(weights=4 * (whole - slim) + size * slim, gradients=4 * trained, optimizer=8 * trained, gathered=0)
    fsdp = dict(weights=4 * whole // gpus, gradients=4 * trained // gpus, optimizer=8 * trained // gpus)
    # what lies outside the units, two units at a time, and the gradients of one in both types
    return ddp, fsdp | dict(gathered=size * (whole - sum(units) + 2 * max(units)) + (size + 4) * max(units))


def print_plan(model, args, gpus, tflops, text):
    """The tables of `train.py --plan`. model: on the meta device, its parts frozen as the phase does."""
    visual = (model.resolution // model.vision.compression) ** 2
    print(f"{model.resolution}x{model.resolution} pixels: {visual} visual tokens, and {text} text tokens, each with "
          "a label\n")
    print(f"{'part':16s}{'trained':>12s}{'frozen':>12s}{'forward':>12s}{'training':>12s}   (millions; TFLOPs a sample)")
    counts, totals = flops(model, model.resolution, text), [0, 0, 0, 0]
    for part, (forward, training) in counts.items():
        mine = {id(p): p for name, p, _ in matrices(model, model.resolution, text) if name == part}.values()
        moving = sum(p.numel() for p in mine if p.requires_grad)
        row = moving / 1e6, sum(p.numel() for p in mine) / 1e6 - moving / 1e6, forward / 1e12, training / 1e12
        totals = [a + b for a, b in zip(totals, row)]
        print(f"{part:16s}{row[0]:12.2f}{row[1]:12.2f}{row[2]:12.4f}{row[3]:12.4f}")
    print(f"{'together':16s}{totals[0]:12.2f}{totals[1]:12.2f}{totals[2]:12.4f}{totals[3]:12.4f}\n")
    device, batch = args.device.split(":")[0], args.micro_batch
    kinds = ("weights", "gradients", "optimizer", "gathered", "activations", "together")
    print(f"{'GB per GPU':28s}" + "".join(f"{kind:>12s}" for kind in kinds))
    for name, state, dtype in zip(("ddp", f"fsdp on {gpus}"), state_bytes(model, gpus, args.dtype == "bf16"),
                                  (torch.float32, torch.bfloat16 if args.dtype == "bf16" else torch.float32)):
        sizes = activation_bytes(model, batch, model.resolution, text, device, args.autocast, dtype)
        for how, size in zip(("", ", checkpointing"), sizes):
            row = [*state.values(), size, size + sum(state.values())]
            print(f"{name + how:28s}" + "".join(f"{number / 1e9:12.2f}" for number in row))
    print(f"activations of a micro-batch of {batch} a GPU\n")
    hours = args.samples * totals[3] / (gpus * tflops) / 3600
    print(f"{args.samples:,} samples on {gpus} GPUs at {tflops} TFLOP/s each: {hours:.1f} hours, nothing recomputed")

"""What a phase costs, from the model's shapes alone: parameters, FLOPs, memory and hours."""
import copy

import torch
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


def peak_bytes(model, batch, resolution, text, autocast, checkpointing, gathered_as=None):
    """The most that a micro-batch takes beside `state_bytes`: (bytes that FSDP gathers, bytes of activations).

    gathered_as: the type that FSDP computes in; None for DDP. Every block runs on fake tensors, which have a shape
    and a type and no memory.
    """
    fake = copy.deepcopy(model).to(gathered_as)
    size = gathered_as.itemsize if gathered_as else 0  # of a gathered weight
    units = [*fake.vision.stages, *fake.llama.layers]  # FSDP gathers them one by one, and keeps what lies outside
    weights = [sum(p.numel() for p in unit.parameters()) for unit in units]
    trained = [sum(p.numel() for p in unit.parameters() if p.requires_grad) for unit in units]
    moving = sum(p.numel() for p in model.parameters() if p.requires_grad)
    outside, outside_trained = sum(p.numel() for p in model.parameters()) - sum(weights), moving - sum(trained)
    held, inputs, moments = 0, (), []  # bytes kept for the backward pass so far; (gathered, activations) over time
    seen = {}  # what a block gives, by what that depends on: of blocks that are alike one runs
    with FakeTensorMode(allow_non_fake_inputs=True), autocast():
        fake.to_empty(device="cpu")
        x = torch.empty(batch, 3, resolution, resolution, dtype=gathered_as)
        for i, unit in enumerate(units):
            if unit is fake.llama.layers[0]:
                visual, bytes_kept = kept(fake.projector, x.flatten(2).transpose(1, 2))
                held += bytes_kept
                words = fake.llama.embed_tokens(torch.empty(batch, text, dtype=torch.long))
                x = torch.cat((words, visual.to(words.dtype)), dim=1)
                inputs = torch.empty(2, x.shape[1], fake.llama.config.head_dim).unbind(), None  # angles, no mask
            gathered, largest = size * (outside + weights[i]), 0
            for block in [unit.downsample, *unit.blocks] if unit in fake.vision.stages else [unit]:
                before = x
                alike = (type(block), x.shape, x.stride(), x.dtype, x.requires_grad,
                         *(p.requires_grad for p in block.parameters()))
                if alike not in seen:
                    x, bytes_kept = kept(block, x, *inputs)
                    # a block without a graph takes for a moment about what it would keep with one
                    seen[alike] = x, bytes_kept, 0 if bytes_kept else kept(block.requires_grad_(), before, *inputs)[1]
                x, bytes_kept, passing = seen[alike]
                held += before.nbytes if checkpointing and bytes_kept else bytes_kept
                largest = max(largest, bytes_kept)
                moments.append((gathered, held + passing))
            if largest:  # then the unit's backward pass, for which gradients are there and the next unit is fetched
                gathered += size * (outside_trained + trained[i] + (weights[i - 1] if i else 0))
                inside = largest // 2 + (largest if checkpointing else 0)  # gradients in a block: half of what it keeps
                moments.append((gathered, held + inside))
        # in float32 the log-softmax, its gradient and that of the logits
        logits = min(batch * text, LOSS_CHUNK) * model.llama.config.vocab_size * 12
        if checkpointing and not gathered_as and torch.is_autocast_enabled("cpu"):
            held += 2 * moving  # autocast's copies of the weights, which without checkpointing the blocks keep
        moments.append((size * outside, held + logits))  # the loss
    return max(moments, key=sum)


def state_bytes(model, gpus=None, accumulating=False):
    """Bytes per GPU beside what `peak_bytes` counts, by kind: sharded over so many, or for DDP.

    accumulating: each process of DDP sums several micro-batches, beside DDP's buckets, before it exchanges them.
    """
    whole = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    weights = 4 * whole // gpus if gpus else sum(p.nbytes for p in model.parameters())
    return dict(weights=weights, gradients=4 * trained * (1 + accumulating) // (gpus or 1),
                optimizer=8 * trained // (gpus or 1))


def print_plan(model, args):
    """The tables of `train.py --plan`. model: on the meta device, its parts frozen as the phase does."""
    gpus, tflops, text = args.plan
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
    kinds = ("weights", "gradients", "optimizer", "gathered", "activations", "together")
    print(f"{'GB per GPU':28s}" + "".join(f"{kind:>12s}" for kind in kinds))
    computed = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    summed = gpus > 1 and args.accumulation > 1
    ways = (("ddp", state_bytes(model, accumulating=summed), None),
            (f"fsdp on {gpus}", state_bytes(model, gpus), computed))
    for name, state, gathered_as in ways[:gpus]:  # one GPU shards nothing
        for checkpointing in (False, True):
            row = [*state.values(), *peak_bytes(model, args.micro_batch, model.resolution, text, args.autocast,
                                                checkpointing, gathered_as)]
            print(f"{name + ', checkpointing' * checkpointing:28s}"
                  + "".join(f"{number / 1e9:12.2f}" for number in (*row, sum(row))))
    print(f"gathered and activations: when they are most together, with a micro-batch of {args.micro_batch} a GPU\n")
    hours = args.samples * totals[3] / (gpus * tflops) / 3600
    print(f"{args.samples:,} samples on {gpus} GPUs at {tflops} TFLOP/s each: {hours:.1f} hours, nothing recomputed")

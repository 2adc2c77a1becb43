"""Trains ConvLLaVA in the paper's three phases (section 4.1, figure 1c and tables 12 to 15).

    python train.py --phase 1        # projector initialisation, on the small model and its own data
    python train.py --phase 2        # vision-language pretraining, from what phase 1 wrote
    python train.py --phase 3        # instruction tuning
    torchrun --nproc_per_node 8 train.py --phase 1 --preset convllava-7b --resolution 1536 \\
        --vision open_clip_model.safetensors --llm vicuna-7b-v1.5 --data data/table15/phase1.json
    torchrun --nproc_per_node 8 train.py --phase 2 --preset convllava-7b --parallel fsdp
    python train.py --phase 2 --preset convllava-7b --plan
    python train.py --phase 3 --evaluate data/nano/convllava-nano
"""
import argparse
import gc
import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from contextlib import nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (StateDictOptions, get_model_state_dict, get_optimizer_state_dict,
                                                     set_model_state_dict, set_optimizer_state_dict)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from convllava import ConvLLaVA
from convnext import CONVNEXT_L, NANO, ConvNeXt
from data.conversation import IGNORE
from data.dataset import GroupedSampler, LlavaDataset, collate, read_mixture
from data.images import square
from data.nano.generate import FILES, generate
from data.plan import print_plan
from data.validation import validate
from data.weights import check_replaceable, replacing
from llama import Attention, Llama, LlamaConfig

HERE = Path(__file__).parent / "data"
STAGE5 = "vision.stages.4"
REST = ("projector", "llama")
STAGES_3_TO_5 = ("vision.stages.2", "vision.stages.3", STAGE5)
LAST_18_BLOCKS = (*(f"vision.stages.2.blocks.{i}" for i in range(12, 27)), "vision.stages.3")  # of ConvNeXt-L's 36
INSTRUCTIONS = REST, 2e-5, 128, 665_000  # every recipe's last phase
RECIPES = {  # tables 12 to 15, per phase: the parts that it trains, learning rate, global batch, samples
    "table15": {1: ((STAGE5, "projector"), 3e-4, 256, 2_000_000),
                2: ((*STAGES_3_TO_5, *REST), 2e-5, 256, 2_900_000), 3: INSTRUCTIONS},
    "table14": {1: ((STAGE5, "projector"), 3e-4, 256, 1_200_000),
                2: ((*STAGES_3_TO_5, *REST), 2e-5, 256, 1_200_000), 3: INSTRUCTIONS},
    "table13": {1: (("projector",), 1e-3, 256, 558_000),
                2: ((*LAST_18_BLOCKS, *REST), 2e-5, 256, 1_200_000), 3: INSTRUCTIONS},
    "table12": {1: (("projector",), 1e-3, 256, 558_000), 2: INSTRUCTIONS},
}
PRESETS = {  # sizes, and what differs from the recipe or the options' defaults, by phase
    "convllava-7b": dict(resolution=1536, vision=CONVNEXT_L, stage5=(6, 3072),
                         micro_batch=(4, 2, 4), workers=(4, 4, 4)),  # for 80 GB; phases 2 and 3 with fsdp on 8
    "nano": dict(resolution=512, vision=NANO, stage5=(2, 320),
                 lr=(2e-3, 8e-4, 8e-4), batch=(8, 8, 8), steps=(400, 1000, 650)),
}
WARMUP = 0.03  # of the steps; then a cosine to zero
UNREADABLE = 0.01  # of the samples: more of them stop the run
EXPLODED = 1000.0  # a gradient norm above this, or NaN, skips the step; gradients are clipped at a norm of 1
SKIPPED = 10  # such steps in a row stop the run
PATIENCE = timedelta(hours=1)  # of the other ranks while rank 0 writes or draws
# What may differ at --resume, which is said: all but lr change no more than the rounding
MAY_CHANGE = ("lr", "world", "parallel", "micro_batch", "compile")
STATES = "step-*[0-9]"  # saved states; one that is being written has another end
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def arguments():
    parser = argparse.ArgumentParser(description="Train ConvLLaVA in the paper's three phases.")
    parser.add_argument("--phase", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--recipe", choices=RECIPES, default="table15", help="the paper's table (default: table15)")
    parser.add_argument("--data", nargs="+", help="mixtures, see data/README.md, or with --images LLaVA-format JSON "
                        "files (default: data/RECIPE/phaseN.json; the small model's own)")
    parser.add_argument("--images", nargs="+", help="the image folder of each LLaVA-format file in --data")
    parser.add_argument("--val", help="a LLaVA-format JSON file to validate on; images in the first --images")
    parser.add_argument("--vision", help="ConvNeXt weights that phase 1 starts from")
    parser.add_argument("--llm", help="Llama folder that phase 1 starts from")
    parser.add_argument("--init", help="checkpoint that the phase starts from (default: the previous phase's)")
    parser.add_argument("--out", default="runs", help="folder for phase1, phase2, phase3 (default: runs)")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--stage5-depth", type=int, help="blocks of the new stage 5 (default: 6, the small model's 2); "
                        "0: four stages")
    parser.add_argument("--first-stage", type=int, choices=(2, 3, 4), help="first ConvNeXt stage that phase 2 trains")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch", type=int, help="global batch, whatever the number of processes")
    parser.add_argument("--micro-batch", type=int, help="samples per process at a time (default: 16; at full size "
                        "4, 2 and 4 by phase, for 80 GB, with fsdp on 8 in phases 2 and 3)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: one epoch; fewer for the small model)")
    parser.add_argument("--workers", type=int, help="data processes per rank (default: 1; 4 at full size)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="to compute in (default: bf16; fp32 on processors "
                        "without bf16 instructions, where bf16 is slower)")
    parser.add_argument("--parallel", choices=("ddp", "fsdp"), default="ddp", help="fsdp shards weights and optimizer")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: slower, less memory")
    parser.add_argument("--compile", action="store_true", help="fuse what is computed between matrix products, by "
                        "torch.compile: for GPUs; the first step takes about a minute")
    parser.add_argument("--save-every", type=int, default=250, help="steps between saved states (default: 250)")
    parser.add_argument("--keep", type=int, default=2, help="saved states to keep (default: 2)")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run, from its newest saved state")
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="only validate this checkpoint")
    parser.add_argument("--plan", nargs="*", type=int, metavar="N",
                        help="only print parameters, FLOPs, memory and hours, for GPUS, TFLOP/s of each and text "
                        "tokens of a sample (default: 8 140 400)")
    args = parser.parse_args()
    for name in ("lr", "batch", "micro_batch", "steps", "resolution", "save_every", "keep"):
        if (value := getattr(args, name)) is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it should be above 0")
    for name, most in dict(seed=2 ** 32 - 1, workers=999, stage5_depth=999).items():
        if not 0 <= (getattr(args, name) or 0) <= most:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}: take 0 to {most}")
    preset = PRESETS[args.preset]
    if args.phase not in RECIPES[args.recipe]:
        raise ValueError(f"--recipe {args.recipe} has no phase {args.phase}: its last is {max(RECIPES[args.recipe])}")
    args.parts, lr, batch, args.samples = RECIPES[args.recipe][args.phase]
    own = {name: preset[name][args.phase - 1] for name in ("lr", "batch", "steps", "micro_batch", "workers")
           if name in preset}
    for name, value in (dict(lr=lr, batch=batch, micro_batch=16, workers=1) | own).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    depth, dim = preset["stage5"]
    four = args.stage5_depth == 0 or args.recipe in ("table12", "table13")
    if four and args.stage5_depth:
        raise ValueError(f"--recipe {args.recipe} has four stages and trains no stage 5: leave --stage5-depth out")
    args.stage5 = None if four else (args.stage5_depth or depth, dim)
    if four:
        args.parts = tuple(part for part in args.parts if part != STAGE5)
    if args.plan is not None or (args.phase == 1 and not args.evaluate):  # else the checkpoint's; four stages: 768
        args.resolution = args.resolution or (min(768, preset["resolution"]) if four else preset["resolution"])
    if args.first_stage:
        if not any(part.startswith("vision.stages.3") for part in args.parts):
            raise ValueError(f"phase {args.phase} of {args.recipe} trains no stages 2 to 4: leave --first-stage out")
        args.parts = (*(f"vision.stages.{i}" for i in range(args.first_stage - 1, 4 if four else 5)), *REST)
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if args.plan is not None:
        if len(args.plan) > 3 or min(args.plan, default=1) < 1:
            raise ValueError("--plan takes up to three numbers above 0: GPUs, TFLOP/s of each, text tokens of a sample")
        args.plan += [8, 140, 400][len(args.plan):]
        args.world = args.plan[0]
    args.sharded = args.parallel == "fsdp" and args.world > 1
    gpu = torch.cuda.is_available() and args.plan is None  # a plan's model has shapes only
    args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if gpu else "cpu"
    args.dtype = args.dtype or ("bf16" if args.plan is not None or quick_in_bf16(args.device) else "fp32")
    bf16 = args.dtype == "bf16"
    args.autocast = lambda: torch.autocast(args.device.split(":")[0], torch.bfloat16) if bf16 else nullcontext()
    unit = args.world * (args.micro_batch if args.batch >= args.micro_batch * args.world else 1)
    args.micro_batch = min(args.micro_batch, max(1, args.batch // args.world))
    at_once = args.micro_batch * args.world
    if args.batch % at_once:
        raise ValueError(f"--batch {args.batch} does not divide into micro-batches of {args.micro_batch} on "
                         f"{args.world} processes: the nearest that does is "
                         f"{max(1, round(args.batch / unit)) * unit}")
    args.accumulation = args.batch // at_once
    if args.plan is None:
        find_data(args)
    return args


def quick_in_bf16(device):
    """Whether bf16 is worth while: a processor without instructions for it is slower in it than in float32."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported()


def find_data(args):
    """Settles where the phase's samples, validation questions and first weights are."""
    own = not (args.data or args.images or args.val)
    args.generated = own and args.preset == "nano"
    if own:
        args.data = [HERE / ("nano" if args.generated else args.recipe) / f"phase{args.phase}.json"]
    if args.generated:
        args.val = HERE / "nano" / "out" / ("val-instructions.json" if args.phase == 3 else "val-captions.json")
    if args.data and args.images is None:
        args.data, args.images = zip(*(pair for file in args.data for pair in read_mixture(file)))
    if args.data and len(args.images) != len(args.data):
        raise ValueError("--images needs one folder for each file in --data")
    if args.val and not args.images:
        raise ValueError("--val needs --images, the folder of its images")
    if args.val and not args.generated and not Path(args.val).is_file():
        raise ValueError(f"there is no file of validation questions at {args.val}")
    if args.evaluate and not args.val:
        raise ValueError("--evaluate needs --val and --images, the questions to ask and their images")
    if not (args.data or args.evaluate):
        raise ValueError("training needs --data too: LLaVA-format JSON files, one for each folder in --images")
    if args.preset == "nano":
        args.vision = args.vision or HERE / "nano" / "backbones" / "open_clip_model.safetensors"
        args.llm = args.llm or HERE / "nano" / "backbones" / "vicuna-nano"


def check_resolution(model):
    """Refuses a resolution that is no whole number of visual tokens, or that fills all of a training sample."""
    side, rest = divmod(model.resolution, model.vision.compression)
    if rest or side < 1:
        raise ValueError(f"--resolution {model.resolution}: it should be a positive multiple of "
                         f"{model.vision.compression}, the side of a visual token")
    if side ** 2 >= model.max_length:
        raise ValueError(f"--resolution {model.resolution} makes {side ** 2} visual tokens, and a sample has at most "
                         f"{model.max_length} tokens: use a smaller one")


def load_model(args, saved, device):
    """The model in float32 where the phase starts: a stopped run's, joined backbones, or a checkpoint."""
    if args.phase == 1 and not (saved or args.init):
        if not (args.vision and args.llm):
            raise ValueError("phase 1 starts from pretrained parts: give --vision and --llm")
        return ConvLLaVA.from_backbones(args.vision, args.llm, args.resolution, args.stage5, device)
    init = Path(saved or args.init or Path(args.out) / f"phase{args.phase - 1}")
    if not init.is_dir():
        raise ValueError(f"phase {args.phase} starts from {init}, which is not there: run phase {args.phase - 1} first "
                         "or name a checkpoint with --init")
    model = ConvLLaVA.from_pretrained(init, device=device, dtype=torch.float32)
    model.resolution = args.resolution or model.resolution
    if args.stage5_depth not in (None, depth := sum(model.vision.depths[4:])):
        raise ValueError(f"--stage5-depth {args.stage5_depth}: {init} has a stage 5 of {depth} blocks, from phase 1")
    return model


def freeze(model, parts):
    """Leaves trainable what the phase trains. Raises ValueError where the model has no such part."""
    names = [name for name, _ in model.named_parameters()]
    for part in parts:
        if not any(name.startswith(part + ".") for name in names):
            raise ValueError(f"the recipe trains {part}, and the model has {len(model.vision.stages)} stages of "
                             f"{model.vision.depths} blocks: choose another --recipe, or --stage5-depth 0")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(part + "." for part in parts))


def slim(model):
    """Keeps frozen matrices in bfloat16: autocast computes with that in any case."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            if module.weight is not model.llama.embed_tokens.weight:  # tied: looked up in float32
                module.to(torch.bfloat16)


def in_float32(function, *tensors, **settings):
    """The function's value outside a processor's autocast."""
    with torch.autocast("cpu", enabled=False):
        return function(*(tensor.float() for tensor in tensors), **settings)


def leave_autocast(model):
    """Takes out of a processor's autocast what has slow gradients there in bf16: attention, depthwise convolutions."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = partial(in_float32, module.attend)
        elif isinstance(module, nn.Conv2d) and module.groups > 1:
            module.forward = partial(in_float32, module.forward)


def norms_in_float32(model):
    """What a GPU's autocast does with LayerNorm and a processor's does not: for a plan, which is made on processors."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.forward = partial(in_float32, module.forward)


def compile_blocks(model, args):
    """Has torch.compile fuse what each ConvNeXt block and Llama layer computes between its matrix products."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=args.device))
    except RuntimeError as error:
        raise ValueError(f"--compile does not work here, leave it out: {str(error).splitlines()[0]}") from None
    torch._dynamo.config.optimize_ddp = False  # would cut a layer where a bucket of 25 MB of its weights ends
    # a layer's numbers, as head_dim, do not change: as symbols, which fsdp makes of them, they break its program up
    torch._dynamo.config.specialize_int = torch._dynamo.config.specialize_float = True
    torch._dynamo.config.cache_size_limit = 32  # programs: each stage's, again for the blank image of text alone
    for block in (*(block for stage in model.vision.stages for block in stage.blocks), *model.llama.layers):
        block.compile(dynamic=True)  # one program for all lengths


def shard(model, args):
    """Spreads weights, gradients and optimizer over the ranks; the weights come from rank 0, the others have none."""
    if model.llama.config.tie_word_embeddings:
        raise ValueError("--parallel fsdp does not support tied embeddings: use --parallel ddp")
    weights = model.state_dict() if args.rank == 0 else {}
    model.to("meta")
    mesh = init_device_mesh(args.device.split(":")[0], (args.world,))
    bf16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)  # the angles stay float32
    policy = bf16 if args.dtype == "bf16" else MixedPrecisionPolicy()
    for part in (*model.vision.stages, *model.llama.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=args.device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def learning_rate(step, steps, peak):
    """Linear warm-up over 3% of the steps, then a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def all_sum(values, args):
    """Sums a list of numbers over the processes."""
    # kept until the next: where gloo's own thread is the last to let go of it, torch 2.6 hangs as the run ends
    args.totals = totals = torch.tensor(values, dtype=torch.float64, device=args.device)
    if args.world > 1:
        dist.all_reduce(totals)
    return totals.tolist()


def prepare(args, saved):
    """The model where the phase starts, the same spread over the processes, its dataset and sampler."""
    model = load_model(args, saved, args.device if not args.sharded else "cpu" if args.rank == 0 else "meta").train()
    check_resolution(model)
    freeze(model, args.parts)
    for part in (*model.vision.stages, model.llama):
        part.checkpointing = args.checkpointing
    if args.compile:
        compile_blocks(model, args)
    dataset = LlavaDataset(zip(args.data, args.images), model, partial(square, resolution=model.resolution))
    sampler = GroupedSampler(dataset, args.micro_batch, args.accumulation, args.rank, args.world, args.seed)
    if len(sampler) < args.accumulation:
        raise ValueError(f"{len(dataset)} samples, those with an image and those without apart, do not fill one batch "
                         f"of {args.batch}: use a smaller --batch")
    if args.sharded:
        return model, shard(model, args), dataset, sampler
    for parameter in model.parameters():  # out of the mapped file: a processor's rounding can depend on the address
        parameter.data = parameter.data.clone()
    if args.dtype == "bf16":
        slim(model)
        if args.device == "cpu":
            leave_autocast(model)
    if args.world == 1:
        return model, model, dataset, sampler
    warnings.filterwarnings("ignore", "Grad strides do not match")  # a depthwise kernel's over its one channel
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    with args.autocast():  # DDP cuts its buckets, and so sums over ranks, anew after a first backward pass
        text = [torch.tensor([1, 2])] * args.micro_batch
        parallel(text, labels=text).backward()
    model.zero_grad()
    return model, parallel, dataset, sampler


def train(args):
    """Trains the phase; returns the folder of its checkpoint."""
    torch.manual_seed(args.seed)
    out = Path(args.out) / f"phase{args.phase}"
    states = out.with_name(out.name + ".partial")
    check_replaceable(out)  # now, rather than when the phase is done
    saved, state = newest_state(states) if args.resume else (None, {})
    if not args.resume and any(states.glob(STATES)):
        raise ValueError(f"there is a stopped run at {states}: go on with it by --resume, or remove the folder")
    model, parallel, dataset, sampler = prepare(args, saved)
    epoch_steps = len(sampler) // args.accumulation
    steps = args.steps or epoch_steps
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=0, fused=True)
    settings = dict(parts=list(args.parts), steps=steps, batch=args.batch, seed=args.seed, dtype=args.dtype,
                    resolution=model.resolution, data=dataset.digest)
    if state:
        if changed := {key: was for key, was in state["settings"].items() if was != settings[key]}:
            raise ValueError(f"the stopped run at {saved} had {changed}: give the same to go on with it")
        if state["optimizer"]:
            set_optimizer_state_dict(model, optimizer, state["optimizer"],
                                     options=StateDictOptions(full_state_dict=True))
        torch.set_rng_state(state["rng"])
    step, unreadable, skipped = (state.get(key, 0) for key in ("step", "unreadable", "skipped"))
    start, saved_at, in_a_row, began, stop, problem = step, step if saved else None, 0, time.time(), [], ""
    sampler.epoch, sampler.skip = divmod(step, epoch_steps)
    handlers = {kind: signal.signal(kind, lambda number, frame: stop.append(number))
                for kind in (signal.SIGINT, signal.SIGTERM)}
    if args.rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        moving, count = (sum(p.numel() for p in group) / 1e6 for group in (trained, model.parameters()))
        print(f"phase {args.phase}: {moving:.1f}M of {count:.1f}M parameters trained, {steps} steps of {args.batch} "
              f"samples" + (f", from step {step} in {saved}" if saved else ""), file=sys.stderr)
        for name in MAY_CHANGE:
            if saved and (was := state.get(name, False)) != getattr(args, name):
                print(f"the stopped run had {name} {was}, this one has {getattr(args, name)}", file=sys.stderr)
        metrics = open_metrics(out.with_name(out.name + ".metrics.jsonl"), step)
    del state  # its file is mapped, and will be removed

    def save():
        nonlocal saved_at
        save_state(states, saved_at, args, model, optimizer, settings, step, unreadable=unreadable, skipped=skipped)
        saved_at = step

    bar = tqdm(total=steps * args.batch, initial=step * args.batch, unit="sample", disable=args.rank > 0, mininterval=1)
    batches = batch_stream(dataset, sampler, args)
    while step < steps:
        micros = [next(batches) for _ in range(args.accumulation)]
        for sentence in (sentence for micro in micros for sentence in micro["unreadable"]):
            tqdm.write(f"unreadable: {sentence}", file=sys.stderr)
        labels = sum(int((label[1:] != IGNORE).sum()) for micro in micros for label in micro["labels"])
        labels, lost, stopping = all_sum([labels, sum(len(m["unreadable"]) for m in micros), len(stop)], args)
        if unreadable + lost > UNREADABLE * len(dataset) * (1 + step // epoch_steps):
            problem = (f"{unreadable + int(lost)} samples could not be read, more than 1%: put back the images named "
                       "above, or begin anew with a repaired JSON file")
        ending, lr = stopping or problem, learning_rate(step, steps, args.lr)
        due = step != saved_at and (ending or step // args.save_every > (saved_at or 0) // args.save_every)
        loss, norm = update(parallel, optimizer, micros, lr, labels / args.world, args, save if due else None)
        if ending:  # that step was for its gradient, and is done anew at --resume
            break
        unreadable += int(lost)
        in_a_row = 0 if norm <= EXPLODED else in_a_row + 1
        skipped += in_a_row > 0
        step += 1
        bar.update(args.batch)
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        if args.rank == 0:
            rate = (step - start) * args.batch / (time.time() - began)
            metrics.write(json.dumps(dict(step=step, loss=loss, lr=lr, grad_norm=norm, labels=int(labels),
                                          samples_per_s=round(rate, 2), unreadable=unreadable, skipped=skipped)) + "\n")
            metrics.flush()
        if in_a_row == SKIPPED:
            problem = (f"{SKIPPED} steps in a row were skipped, their gradient norm was not finite or above "
                       f"{EXPLODED:.0f}: go on with a lower --lr")
            break
    bar.close()
    if step < steps or problem:
        if saved_at is None and in_a_row < SKIPPED:
            save()
        said = f"stopped at step {step} of {steps}: " + ("begin anew" if saved_at is None else
                                                         f"the same command with --resume goes on from step {saved_at}")
        if problem:
            raise ValueError(f"{problem} ({said})")
        raise SystemExit(said if args.rank == 0 else 1)
    for kind, handler in handlers.items():  # not earlier: a second signal would break off the save above
        signal.signal(kind, handler)
    weights = get_model_state_dict(model, options=WHOLE)
    if args.rank == 0:
        copy_of(model, weights).save_pretrained(out, torch.bfloat16)
        for state in states.glob("step-*"):
            shutil.rmtree(state, ignore_errors=True)
        with suppress(OSError):  # a link, or with other things in it
            states.rmdir()
        print(f"phase {args.phase} is done: {out}" + f" ({unreadable} unreadable samples)" * bool(unreadable)
              + f" ({skipped} skipped steps)" * bool(skipped), file=sys.stderr)
    return out


def update(model, optimizer, micros, lr, divisor, args, save=None):
    """One optimizer step, left out where the gradient exploded; returns the loss over all ranks and that norm.

    save: called before the step, where a gradient that did not explode shows that the weights are good.
    """
    loss = 0.0
    for i, micro in enumerate(micros):  # DDP sums over the ranks with the last, fsdp with each: its sums are sharded
        model.require_backward_grad_sync = i + 1 == len(micros)
        with args.autocast():
            part = model(micro["input_ids"], micro["images"], micro["labels"], divisor=divisor)
        part.backward()
        loss += part.item()
    group, = optimizer.param_groups
    norm = nn.utils.clip_grad_norm_(group["params"], 1.0)
    norm = (norm.full_tensor() if args.sharded else norm).item()  # the same on every rank
    if norm <= EXPLODED:  # not where it is not a number
        if save:
            save()
        group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return all_sum([loss], args)[0] / args.world, norm


def copy_of(model, weights):
    """The model with these whole weights, unsharded, to be written."""
    with torch.device("meta"):
        vision, llama = ConvNeXt(model.vision.depths, model.vision.dims), Llama(model.llama.config)
        copy = ConvLLaVA(vision, llama, model.tokenizer, model.resolution, model.max_length)
    copy.load_state_dict(weights, assign=True)
    return copy


def save_state(states, before, args, model, optimizer, settings, step, **counts):
    """Saves all that a run needs to go on after `step` steps, whole or not at all; all ranks take part.

    before: the step of the state before, None where there is none; later ones are damaged.
    """
    weights = get_model_state_dict(model, options=WHOLE)
    # before the first step there are no moments, and torch would take a step to make them
    moments = get_optimizer_state_dict(model, optimizer, options=WHOLE) if optimizer.state else {}
    if args.rank == 0:
        folder = states / f"step-{step:07d}"
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one of that name
        with replacing(folder) as new:
            copy_of(model, weights).write(new, torch.float32)
            kept = dict(optimizer=moments, step=step, rng=torch.get_rng_state(), settings=settings, **counts,
                        **{name: getattr(args, name) for name in MAY_CHANGE})
            try:
                torch.save(kept, new / "training.pt")
            except RuntimeError as error:  # torch's word for a full disk
                raise OSError(f"{new} cannot be written: {str(error).splitlines()[0]}") from None
        whole = sorted(state for state in states.glob(STATES) if before is not None and int(state.name[5:]) <= before)
        kept = [*whole, folder][-args.keep:]
        for other in set(states.glob("step-*")) - set(kept):  # older, or damaged, or half-written
            shutil.rmtree(other, ignore_errors=True)  # NFS keeps what a resumed run still has open
    if args.world > 1:
        dist.barrier()  # a rank that stops before all is written would end the job


def newest_state(states):
    """The newest saved state that is whole: its folder and what it holds beside the weights."""
    for folder in sorted(states.glob(STATES), reverse=True):
        try:
            ConvLLaVA.from_pretrained(folder, "meta")  # names and shapes only
            return folder, torch.load(folder / "training.pt", map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch raises many kinds on broken files
            print(f"{folder} is passed over, it cannot be read: {str(error).splitlines()[0]}", file=sys.stderr)
    raise ValueError(f"there is no stopped run at {states} to go on with: leave --resume out"
                     + ", and remove the folder" * states.exists())


def open_metrics(file, step):
    """The phase's log to go on with after `step` steps: later lines, and one half-written, are dropped."""
    lines = file.read_text().splitlines() if file.is_file() else []
    file.with_suffix(".new").write_text("".join(line + "\n" for line in lines[:step]))
    os.replace(file.with_suffix(".new"), file)
    return open(file, "a")


def heed_the_rank(worker):
    """Keeps a data process at work through Ctrl-C and SIGTERM: they are for the rank, which saves and then ends it."""
    os.setpgrp()  # out of reach of what is sent to the group
    if multiprocessing.get_start_method() == "fork":  # Linux, Python up to 3.13: this is the only thread
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # sent to every process, as by SLURM

        def wait(rank=multiprocessing.parent_process().pid):
            while signal.sigwaitinfo({signal.SIGTERM}).si_pid != rank:
                pass
            os._exit(0)
        threading.Thread(target=wait, daemon=True).start()


def batch_stream(dataset, sampler, args):
    """This rank's micro-batches without end, epoch after epoch."""
    while True:
        own = torch.Generator().manual_seed(args.seed + sampler.epoch)  # takes none of the model's random numbers
        yield from DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.workers,
                              pin_memory=args.device != "cpu", worker_init_fn=heed_the_rank, generator=own)
        sampler.epoch, sampler.skip = sampler.epoch + 1, 0


def evaluate(args, checkpoint):
    """Prints how the checkpoint answers the validation questions, by kind (the id's first word), and logs it."""
    gc.collect()  # what was trained: fsdp's parts refer to each other
    model = ConvLLaVA.from_pretrained(checkpoint, device=args.device, dtype=torch.float32).requires_grad_(False)
    if args.dtype == "bf16":
        slim(model)
    resolution = args.resolution or model.resolution
    dataset = LlavaDataset([(args.val, args.images[0])], model, partial(square, resolution=resolution))
    kinds = [dataset.entry(i)[0]["id"].rsplit("-", 1)[0] if args.generated else "all" for i in range(len(dataset))]
    loss, counts = validate(model, dataset, kinds, 4 * args.micro_batch, args.workers, args.autocast)
    right, asked = map(sum, zip(*[count for kind, count in counts.items() if kind != "box" or len(counts) == 1]))
    print(f"validation loss {loss:.4f}, exact match {right / asked:.1%}", file=sys.stderr)
    for kind, (n, total) in counts.items():
        print(f"  {kind:12s} {n:4d} of {total:4d}  {n / total:6.1%}" + "  (IoU at least 0.5)" * (kind == "box"),
              file=sys.stderr)
    if not args.evaluate:
        with open(Path(args.out) / f"phase{args.phase}.metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps(dict(checkpoint=str(checkpoint), val_loss=loss, right=counts,
                                          exact_match=right / asked)) + "\n")


def plan(args):
    """Prints what the phase costs; the model has shapes only."""
    preset = PRESETS[args.preset]
    llm = args.llm or (HERE / "nano" / "backbones" / "vicuna-nano" if args.preset == "nano" else None)
    llama = LlamaConfig.from_json(Path(llm) / "config.json") if llm else LlamaConfig()
    with torch.device("meta"):
        vision = ConvNeXt(**preset["vision"])
        if args.stage5:
            vision.add_stage(*args.stage5)
        model = ConvLLaVA(vision, Llama(llama))
    model.resolution = args.resolution
    check_resolution(model)
    if args.plan[2] > (room := model.max_length - (model.resolution // vision.compression) ** 2):
        raise ValueError(f"--plan with {args.plan[2]} text tokens: a training sample has room for {room} beside the "
                         "visual ones")
    freeze(model, args.parts)
    if args.dtype == "bf16":
        slim(model)
    norms_in_float32(model)
    args.samples = args.steps * args.batch if args.steps else args.samples
    print_plan(model, args)


def main():
    try:
        args = arguments()
        if args.plan is not None:
            return plan(args)
        if args.device != "cpu":
            torch.cuda.set_device(args.device)
        if args.world > 1:
            dist.init_process_group("nccl" if args.device != "cpu" else "gloo", timeout=PATIENCE)
        if args.generated and args.rank == 0:
            names = [file.name for file in ([args.val] if args.evaluate else [*args.data, args.val])]
            generate(HERE / "nano" / "out", {name: FILES[name] for name in names})
        if args.world > 1:
            dist.barrier()  # the others wait for the data
        checkpoint = args.evaluate or train(args)
        if args.val and args.rank == 0:
            evaluate(args, checkpoint)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:  # a data process's error ends with the sentence
        sentence = str(error).strip().splitlines()[-1].removeprefix("ValueError: ")
        if isinstance(error, torch.OutOfMemoryError):  # torch's own is a paragraph
            sentence = "the GPU's memory is full: a smaller --micro-batch or --checkpointing takes less"
        print(f"train.py: {sentence}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(2)  # leaving the group in order could wait for the others
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized() and not isinstance(sys.exc_info()[1], Exception):  # that would wait for the others
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

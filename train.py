"""Trains ConvLLaVA in the paper's three phases (section 4.1, figure 1c and tables 12 to 15).

    python train.py --phase 1        # projector initialization, on the small model and its own data
    python train.py --phase 2        # vision-language pretraining, from what phase 1 wrote
    python train.py --phase 3        # visual instruction tuning
    python train.py --phase 3 --evaluate data/nano/convllava-nano
    torchrun --nproc_per_node 8 train.py --phase 1 --preset convllava-7b --vision open_clip_model.safetensors \\
        --llm vicuna-7b-v1.5
    torchrun --nproc_per_node 8 train.py --phase 2 --preset convllava-7b --parallel fsdp
"""
import argparse
import gc
import math
import os
import sys
import timeit
import warnings
from contextlib import closing, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from convllava import ConvLLaVA
from data.errors import check_ranges, print_error, tell_warnings
from data.dataset import (
    LlavaDataset, MicroBatchSampler, find_sources, find_validation, micro_batches, read_mixture, shape_only, take)
from data.images import check_resolution, square
from data.nano.generate import FILES, generate
from data.states import (
    Log, Progress, Saver, all_sum, find_state, how_to_go_on, only_run, run_settings, stop_signals)
from data.validation import check_questions, kinds_by_id, print_report, validate, write_report

DATA = Path(__file__).parent / "data"
NANO = DATA / "nano"


# ---- The phases: tables 12 to 15 of the paper ----
STAGE_3, STAGE_4, STAGE_5 = "vision.stages.2", "vision.stages.3", "vision.stages.4"
LAST_18_BLOCKS = (*(f"vision.stages.2.blocks.{i}" for i in range(12, 27)), STAGE_4)  # of ConvNeXt-L's 36
PROJECTOR, LLM = "projector", "llama"


class Phase(NamedTuple):
    name: str
    trained: tuple  # what the names of the parameters that it trains begin with
    lr: float  # the peak
    batch: int  # samples of an optimizer step, over all processes
    samples: int  # of the paper's data, each seen once; here only for `tests/bench.py plan`


INSTRUCTION_TUNING = Phase("visual instruction tuning", (PROJECTOR, LLM), 2e-5, 128, 665_000)
RECIPES = {
    "table15": (  # the main models: tables 5 and 6
        Phase("projector initialization", (STAGE_5, PROJECTOR), 3e-4, 256, 2_000_000),
        Phase("vision-language pretraining", (STAGE_3, STAGE_4, STAGE_5, PROJECTOR, LLM), 2e-5, 256, 2_900_000),
        INSTRUCTION_TUNING),
    "table14": (  # with fewer data: tables 4, 9 and 10
        Phase("projector initialization", (STAGE_5, PROJECTOR), 3e-4, 256, 1_200_000),
        Phase("vision-language pretraining", (STAGE_3, STAGE_4, STAGE_5, PROJECTOR, LLM), 2e-5, 256, 1_200_000),
        INSTRUCTION_TUNING),
    "table13": (  # four stages, updated: table 3
        Phase("projector initialization", (PROJECTOR,), 1e-3, 256, 558_000),
        Phase("vision-language pretraining", (*LAST_18_BLOCKS, PROJECTOR, LLM), 2e-5, 256, 1_200_000),
        INSTRUCTION_TUNING),
    "table12": (  # four stages, frozen: table 2
        Phase("projector initialization", (PROJECTOR,), 1e-3, 256, 558_000),
        INSTRUCTION_TUNING),
}


class Preset(NamedTuple):
    """A model's size, and how it is trained. From micro_batch on tuples have a value for each phase.

    lr, batch and steps take the place of the recipe's.
    """
    resolution: int  # pixels
    stage5: tuple  # depth and width of the new stage
    micro_batch: tuple  # samples of a process at a time
    workers: int  # data processes
    lr: tuple = (None, None, None)
    batch: tuple = (None, None, None)
    steps: tuple = (None, None, None)


PRESETS = {
    "convllava-7b": Preset(1536, (6, 3072), micro_batch=(4, 2, 4), workers=4),  # fits 80 GB, with fsdp on 8 in 2 and 3
    "nano": Preset(512, (2, 320), micro_batch=(16, 16, 16), workers=1,
                   lr=(2e-3, 8e-4, 8e-4), batch=(8, 8, 8), steps=(400, 1000, 650)),
}


# ---- What is trained, and how fast ----
WARMUP = 0.03  # of the steps
MAX_NORM = 1.0  # of the gradient, which is clipped above it
EXPLODED = 1000.0  # a gradient norm above this skips the step
MAX_SKIPPED = 10  # such steps in a row end the run


def freeze(model, trained):
    """Leaves trainable what the phase trains. Raises ValueError where the model has no such part."""
    names = [name for name, _ in model.named_parameters()]
    for part in trained:
        if not any(name.startswith(part + ".") for name in names):
            raise ValueError(f"the recipe trains {part}, and the model has {len(model.vision.stages)} stages of "
                             f"{model.vision.depths} blocks: choose another --recipe, or --stage5-depth 0")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(part + "." for part in trained))


def frozen_to_bf16(model):
    """Stores frozen matrices in bf16, in half the memory: autocast rounds them to it anyway."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad:
            if module.weight is not model.llama.embed_tokens.weight:  # tied embeddings are looked up in float32
                module.to(torch.bfloat16)


def learning_rate(step, steps, peak):
    """Linear warm-up over 3% of the steps, then a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return peak * 0.5 * (1 + math.cos(math.pi * done))


# ---- The arguments, and what follows from them ----
def arguments(argv=None):
    parser = argparse.ArgumentParser(description="Train ConvLLaVA in the paper's three phases.")
    add = parser.add_argument
    add("--phase", type=int, choices=(1, 2, 3), required=True)
    add("--preset", choices=PRESETS, default="nano")
    add("--recipe", choices=RECIPES, default="table15", help="the paper's table (default: table15)")
    add("--out", default="runs", help="folder for phase1, phase2, phase3 (default: runs)")
    add("--resume", action="store_true", help="go on with a stopped run, from its newest saved state")
    add("--evaluate", metavar="CHECKPOINT", help="only validate this checkpoint")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", help="mixtures (see data/README.md; default: the recipe's), or --images' LLaVA JSON files")
    add("--images", nargs="+", help="the image folder of each LLaVA-format file in --data")
    add("--val", help="a LLaVA-format JSON file to validate on; images in the first --images")
    add("--workers", type=int, help="data processes per rank (default: 1; 4 at full size)")
    add = parser.add_argument_group("model").add_argument
    add("--vision", help="ConvNeXt weights that phase 1 starts from")
    add("--llm", help="Llama folder that phase 1 starts from")
    add("--init", help="checkpoint that the phase starts from (default: the previous phase's)")
    add("--resolution", type=int)
    add("--stage5-depth", type=int, help="blocks of the new stage 5 (default: 6, the small model's 2); 0: four stages")
    add("--first-stage", type=int, choices=(2, 3, 4), help="first ConvNeXt stage that phase 2 trains")
    add = parser.add_argument_group("training").add_argument
    add("--lr", type=float)
    add("--batch", type=int, help="global batch, whatever the number of processes")
    add("--micro-batch", type=int, help="samples per process at a time (default: 16; at full size 4, 2 and 4 by phase)")
    add("--steps", type=int, help="optimizer steps (default: one epoch; fewer for the small model)")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=250, help="steps between saved states (default: 250)")
    add("--keep", type=int, default=2, help="saved states to keep (default: 2)")
    add = parser.add_argument_group("computing").add_argument
    add("--dtype", choices=("bf16", "fp32"), help="to compute in (default: bf16; on processors what is faster there)")
    add("--parallel", choices=("ddp", "fsdp"), default="ddp", help="fsdp shards weights and optimizer")
    add("--checkpointing", action="store_true", help="recompute activations: slower, less memory")
    add("--compile", action="store_true", help="torch.compile, for GPUs; the first step takes about a minute")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Run:
    """What follows from the arguments and the processes; computed once."""
    args: argparse.Namespace  # as they were parsed
    phase: Phase  # the recipe's, with the trained parts, learning rate and batch of this run
    stage5: tuple | None  # depth and width of the new stage; None: four stages
    resolution: int | None  # pixels; None: the checkpoint's
    steps: int | None  # None: an epoch
    micro_batch: int
    accumulation: int  # micro-batches of an optimizer step
    workers: int
    rank: int
    world: int  # processes
    device: str
    dtype: str  # "bf16" or "fp32"

    @property
    def sharded(self):
        return self.args.parallel == "fsdp" and self.world > 1

    @property
    def is_generated(self):
        """Whether the data are the small model's own, which are drawn when they are needed."""
        return self.args.preset == "nano" and not (self.args.data or self.args.images or self.args.val)

    def autocast(self):
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.dtype == "bf16")


def make_run(args, rank, world, device, dtype):
    """Settles what the arguments leave open. Raises ValueError where they do not fit together."""
    check_ranges(args, lr=(1e-12, None), batch=(1, None), micro_batch=(1, None), steps=(1, None), resolution=(1, None),
                 save_every=(1, None), keep=(1, None), seed=(0, 2 ** 32 - 1), workers=(0, 999), stage5_depth=(0, 999))
    recipe, preset, i = RECIPES[args.recipe], PRESETS[args.preset], args.phase - 1
    if args.phase > len(recipe):
        raise ValueError(f"--recipe {args.recipe} has no phase {args.phase}: its last is {len(recipe)}")

    # arguments override the preset, the preset overrides the recipe
    stage5, trained = choose_parts(args, recipe[i])
    phase = recipe[i]._replace(trained=trained, lr=args.lr or preset.lr[i] or recipe[i].lr,
                               batch=args.batch or preset.batch[i] or recipe[i].batch)
    steps = args.steps or preset.steps[i]
    workers = preset.workers if args.workers is None else args.workers
    resolution = args.resolution
    if not resolution and args.phase == 1 and not args.evaluate:  # with four stages at most 768 pixels (section 3.2)
        resolution = preset.resolution if stage5 else min(768, preset.resolution)

    # the global batch is cut into micro-batches, for all processes and as often as needed
    most = args.micro_batch or preset.micro_batch[i]
    micro_batch = min(most, max(1, phase.batch // world))
    accumulation, remainder = divmod(phase.batch, micro_batch * world)
    if remainder:
        unit = most * world if phase.batch >= most * world else world
        raise ValueError(f"--batch {phase.batch} does not divide into micro-batches of {micro_batch} on {world} "
                         f"processes: the nearest that does is {max(1, round(phase.batch / unit)) * unit}")
    return Run(args, phase, stage5, resolution, steps, micro_batch, accumulation, workers, rank, world, device, dtype)


def choose_parts(args, phase):
    """The new stage 5 (depth, width), or None with four stages; and the parts that the phase trains."""
    depth, width = PRESETS[args.preset].stage5
    has_stage5 = any(STAGE_5 in phase.trained for phase in RECIPES[args.recipe]) and args.stage5_depth != 0
    if args.stage5_depth and not has_stage5:
        raise ValueError(f"--recipe {args.recipe} has four stages and trains no stage 5: leave --stage5-depth out")
    stage5 = (args.stage5_depth or depth, width) if has_stage5 else None

    trained = tuple(part for part in phase.trained if has_stage5 or part != STAGE_5)
    if args.first_stage:  # table 9
        if STAGE_4 not in trained:
            raise ValueError(f"phase {args.phase} of {args.recipe} trains no stages 2 to 4: leave --first-stage out")
        stages = range(args.first_stage - 1, 5 if has_stage5 else 4)
        trained = (*(f"vision.stages.{i}" for i in stages), PROJECTOR, LLM)
    return stage5, trained


def phase_folder(args, ending=""):
    """The phase's checkpoint; with an ending, what stands beside it."""
    return Path(args.out) / f"phase{args.phase}{ending}"


def find_data(run):
    """The (annotation file, image folder) pairs to train on, and the one to validate on or None."""
    args = run.args
    if run.is_generated:
        is_tuning = run.phase.name == INSTRUCTION_TUNING.name  # table 12's phase 2 too
        number, name = (3, "val-instructions.json") if is_tuning else (args.phase, "val-captions.json")
        return read_mixture(NANO / f"phase{number}.json"), (NANO / "out" / name, NANO / "out")
    if args.evaluate and not args.val:
        raise ValueError("--evaluate needs --val and --images, the questions to ask and their images")
    if not (args.data or args.images or args.val):
        return read_mixture(DATA / args.recipe / f"phase{args.phase}.json"), None
    if not (args.data or args.evaluate):
        raise ValueError("training needs --data too: LLaVA-format JSON files, one for each folder in --images")
    sources = find_sources(args.data, args.images)
    return sources, find_validation(args.val, args.images or [folder for _, folder in sources])


# ---- The start: a model where the phase begins ----
def load_model(run, state_folder, device):
    """The model in float32: a stopped run's, joined backbones, or a checkpoint. Raises ValueError without any."""
    args = run.args
    if args.phase == 1 and not (state_folder or args.init):
        vision, llm = args.vision, args.llm
        if args.preset == "nano":
            vision = vision or NANO / "backbones" / "open_clip_model.safetensors"
            llm = llm or NANO / "backbones" / "vicuna-nano"
        if not (vision and llm):
            raise ValueError("phase 1 starts from pretrained parts: give --vision and --llm")
        return ConvLLaVA.from_backbones(vision, llm, run.resolution, run.stage5, device)

    folder = Path(state_folder or args.init or Path(args.out) / f"phase{args.phase - 1}")
    if not folder.is_dir():
        raise ValueError(f"phase {args.phase} starts from {folder}, which is no folder: run phase {args.phase - 1} first "
                         "or name a checkpoint with --init")
    model = ConvLLaVA.from_pretrained(folder, device=device, dtype=torch.float32)
    model.resolution = run.resolution or model.resolution
    depth = sum(model.vision.depths[4:])
    if args.stage5_depth not in (None, depth):
        raise ValueError(f"--stage5-depth {args.stage5_depth}: {folder} has a stage 5 of {depth} blocks, from phase 1")
    return model


def prepare(run, sources, state_folder=None):
    """The model where the phase starts, its replica that the processes train, the dataset and the sampler."""
    device = run.device
    if run.sharded:  # rank 0 reads the weights and sends the others their shards
        device = "cpu" if run.rank == 0 else "meta"
    model = load_model(run, state_folder, device).train()
    check_resolution(model.resolution, model.vision.compression, model.max_length)
    freeze(model, run.phase.trained)
    for part in (*model.vision.stages, model.llama):
        part.checkpointing = run.args.checkpointing
    if run.args.compile:
        compile_blocks(model, run.device)

    dataset = make_dataset(sources, model, partial(square, resolution=model.resolution))
    sampler = MicroBatchSampler(dataset, run.phase.batch, run.micro_batch, run.rank, run.world, run.args.seed)
    return model, distribute(model, run), dataset, sampler


def make_dataset(sources, model, transform):
    return LlavaDataset(sources, model.tokenizer, model.vision.compression, model.max_length, transform)


# ---- One process or many ----
def start_processes():
    """This process's (rank, number of processes, device), as torchrun has set them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    if world > 1:
        # The timeout is for the others, while rank 0 writes a state or draws the small model's data.
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=timedelta(hours=1))
    return rank, world, device


def faster_dtype(device):
    """The type to compute in: bf16 on a GPU; on a processor that of the faster matrix product, tried for some 50 ms."""
    if device != "cpu":
        return "bf16"

    def seconds(dtype):
        matrix = torch.ones(768, 768, dtype=dtype)
        return min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=5))  # the first one starts the threads
    dtype = ["bf16" if seconds(torch.bfloat16) < seconds(torch.float32) else "fp32"]
    if dist.is_initialized():
        dist.broadcast_object_list(dtype)  # rank 0's result for all
    return dtype[0]


def distribute(model, run):
    """The model as the processes train it: sharded, or a replica on each, or itself where there is one process."""
    if run.sharded:
        return shard(model, run)
    for parameter in model.parameters():  # out of the mapped file: on a processor rounding can depend on the address
        parameter.data = parameter.data.clone()
    if run.dtype == "bf16":
        frozen_to_bf16(model)
    if run.world == 1:
        return model
    # DDP warns that a depthwise kernel's gradient has other strides over its one channel, which is the same memory.
    warnings.filterwarnings("ignore", "Grad strides do not match")
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard(model, run):
    """Spreads weights, gradients and optimizer over the processes. The weights come from rank 0."""
    if model.llama.config.tie_word_embeddings:
        raise ValueError("--parallel fsdp does not support tied embeddings: use --parallel ddp")
    weights = model.state_dict() if run.rank == 0 else {}
    model.to("meta")
    mesh = init_device_mesh(run.device.split(":")[0], (run.world,))
    policy = MixedPrecisionPolicy()
    if run.dtype == "bf16":  # inputs are not cast: the rotary angles stay float32
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for part in (*model.vision.stages, *model.llama.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    model.to_empty(device=run.device)
    set_model_state_dict(model, weights, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return model


def compile_blocks(model, device):
    """Has torch.compile fuse what each ConvNeXt block and Llama layer computes between its matrix products."""
    try:
        torch.compile(torch.neg)(torch.ones(1, device=device))
    except RuntimeError as error:
        raise ValueError(f"--compile does not work here, leave it out: {str(error).splitlines()[0]}") from None
    config = torch._dynamo.config
    config.optimize_ddp = False  # would cut a layer where a bucket of 25 MB of its weights ends
    config.specialize_int = config.specialize_float = True  # a layer's numbers, as head_dim, do not change
    config.cache_size_limit = 32  # programs: one a stage, others for the blank image and without gradients
    for block in (*(block for stage in model.vision.stages for block in stage.blocks), *model.llama.layers):
        block.compile(dynamic=True)  # one program for all lengths


# ---- Validation ----
def evaluate(run, pair, checkpoint):
    """Prints how the checkpoint answers the questions of an (annotation file, image folder) pair."""
    gc.collect()  # the parts of a model that was trained with fsdp refer to each other
    model = ConvLLaVA.from_pretrained(checkpoint, device=run.device, dtype=torch.float32).requires_grad_(False)
    if run.dtype == "bf16":
        frozen_to_bf16(model)
    dataset = make_dataset([pair], model, partial(square, resolution=run.args.resolution or model.resolution))
    kinds = kinds_by_id(dataset) if run.is_generated else ["all"] * len(dataset)
    loss, counts = validate(model, dataset, kinds, 4 * run.micro_batch, run.workers, run.autocast)  # more fit now
    print_report(loss, counts)
    if not run.args.evaluate:
        write_report(phase_folder(run.args, ".metrics.jsonl"), checkpoint, loss, counts)


# ---- The loop ----
def train(run, sources, validation=None, state_folder=None, state=None):
    """Trains the phase, from its start or from a stopped run's state; returns the folder of its checkpoint."""
    torch.manual_seed(run.args.seed)
    model, replica, dataset, sampler = prepare(run, sources, state_folder)
    if validation and run.rank == 0 and not run.is_generated:  # now, rather than when the phase is done
        check_questions(make_dataset([validation], model, partial(shape_only, resolution=model.resolution)))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.phase.lr, weight_decay=0, fused=True)
    steps = run.steps or sampler.batches_per_epoch
    saver = Saver(phase_folder(run.args, ".partial"), run.args.keep, model, replica, optimizer, run.autocast,
                  **run_settings(run, steps, model.resolution, dataset.digest))
    progress = saver.restore(state) if state else Progress(unreadable=dataset.num_malformed)
    log = Log(phase_folder(run.args, ".metrics.jsonl"), run.phase.batch, steps, progress)
    log.announce(f"phase {run.args.phase}, {run.phase.name}", model, dataset.malformed)
    batches = micro_batches(dataset, sampler, progress.step, run.workers, pin_memory=run.device != "cpu")
    micro = None  # the last one, to check the weights with before they are saved

    with closing(batches), closing(log), stop_signals() as signals:
        while progress.step < steps:
            # take this process's micro-batches of the global batch
            micros, num_labels, num_unreadable, fault = take(batches, run.accumulation, log)
            fault = fault or progress.too_many_unreadable(num_unreadable, len(dataset), sampler.batches_per_epoch)
            if fault:
                saver.save_state(progress, micro)
                raise ValueError(f"{fault} ({progress.where(steps)})")
            micro = micros[-1]

            # forward and backward; the gradients are exchanged with the last micro-batch
            loss, norm = accumulate_gradients(replica, trained, micros, num_labels, run)
            loss, stopping = all_sum([loss / run.world, len(signals)])

            # take the step, or skip it
            lr = learning_rate(progress.step, steps, run.phase.lr)
            is_good = math.isfinite(loss) and norm <= EXPLODED
            if is_good:
                optimizer.param_groups[0]["lr"] = lr
                optimizer.step()
            optimizer.zero_grad()
            progress.count(is_good, num_unreadable)

            # log, and save when due or asked to stop
            log.write(progress, loss, lr, norm, num_labels)
            if progress.skipped_in_a_row == MAX_SKIPPED:
                raise ValueError(f"{MAX_SKIPPED} steps in a row were skipped, their gradient norm was not finite or "
                                 f"above {EXPLODED:.0f}: use a lower --lr ({progress.where(steps)})")
            if progress.step == steps:
                break
            if stopping or progress.is_due(run.args.save_every):
                saver.save_state(progress, micro)
            if stopping:  # the others leave with 0: at another status torchrun would end rank 0 before its sentence
                raise SystemExit(progress.where(steps) if run.rank == 0 else 0)

        return saver.save_checkpoint(phase_folder(run.args), progress, micro)


def accumulate_gradients(replica, trained, micros, num_labels, run):
    """Sums the micro-batches' gradients and clips them; returns this process's loss and the norm before clipping.

    Gradients are averaged over the processes, therefore each divides its loss by the number of labels per process.
    """
    loss = 0.0
    for i, micro in enumerate(micros):
        replica.require_backward_grad_sync = i + 1 == len(micros)  # for DDP
        with run.autocast():
            part = replica(micro["input_ids"], micro["images"], micro["labels"], divisor=num_labels / run.world)
        part.backward()
        loss += part.item()
    norm = nn.utils.clip_grad_norm_(trained, MAX_NORM)
    norm = norm.full_tensor() if run.sharded else norm
    return loss, norm.item()


# ---- The program ----
def run_phase(args, rank, world, device):
    """Draws the small model's data where they are needed, trains, and validates."""
    state_folder, state = (None, None) if args.evaluate else find_state(
        phase_folder(args), phase_folder(args, ".partial"), args.resume,
        load_checkpoint=partial(ConvLLaVA.from_pretrained, device="meta"))
    dtype = args.dtype or (state and state["changeable"]["dtype"]) or faster_dtype(device)
    run = make_run(args, rank, world, device, dtype)
    sources, validation = find_data(run)
    if run.is_generated and rank == 0:
        files = [file for file, _ in (sources if not args.evaluate else []) + [validation]]
        generate(NANO / "out", {file.name: FILES[file.name] for file in files})
    if world > 1:
        dist.barrier()  # the other processes wait for the data
    checkpoint = args.evaluate or train(run, sources, validation, state_folder, state)
    if validation and rank == 0:
        evaluate(run, validation, checkpoint)


def main():
    try:
        args = arguments()
        tell_warnings("train.py")
        rank, world, device = start_processes()
        with only_run(phase_folder(args, ".lock")) if rank == 0 and not args.evaluate else nullcontext():
            run_phase(args, rank, world, device)
    except Exception as error:
        print_error("train.py", error, out_of_memory="a smaller --micro-batch or --checkpointing takes less",
                    afterwards=how_to_go_on(phase_folder(args), phase_folder(args, ".partial")))
        if dist.is_initialized():
            os._exit(2)  # leaving the group in order could wait for the others
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # After an error the others may be waiting elsewhere, and leaving the group in order would wait for them.
        if dist.is_initialized() and not isinstance(sys.exc_info()[1], Exception):
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

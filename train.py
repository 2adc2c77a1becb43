"""Trains ConvLLaVA in the paper's three phases (section 4.1, figure 1c and table 15).

    python train.py --phase 1        # projector initialisation, on the small model and its own data
    python train.py --phase 2        # vision-language pretraining, from what phase 1 wrote
    python train.py --phase 3        # instruction tuning
    torchrun --nproc_per_node 8 train.py --phase 1 --preset convllava-7b --vision open_clip_model.safetensors \\
        --llm vicuna-7b-v1.5 --data share-captioner.json --images data/sharegpt4v
    python train.py --phase 3 --evaluate data/nano/convllava-nano
"""
import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from convllava import ConvLLaVA
from data.conversation import BOX, IGNORE, IMAGE_TOKEN
from data.dataset import GroupedSampler, LlavaDataset, collate, read_mixture
from data.images import square
from data.nano.generate import FILES, generate
from data.weights import replacing

NANO = Path(__file__).parent / "data" / "nano"

TRAINED = {  # table 15: the parts that each phase trains; stage 5 is stages.4
    1: ("vision.stages.4", "projector"),
    2: ("vision.stages.2", "vision.stages.3", "vision.stages.4", "projector", "llama"),
    3: ("projector", "llama"),
}
PRESETS = {  # per phase: learning rate and global batch; the paper's are those of table 15
    "convllava-7b": dict(resolution=1536, stage5=(6, 3072), lr=(3e-4, 2e-5, 2e-5), batch=(256, 256, 128), steps=None),
    "nano": dict(resolution=512, stage5=(2, 320), lr=(2e-3, 8e-4, 8e-4), batch=(16, 16, 16), steps=(400, 700, 400)),
}
WARMUP = 0.03  # of the steps; then a cosine to zero
UNREADABLE = 0.01  # of the samples: more of them stop the run


def arguments():
    parser = argparse.ArgumentParser(description="Train ConvLLaVA in the paper's three phases.")
    parser.add_argument("--phase", type=int, choices=(1, 2, 3), required=True)
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--data", nargs="+", help="a mixture (data/README.md), or with --images LLaVA-format JSON files")
    parser.add_argument("--images", nargs="+", help="the image folder of each LLaVA-format file in --data")
    parser.add_argument("--val", help="a LLaVA-format JSON file to validate on; images in the first --images")
    parser.add_argument("--vision", help="ConvNeXt weights that phase 1 starts from")
    parser.add_argument("--llm", help="Llama folder that phase 1 starts from")
    parser.add_argument("--init", help="checkpoint that the phase starts from (default: the previous phase's)")
    parser.add_argument("--out", default="runs", help="folder for phase1, phase2, phase3 (default: runs)")
    parser.add_argument("--resolution", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--batch", type=int, help="global batch, whatever the number of processes")
    parser.add_argument("--micro-batch", type=int, default=16, help="samples per process at a time (default: 16)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: one epoch; fewer for the small model)")
    parser.add_argument("--workers", type=int, default=1, help="data processes per rank (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of autocast; the weights are fp32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations: slower, less memory")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run")
    parser.add_argument("--evaluate", metavar="CHECKPOINT", help="only validate this checkpoint")
    args = parser.parse_args()
    for name in ("lr", "batch", "micro_batch", "steps", "resolution"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {value}: it should be above 0")
    preset = PRESETS[args.preset]
    for name in ("lr", "batch", "steps"):
        if getattr(args, name) is None:
            setattr(args, name, preset[name] and preset[name][args.phase - 1])
    args.rank, args.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    args.autocast = torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.dtype == "bf16")
    args.micro_batch = min(args.micro_batch, max(1, args.batch // args.world))
    at_once = args.micro_batch * args.world
    if args.batch % at_once:
        raise ValueError(f"--batch {args.batch} does not divide into micro-batches of {args.micro_batch} on "
                         f"{args.world} processes: the nearest that does is {max(1, round(args.batch / at_once)) * at_once}")
    args.accumulation = args.batch // at_once
    args.generated = args.preset == "nano" and not (args.data or args.val)
    if args.generated:
        args.data = [NANO / f"phase{args.phase}.json"]
        args.val = NANO / "out" / ("val-instructions.json" if args.phase == 3 else "val-captions.json")
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
        raise ValueError("training needs --data and --images: LLaVA-format JSON files and their image folders")
    if args.preset == "nano":
        args.vision = args.vision or NANO / "backbones" / "open_clip_model.safetensors"
        args.llm = args.llm or NANO / "backbones" / "vicuna-nano"
    return args


def load_model(args, state):
    """The model in float32 where the phase starts: joined backbones, a checkpoint, or a stopped run's."""
    if state:
        return ConvLLaVA.from_pretrained(args.partial, dtype=torch.float32)
    if args.phase == 1 and not args.init:
        if not (args.vision and args.llm):
            raise ValueError("phase 1 starts from pretrained parts: give --vision and --llm")
        preset = PRESETS[args.preset]
        resolution = args.resolution or preset["resolution"]
        return ConvLLaVA.from_backbones(args.vision, args.llm, resolution, preset["stage5"])
    init = Path(args.init or Path(args.out) / f"phase{args.phase - 1}")
    if not init.is_dir():
        raise ValueError(f"phase {args.phase} starts from {init}, which is not there: run phase {args.phase - 1} first "
                         "or name a checkpoint with --init")
    model = ConvLLaVA.from_pretrained(init, dtype=torch.float32)
    model.resolution = args.resolution or model.resolution
    return model


def freeze(model, phase):
    """Leaves trainable what the phase's row of table 15 ticks; returns those parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(tuple(part + "." for part in TRAINED[phase]))
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def learning_rate(step, steps, peak):
    """Linear warm-up over 3% of the steps, then a cosine to zero."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def all_sum(values, args):
    """Sums a list of numbers over the processes."""
    totals = torch.tensor(values, dtype=torch.float64, device=args.device)
    if args.world > 1:
        dist.all_reduce(totals)
    return totals.tolist()


def train(args):
    """Trains the phase; returns the folder of its checkpoint."""
    torch.manual_seed(args.seed)
    out = Path(args.out) / f"phase{args.phase}"
    args.partial = out.with_name(out.name + ".partial")
    state = load_state(args.partial) if args.resume else {}
    model = load_model(args, state).to(args.device).train()
    trained = freeze(model, args.phase)
    for part in (*model.vision.stages, model.llama):
        part.checkpointing = args.checkpointing
    dataset = LlavaDataset(zip(args.data, args.images), model, lambda image: square(image, model.resolution))
    sampler = GroupedSampler(dataset, args.micro_batch, args.accumulation, args.rank, args.world, args.seed)
    epoch_steps = len(sampler) // args.accumulation
    if not epoch_steps:
        raise ValueError(f"{len(dataset)} samples do not fill one batch of {args.batch}: use a smaller --batch")
    steps = args.steps or epoch_steps
    optimizer = torch.optim.AdamW(trained, weight_decay=0)
    settings = dict(steps=steps, batch=args.batch, lr=args.lr, seed=args.seed, resolution=model.resolution,
                    samples=len(dataset))
    if state:
        if changed := {key: was for key, was in state["settings"].items() if was != settings[key]}:
            raise ValueError(f"the stopped run at {args.partial} had {changed}: give the same to go on with it")
        optimizer.load_state_dict(state["optimizer"])
    start, unreadable = state.get("step", 0), state.get("unreadable", 0)
    sampler.epoch, sampler.skip = divmod(start, epoch_steps)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True) if args.world > 1 else model
    stop, problem = [], ""
    handlers = {kind: signal.signal(kind, lambda number, frame: stop.append(number))
                for kind in (signal.SIGINT, signal.SIGTERM)}
    if args.rank == 0:
        out.parent.mkdir(parents=True, exist_ok=True)
        moving, count = (sum(p.numel() for p in group) / 1e6 for group in (trained, model.parameters()))
        print(f"phase {args.phase}: {moving:.1f}M of {count:.1f}M parameters trained, "
              f"{steps} steps of {args.batch} samples", file=sys.stderr)
    bar = tqdm(total=steps * args.batch, initial=start * args.batch, unit="sample", disable=args.rank > 0,
               mininterval=1)
    metrics = open(out.with_name(out.name + ".metrics.jsonl"), "a" if start else "w") if args.rank == 0 else None
    batches, began = batch_stream(dataset, sampler, args), time.time()
    for step in range(start, steps):
        micros = [next(batches) for _ in range(args.accumulation)]
        for sentence in (sentence for micro in micros for sentence in micro["unreadable"]):
            tqdm.write(f"unreadable: {sentence}", file=sys.stderr)
        labels = sum(int((label[1:] != IGNORE).sum()) for micro in micros for label in micro["labels"])
        labels, lost, stopping = all_sum([labels, sum(len(m["unreadable"]) for m in micros), len(stop)], args)
        if unreadable + lost > UNREADABLE * max(len(dataset), step * args.batch):
            problem = f"{unreadable + int(lost)} samples could not be read, more than 1%: repair the data named above"
        if stopping or problem:
            break
        unreadable += int(lost)
        lr = learning_rate(step, steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        loss = 0.0
        for i, micro in enumerate(micros):
            parallel.require_backward_grad_sync = i + 1 == len(micros)  # DDP adds up the gradients once per step
            with args.autocast:
                part = parallel(micro["input_ids"], micro["images"], micro["labels"], divisor=labels / args.world)
            part.backward()
            loss += part.item()
        norm = nn.utils.clip_grad_norm_(trained, 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
        loss = all_sum([loss], args)[0] / args.world
        bar.update(args.batch)
        bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        if metrics:
            rate = (step + 1 - start) * args.batch / (time.time() - began)
            metrics.write(json.dumps(dict(step=step + 1, loss=loss, lr=lr, grad_norm=norm, labels=int(labels),
                                          samples_per_s=round(rate, 2), unreadable=unreadable)) + "\n")
            metrics.flush()
    else:
        step, stopping = steps, False
    bar.close()
    if args.rank == 0 and (stopping or problem):
        with replacing(args.partial) as new:
            model.write(new, torch.float32)
            torch.save(dict(optimizer=optimizer.state_dict(), step=step, unreadable=unreadable, settings=settings),
                       new / "training.pt")
        saved = f"stopped at step {step} of {steps} and saved: the same command with --resume goes on"
        if problem:
            raise ValueError(f"{problem} ({saved})")
        raise SystemExit(saved)
    if args.rank == 0:
        model.save_pretrained(out, torch.bfloat16)
        shutil.rmtree(args.partial, ignore_errors=True)
        tqdm.write(f"phase {args.phase} is done: {out}" + (f" ({unreadable} unreadable samples)" if unreadable else ""),
                   file=sys.stderr)
    for kind, handler in handlers.items():
        signal.signal(kind, handler)
    return out


def load_state(folder):
    """What a stopped run saved beside its weights."""
    file = folder / "training.pt"
    if not file.is_file():
        raise ValueError(f"there is no stopped run at {folder} to go on with: leave --resume out")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds on broken files
        raise ValueError(f"{file} cannot be read, leave --resume out: {str(error).splitlines()[0]}") from None


def batch_stream(dataset, sampler, args):
    """This rank's micro-batches without end, epoch after epoch."""
    while True:
        yield from DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.workers,
                              pin_memory=args.device != "cpu")
        sampler.epoch, sampler.skip = sampler.epoch + 1, 0


@torch.no_grad()
def evaluate(args, checkpoint):
    """Validation loss and exact match of greedy answers, overall and by kind (the id's first word), to metrics.

    Boxes [x1, y1, x2, y2] count as right at an intersection over union of 0.5 or more. Only the first question of a
    conversation is asked.
    """
    batch = 4 * args.micro_batch  # no gradients to keep
    model = ConvLLaVA.from_pretrained(checkpoint, device=args.device, dtype=torch.float32)
    resolution = args.resolution or model.resolution
    dataset = LlavaDataset([(args.val, args.images[0])], model, lambda image: square(image, resolution))
    asked = [dataset.entry(i)[0]["id"].rsplit("-", 1)[0] if args.generated else "all" for i in range(len(dataset))]
    loader = DataLoader(dataset, batch, collate_fn=collate, num_workers=args.workers)
    loss, labels, kinds = 0.0, 0, {}
    for n, micro in enumerate(tqdm(loader, "validation")):
        if micro["unreadable"]:
            raise ValueError(f"every validation sample has to be readable: {micro['unreadable'][0]}")
        with args.autocast:
            loss += model(micro["input_ids"], micro["images"], micro["labels"], divisor=1).item()
            labels += sum(int((label[1:] != IGNORE).sum()) for label in micro["labels"])
            ends = [int((label != IGNORE).nonzero()[0]) for label in micro["labels"]]  # the first answer's
            prompts = [ids[:end] for ids, end in zip(micro["input_ids"], ends)]
            images, first = iter(micro["images"]), []
            for ids, prompt in zip(micro["input_ids"], prompts):
                own = [next(images) for _ in range(int((ids == IMAGE_TOKEN).sum()))]
                first += own[:int((prompt == IMAGE_TOKEN).sum())]
            said = answers(model, prompts, first)
        for i, label in enumerate(micro["labels"]):
            tokens = label[ends[i]:].tolist()
            expected = model.tokenizer.decode(tokens[:tokens.index(model.tokenizer.eos)])
            kinds.setdefault(asked[n * batch + i], []).append(agree(said[i], expected.strip()))
    counts = {kind: [sum(right), len(right)] for kind, right in sorted(kinds.items())}
    short = [counts[kind] for kind in counts if kind != "box"] or list(counts.values())
    result = dict(checkpoint=str(checkpoint), val_loss=loss / labels, right=counts,
                  exact_match=sum(right for right, _ in short) / sum(total for _, total in short))
    print(f"validation loss {result['val_loss']:.4f}, exact match {result['exact_match']:.1%}", file=sys.stderr)
    for kind, (right, total) in counts.items():
        print(f"  {kind:12s} {right:4d} of {total:4d}  {right / total:6.1%}" + "  (IoU at least 0.5)" * (kind == "box"),
              file=sys.stderr)
    if not args.evaluate:
        with open(Path(args.out) / f"phase{args.phase}.metrics.jsonl", "a") as metrics:
            metrics.write(json.dumps(result) + "\n")


def answers(model, prompts, images):
    """Greedy answers of a batch, as text."""
    tokens = [[] for _ in prompts]
    for step in model.generate(prompts, images, max_new_tokens=256):
        for row, token in zip(tokens, step):
            if token not in (None, model.tokenizer.eos):
                row.append(token)
    return [model.tokenizer.decode(row).strip() for row in tokens]


def agree(said, expected):
    """Whether an answer equals the expected one; a box whether it overlaps by half."""
    boxes = [BOX.fullmatch(text) for text in (said, expected)]
    if not all(boxes):
        return said == expected
    (ax, ay, bx, by), (cx, cy, dx, dy) = ([float(v) for v in box.groups()] for box in boxes)
    shared = max(0, min(bx, dx) - max(ax, cx)) * max(0, min(by, dy) - max(ay, cy))
    union = (bx - ax) * (by - ay) + (dx - cx) * (dy - cy) - shared
    return union > 0 and shared / union >= 0.5


def main():
    try:
        args = arguments()
        if args.device != "cpu":
            torch.cuda.set_device(args.device)
        if args.world > 1:
            dist.init_process_group("nccl" if args.device != "cpu" else "gloo")
        if args.generated and args.rank == 0:
            names = [file.name for file in ([args.val] if args.evaluate else [*args.data, args.val])]
            generate(NANO / "out", {name: FILES[name] for name in names})
        if args.world > 1:
            dist.barrier()  # the others wait for the data
        checkpoint = args.evaluate or train(args)
        if args.val and args.rank == 0:
            evaluate(args, checkpoint)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:  # a data process's error ends with the sentence
        print(f"train.py: {str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()

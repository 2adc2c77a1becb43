"""Measures what the README claims.

    python tests/make_checkpoint.py /tmp/random-7b
    python tests/bench.py load /tmp/random-7b --device cpu     # loading, memory and speed of a checkpoint
    python tests/bench.py data --samples 3000000               # memory of a rank and its data processes
    python tests/bench.py flops                                # the paper's figure 2
    python tests/bench.py train --phase 3 --resolution 768     # ten steps of the 7B, or what fits of it, on a GPU
"""
import argparse
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import train  # noqa: E402
from convllava import ConvLLaVA  # noqa: E402
from convnext import CONVNEXT_L, CONVNEXT_L_DAGGER, ConvNeXt  # noqa: E402
from data.conversation import IGNORE, IMAGE_TOKEN, encode_conversation  # noqa: E402
from data.images import read_image, square  # noqa: E402
from data.plan import flops, peak_bytes, state_bytes  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402

DATA = Path(__file__).parents[1] / "data"
EXAMPLE = DATA / "nano" / "examples" / "receipt.png"


def most_held(device):
    """The most memory held so far: of the process, or of the GPU's allocator."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def load(args):
    """Loads a checkpoint and answers one question with it."""
    before, started = most_held(args.device), time.perf_counter()
    model = ConvLLaVA.from_pretrained(args.checkpoint, device=args.device, dtype=torch.bfloat16)
    loaded, peak = time.perf_counter() - started, most_held(args.device) - before
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"load: {loaded:.1f} s, peak {peak / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights: "
          f"{peak / weights:.3f}x")
    prompt, _ = encode_conversation(model.tokenizer, [(1, "What is the total?", None)])
    times = [time.perf_counter()]
    for _ in model.generate([prompt], [square(read_image(EXAMPLE), model.resolution)], max_new_tokens=args.tokens):
        times.append(time.perf_counter())
    if len(times) < 3:
        raise SystemExit("the answer ended at once: nothing to time")
    each = (times[-1] - times[1]) / (len(times) - 2)
    peak = most_held(args.device) - before
    print(f"answer at {model.resolution} px: first token after {times[1] - times[0]:.1f} s, "
          f"then {1 / each:.2f} tokens/s; peak {peak / 1e9:.2f} GB: {peak / weights:.3f}x the weights")


def own_bytes(pids):
    """Memory of processes, what they share counted once (Linux's proportional set sizes)."""
    return sum(int(line.split()[1]) * 1024 for pid in pids
               for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Pss:"))


def data(args):
    """A rank with data processes that all have read samples: memory against the same on a hundred samples."""
    from torch.utils.data import DataLoader

    from data.dataset import GroupedSampler, LlavaDataset, collate
    from llama import Tokenizer

    class Model:  # what the dataset asks of one
        tokenizer, vision, max_length = Tokenizer(DATA / "nano/backbones/vicuna-nano/tokenizer.model"), ConvNeXt(
            (1,) * 5, (1,) * 5), 2048
    said, found = "a description of what is seen, " * 15, []
    with tempfile.TemporaryDirectory() as folder:
        for samples in (100 * args.workers, args.samples):
            file = Path(folder) / f"{samples}.json"
            with open(file, "w") as out:
                for i in range(samples):
                    out.write(("[" if not i else ",\n") + json.dumps({"id": i, "conversations": [
                        {"from": "human", "value": f"What is {i}?"}, {"from": "gpt", "value": said}]}))
                out.write("]")
            started = time.perf_counter()
            dataset = LlavaDataset([(file, folder)], Model, None)
            sampler = GroupedSampler(dataset, 16)
            loader = iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=args.workers))
            took = time.perf_counter() - started
            for _ in range(5 * args.workers):
                next(loader)
            children = [worker.pid for worker in loader._workers]
            found.append(own_bytes([os.getpid(), *children]))
            size = file.stat().st_size
            del loader
    print(f"{args.samples:,} samples, {size / 1e9:.2f} GB of JSON, found in {took:.0f} s; a rank with {args.workers} "
          f"data processes: {(found[1] - found[0]) / 1e9:.2f} GB more than with a hundred samples each, "
          f"{(found[1] - found[0]) / size:.2f}x the JSON")


def figure2(args):
    """Forward TFLOPs of an image at Vicuna-7B, its visual tokens alone: ViT-L/14, ConvNeXt-L and ConvNeXt-L†."""
    with torch.device("meta"):
        llama = Llama(LlamaConfig())
        models = [ConvLLaVA(ConvNeXt(**sizes), llama) for sizes in (CONVNEXT_L, CONVNEXT_L_DAGGER)]
    config, width, depth = llama.config, 1024, 24  # of ViT-L
    print("| pixels | ViT-L/14 | ConvNeXt-L | ConvNeXt-L† | ViT / ConvNeXt | ConvNeXt / † |\n|" + " --- |" * 6)
    for side in (336, 512, 768, 1024, 1536):
        tokens = (side // 14) ** 2
        vit = 2 * tokens * (3 * 14 ** 2 * width + depth * 12 * width ** 2) + depth * 4 * tokens ** 2 * width
        matrices = sum(p.numel() for p in llama.layers.parameters() if p.dim() > 1)
        vit += 2 * tokens * (width + config.hidden_size) * config.hidden_size  # the projector
        vit += 2 * tokens * matrices + 4 * tokens ** 2 * config.hidden_size * config.num_hidden_layers
        four, five = (sum(forward for forward, _ in flops(model, side).values()) for model in models)
        visual = (vit, tokens), (four, (side // 32) ** 2), (five, (side // 64) ** 2)
        print(f"| {side} | " + " | ".join(f"{count / 1e12:.1f} ({n} tokens)" for count, n in visual)
              + f" | {vit / four:.1f}× | {four / five:.1f}× |")


def matrix_peak(device, side):
    """FLOP/s of the best of ten bf16 matrix products."""
    a, times = torch.randn(side, side, device=device, dtype=torch.bfloat16), []
    for _ in range(10):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for it
        times.append(time.perf_counter() - started)
    return 2 * side ** 3 / min(times)


def steps(args):
    """Steps of a phase of ConvLLaVA-7B with random weights, pixels and tokens: memory, speed, share of the peak.

    A step has what one of eight GPUs takes of the recipe's batch. Of the language model as many layers as fit.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = (torch.cuda.get_device_properties(0).total_memory if device == "cuda"
              else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    parts, _, batch, _ = train.RECIPES["table15"][args.phase]
    args.micro_batch = args.micro_batch or train.PRESETS["convllava-7b"]["micro_batch"][args.phase - 1]
    accumulation, before = max(1, batch // 8 // args.micro_batch), most_held(device)

    def make(on, layers):
        with torch.device(on):
            model = ConvLLaVA(ConvNeXt(**CONVNEXT_L_DAGGER), Llama(LlamaConfig(num_hidden_layers=layers)),
                              resolution=args.resolution).train()
        train.check_resolution(model)
        train.freeze(model, parts)
        train.slim(model)
        return model

    for layers in [args.layers] if args.layers else range(32, 0, -4):
        planned = make("meta", layers)
        train.norms_in_float32(planned)
        plan = sum(state_bytes(planned).values()) + sum(peak_bytes(
            planned, args.micro_batch, args.resolution, args.text, lambda: torch.autocast("cpu", torch.bfloat16),
            args.checkpointing))
        if plan < 0.92 * memory or args.layers:
            break
    else:
        raise SystemExit(f"not even {layers} layers fit: use a smaller --micro-batch, or --checkpointing")
    model = make(device, layers)
    model.llama.init_weights()
    for part in (*model.vision.stages, model.llama):
        part.checkpointing = args.checkpointing
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-5, weight_decay=0, fused=True)
    ids = torch.randint(3, model.llama.config.vocab_size, (args.text + 2,))
    ids[1] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:2] = IGNORE
    images = [torch.randn(3, args.resolution, args.resolution) for _ in range(args.micro_batch)]
    micro = dict(input_ids=[ids] * args.micro_batch, labels=[labels] * args.micro_batch,
                 images=[image.pin_memory() for image in images] if device == "cuda" else images)
    settings = argparse.Namespace(device=device, world=1, sharded=False,
                                  autocast=lambda: torch.autocast(device, torch.bfloat16))
    tokens = (args.resolution // model.vision.compression) ** 2 + args.text
    work = sum(both for _, both in flops(planned, args.resolution, args.text).values())
    print(f"phase {args.phase} at {args.resolution} px, {layers} layers, {accumulation} x {args.micro_batch} samples a "
          f"step, {work / 1e12:.1f} TFLOPs a sample")
    for compiled in (False, True)[:1 + args.compile]:
        if compiled:
            train.compile_blocks(model, settings)
        for step in range(1 + args.steps):  # the first starts up
            if step == 1:
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()  # kernels were chosen, frozen matrices float32
                started = time.perf_counter()
            labelled = args.micro_batch * accumulation * args.text
            loss, norm = train.update(model, optimizer, [micro] * accumulation, 2e-5, labelled, settings)
            if not norm <= train.EXPLODED:
                raise SystemExit("a step was skipped, its gradient exploded: nothing to time")
        each = (time.perf_counter() - started) / args.steps / args.micro_batch / accumulation
        held, peak = most_held(device) - before, matrix_peak(device, 16384 if device == "cuda" else 2048)
        print(f"{'compiled' if compiled else 'as it is'}: {1 / each:.2f} samples/s, {tokens / each:.0f} tokens/s, "
              f"{work / each / 1e12:.1f} TFLOP/s of {peak / 1e12:.1f}: {work / each / peak:.1%}; "
              f"peak {held / 1e9:.2f} GB, planned {plan / 1e9:.2f}: {plan / held - 1:+.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("load", help=load.__doc__)
    command.set_defaults(run=load)
    command.add_argument("checkpoint")
    command.add_argument("--device", choices=("cpu", "cuda")[:1 + torch.cuda.is_available()], default="cpu")
    command.add_argument("--tokens", type=int, default=16)
    command = commands.add_parser("data", help=data.__doc__)
    command.set_defaults(run=data)
    command.add_argument("--samples", type=int, default=3_000_000)
    command.add_argument("--workers", type=int, default=8)
    commands.add_parser("flops", help=figure2.__doc__).set_defaults(run=figure2)
    command = commands.add_parser("train", help=steps.__doc__)
    command.set_defaults(run=steps)
    command.add_argument("--phase", type=int, choices=(1, 2, 3), default=3)
    command.add_argument("--resolution", type=int, default=1536)
    command.add_argument("--layers", type=int, help="of the language model (default: as many of 32 as fit)")
    command.add_argument("--micro-batch", type=int, help="samples at a time (default: train.py's)")
    command.add_argument("--text", type=int, default=400, help="tokens of a sample, each with a label")
    command.add_argument("--steps", type=int, default=10)
    command.add_argument("--checkpointing", action="store_true")
    command.add_argument("--compile", action="store_true", help="as train.py's, after the same without")
    args = parser.parse_args()
    for name, value in vars(args).items():
        if type(value) is int and value < 1:
            parser.error(f"--{name.replace('_', '-')} is {value}: it should be at least 1")
    try:
        args.run(args)
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"bench.py: {str(error).splitlines()[0]}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)

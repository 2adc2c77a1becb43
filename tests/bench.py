"""Measures what the README files claim; tests/README.md says what the commands printed.

    python tests/make_checkpoint.py /tmp/random-7b
    python tests/bench.py load /tmp/random-7b --device cpu     # loading, memory and speed of a checkpoint
    python tests/bench.py data --samples 3000000               # memory of a process and its data processes
    python tests/bench.py flops                                # the paper's figure 2
    python tests/bench.py plan --phase 3 --preset convllava-7b --gpus 8 --tflops 140 --text 400
    python tests/bench.py train --phase 3 --micro-batch 2      # steps of the 7B, or what fits of it, on one GPU
    python tests/bench.py questions                            # a benchmark in batches of 1, 8 and 32
    python tests/bench.py typefaces DejaVuSans-Bold.ttf        # what the small model reads in other print
    python tests/bench.py types                                # its validation in float32, bf16 and 8 bits
    python tests/bench.py peers                                # beside transformers, timm and the original's ways

`plan` and `train` take train.py's options too.
"""
import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import sample  # noqa: E402
import train  # noqa: E402
from convllava import ConvLLaVA  # noqa: E402
from convnext import CONVNEXT_L, CONVNEXT_L_DAGGER, ConvNeXt  # noqa: E402
from data.answers import WINDOW  # noqa: E402
from data.errors import print_error  # noqa: E402
from data.benchmarks import read_benchmark  # noqa: E402
from data.conversation import IGNORE, IMAGE_TOKEN, Tokenizer, encode_conversation  # noqa: E402
from data.dataset import MicroBatchSampler, LlavaDataset, collate  # noqa: E402
from data.images import read_image, square  # noqa: E402
from data.nano.generate import FILES, caption, generate, make_page  # noqa: E402
from data.nano.generate import questions as questions_of  # noqa: E402
from data.nano.letters import Print  # noqa: E402
from data.validation import agree, greedy_answers, kinds_by_id, share_right, validate  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402
from measure import matrix_peak, peak_memory, relative_difference  # noqa: E402
from peers import ROWS, compare_with_peers  # noqa: E402
from plan import as_a_gpu_computes, flops, llama_config, make_model, peak_bytes, print_plan, state_bytes  # noqa: E402

NANO = Path(__file__).parents[1] / "data" / "nano"
EXAMPLE = NANO / "examples" / "receipt.png"
RECIPE_GPUS = 8  # the GPUs of the paper's run, of which `train` is one


# ---- load ----
def load(args):
    """Loads a checkpoint and answers one question with it."""
    # load
    before, started = peak_memory(args.device), time.perf_counter()
    model = ConvLLaVA.from_pretrained(args.checkpoint, device=args.device, dtype=sample.DTYPES[args.dtype])
    seconds, peak = time.perf_counter() - started, peak_memory(args.device) - before
    weights = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])  # int8's are buffers
    print(f"load: {seconds:.1f} s, peak {peak / 1e9:.2f} GB for {weights / 1e9:.2f} GB of weights: "
          f"{peak / weights:.3f}x")

    # answer
    prompt, _ = encode_conversation(model.tokenizer, [(1, "What is the total?", None)])
    times = [time.perf_counter()]
    for _ in model.generate([prompt], [square(read_image(EXAMPLE), model.resolution)], max_new_tokens=args.tokens):
        times.append(time.perf_counter())
    if len(times) < 3:
        raise SystemExit("the answer ended at once: nothing to time")
    seconds_per_token = (times[-1] - times[1]) / (len(times) - 2)
    peak = peak_memory(args.device) - before
    print(f"answer at {model.resolution} px: first token after {times[1] - times[0]:.1f} s, "
          f"then {1 / seconds_per_token:.2f} tokens/s; peak {peak / 1e9:.2f} GB: {peak / weights:.3f}x the weights")


# ---- data ----
def data(args):
    """Memory of a process and its data processes that read samples, against the same with a hundred samples each."""
    with tempfile.TemporaryDirectory() as folder:
        few, many = Path(folder) / "few.json", Path(folder) / "many.json"
        write_samples(few, 100 * args.workers)
        write_samples(many, args.samples)
        few_bytes, _ = bytes_while_reading(few, args.workers)
        many_bytes, seconds = bytes_while_reading(many, args.workers)
        size = many.stat().st_size
    added = many_bytes - few_bytes
    print(f"{args.samples:,} samples, {size / 1e9:.2f} GB of JSON, opened in {seconds:.0f} s; a process with "
          f"{args.workers} data processes: {added / 1e9:.2f} GB more than with a hundred samples each, "
          f"{added / size:.2f}x the JSON")


def write_samples(file, count):
    """Writes an annotation file of samples without images."""
    answer = {"from": "gpt", "value": "a description of what is seen, " * 15}
    with open(file, "w") as out:
        for i in range(count):
            question = {"from": "human", "value": f"What is {i}?"}
            out.write(("[" if i == 0 else ",\n") + json.dumps({"id": i, "conversations": [question, answer]}))
        out.write("]")


def bytes_while_reading(file, workers):
    """Bytes of this process and its data processes while they read the file, and seconds that it took to open it."""
    started = time.perf_counter()
    tokenizer = Tokenizer(NANO / "backbones" / "vicuna-nano" / "tokenizer.model")
    dataset = LlavaDataset([(file, file.parent)], tokenizer, compression=64, max_length=2048, transform=None)
    sampler = MicroBatchSampler(dataset, batch=16, micro_batch=16)
    batches = iter(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, num_workers=workers))
    seconds = time.perf_counter() - started
    for _ in range(5 * workers):
        next(batches)
    return proportional_bytes([os.getpid(), *(worker.pid for worker in batches._workers)]), seconds


def proportional_bytes(pids):
    """Memory of processes, where what several share counts once (Linux's proportional set sizes)."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


# ---- flops ----
def figure2(args):
    """Forward TFLOPs of an image at Vicuna-7B, its visual tokens alone: ViT-L/14, ConvNeXt-L and ConvNeXt-L†."""
    with torch.device("meta"):
        llama = Llama(LlamaConfig())
        convnext = ConvLLaVA(ConvNeXt(**CONVNEXT_L), llama)
        dagger = ConvLLaVA(ConvNeXt(**CONVNEXT_L_DAGGER), llama)
    print("| pixels | ViT-L/14 | ConvNeXt-L | ConvNeXt-L† | ViT / ConvNeXt | ConvNeXt / † |\n|" + " --- |" * 6)
    for side in (336, 512, 768, 1024, 1536):
        vit = vit_flops(side, llama)
        without_stage_5 = sum(forward for forward, _ in flops(convnext, side).values())
        with_stage_5 = sum(forward for forward, _ in flops(dagger, side).values())
        cells = [f"{count / 1e12:.1f} ({(side // pixels) ** 2} tokens)"
                 for count, pixels in ((vit, 14), (without_stage_5, 32), (with_stage_5, 64))]
        ratios = vit / without_stage_5, without_stage_5 / with_stage_5
        cells += [f"{ratio:.1f}×" for ratio in ratios]
        print(f"| {side} | {' | '.join(cells)} |")


def vit_flops(side, llama):
    """Forward FLOPs of a LLaVA with ViT-L/14 in place of the ConvNeXt."""
    width, depth, patch, hidden = 1024, 24, 14, llama.config.hidden_size
    tokens = (side // patch) ** 2
    vit = 2 * tokens * (3 * patch ** 2 * width + depth * 12 * width ** 2) + depth * 4 * tokens ** 2 * width
    projector = 2 * tokens * (width + hidden) * hidden
    matrices = sum(p.numel() for p in llama.layers.parameters() if p.dim() > 1)
    language = 2 * tokens * matrices + llama.config.num_hidden_layers * 4 * tokens ** 2 * hidden
    return vit + projector + language


# ---- plan ----
def plan(args, train_args):
    """Parameters, FLOPs, memory and hours of a phase, from shapes alone. Takes train.py's options too."""
    run = train.make_run(train_args, 0, args.gpus, "cpu", train_args.dtype or "bf16")
    print_plan(run, args.tflops, args.text)


# ---- train ----
def time_training(args, train_args):
    """Steps of a phase with random weights, pixels and text: memory, speed and share of the peak.

    A step has what one of eight GPUs takes of the recipe's batch. The language model has as many layers as fit. Takes
    train.py's options too; ten steps of convllava-7b are the default.
    """
    # the model
    device = "cuda" if torch.cuda.is_available() else "cpu"
    run = train.make_run(train_args, 0, RECIPE_GPUS, device, train_args.dtype or "bf16")
    if run.sharded:
        raise ValueError("this measures a single GPU: leave --parallel fsdp out")
    layers, planned = layers_that_fit(run, args)
    before = peak_memory(device)
    model = make_model(run, layers, device).train()
    model.llama.init_weights()
    for part in (*model.vision.stages, model.llama):
        part.checkpointing = train_args.checkpointing
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.phase.lr, weight_decay=0, fused=True)

    # what a sample costs
    tokens = (model.resolution // model.vision.compression) ** 2 + args.text
    work = sum(training for _, training in flops(model, model.resolution, args.text).values())
    print(f"phase {train_args.phase} at {model.resolution} px, {layers} layers, {run.accumulation} x {run.micro_batch} "
          f"samples a step, {work / 1e12:.1f} TFLOPs a sample")

    # steps, as they are and compiled
    micro = random_micro_batch(model, run.micro_batch, args.text, device)
    for is_compiled in (False, True) if train_args.compile else (False,):
        if is_compiled:
            train.compile_blocks(model, device)
        seconds = seconds_per_sample(model, trained, optimizer, micro, run, args.text)
        used, peak = peak_memory(device) - before, matrix_peak(device)
        print(f"{'compiled' if is_compiled else 'as it is'}: {1 / seconds:.2f} samples/s, {tokens / seconds:.0f} "
              f"tokens/s, {work / seconds / 1e12:.1f} TFLOP/s of {peak / 1e12:.1f}: {work / seconds / peak:.1%}; "
              f"peak {used / 1e9:.2f} GB, planned {planned / 1e9:.2f}: {planned / used - 1:+.1%}")


def layers_that_fit(run, args):
    """(layers of the language model, bytes that the phase is planned to take with them) for the memory there is."""
    if run.device == "cuda":
        memory = torch.cuda.get_device_properties(0).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    dtype = torch.bfloat16 if run.dtype == "bf16" else torch.float32
    choices = [args.layers] if args.layers else range(llama_config(run).num_hidden_layers, 0, -4)
    for layers in choices:
        model = make_model(run, layers)
        with as_a_gpu_computes() if run.device == "cuda" else nullcontext():
            peak = peak_bytes(model, run.micro_batch, model.resolution, args.text, dtype, run.args.checkpointing)
        planned = sum(state_bytes(model).values()) + sum(peak)
        if args.layers or planned < 0.92 * memory:
            return layers, planned
    raise SystemExit(f"not even {layers} layers fit: use a smaller --micro-batch, or --checkpointing")


def random_micro_batch(model, batch, text, device):
    """Samples of an image and `text` tokens, each with a label."""
    ids = torch.randint(3, model.llama.config.vocab_size, (2 + text,))
    ids[1] = IMAGE_TOKEN
    labels = ids.clone()
    labels[:2] = IGNORE
    images = [torch.randn(3, model.resolution, model.resolution) for _ in range(batch)]
    if device == "cuda":
        images = [image.pin_memory() for image in images]
    return dict(input_ids=[ids] * batch, labels=[labels] * batch, images=images)


def seconds_per_sample(model, trained, optimizer, micro, run, text):
    """The time of training steps, after one that starts everything up."""
    num_samples = run.accumulation * run.micro_batch  # of a step
    steps = run.args.steps or 10
    for step in range(1 + steps):
        if step == 1:
            if run.device == "cuda":
                torch.cuda.reset_peak_memory_stats()  # the first step also tries kernels
            started = time.perf_counter()
        num_labels = run.world * num_samples * text
        _, norm = train.accumulate_gradients(model, trained, [micro] * run.accumulation, num_labels, run)
        if not norm <= train.EXPLODED:
            raise SystemExit("the gradient exploded: nothing to time")
        optimizer.step()
        optimizer.zero_grad()
    if run.device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / steps / num_samples


# ---- questions ----
def questions(args):
    """Questions per second of sample.py --questions on the small model, in batches of 1, 8 and 32 by turns."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = ConvLLaVA.from_pretrained(sample.NANO, device, torch.float32)
    encodings = []
    model.vision.register_forward_hook(lambda *_: encodings.append(1))
    sizes, seconds, answers = (1, 8, 32), {}, {}
    with tempfile.TemporaryDirectory() as folder:
        file = write_questions(Path(folder), args.pages, args.each)
        benchmark = read_benchmark(file, folder)
        for round_number in range(1 + args.rounds):  # the first starts everything up
            for size in sizes:
                encodings.clear()
                started = time.perf_counter()
                answers[size] = answers_in_batches(model, benchmark.questions, size)
                if round_number:
                    seconds.setdefault(size, []).append(time.perf_counter() - started)
    total = args.pages * args.each
    print(f"{total} questions about {args.pages} pages on {device}: {len(encodings)} encodings")
    for size in sizes:
        speed = total / statistics.median(seconds[size])
        ratio = statistics.median(one / many for one, many in zip(seconds[1], seconds[size]))
        num_same = sum(a == b for a, b in zip(answers[1], answers[size]))
        print(f"{size:3d} at a time: {speed:6.2f} questions/s, {ratio:.2f}x; {num_same} answers as one at a time")


def write_questions(folder, num_pages, each):
    """Writes drawn pages and LLaVA's question lines about them; returns the lines' file."""
    rng, entries, number = random.Random(0), [], 0
    while number < num_pages:
        page = make_page(rng, "val")
        if len(page.facts) < each:
            continue
        (folder / f"{number}.jpg").write_bytes(page.jpeg())
        for i, fact in enumerate(page.facts[:each]):
            entries.append(dict(question_id=f"{number}-{i}", image=f"{number}.jpg", text=fact.question))
        number += 1
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def answers_in_batches(model, all_questions, batch):
    """The answers of sample.py --questions --batch, in the order of the questions."""
    args = argparse.Namespace(resolution=None, any_aspect=False, batch=batch, max_new_tokens=512)
    texts = []
    for start in range(0, len(all_questions), WINDOW):
        window = all_questions[start:start + WINDOW]
        by_place = {place: text for place, text, _ in sample.answer_window(model, window, args)}
        texts += [by_place[place] for place in range(len(window))]
    return texts


# ---- typefaces ----
def typefaces(args):
    """Asks the small model about fresh pages, printed in Pillow's own typeface and in those of font files."""
    for font in args.fonts:
        if not Path(font).is_file():
            raise ValueError(f"{font} is no file: give the path of a font, as .ttf or .otf")
    model = ConvLLaVA.from_pretrained(args.checkpoint, dtype=torch.float32)
    kinds = {"read a field": ("read", 2), "relation": ("relation", 1), "box": ("box", 1)}  # questions about a page
    print(f"| typeface | {' | '.join(kinds)} | page transcribed | its lines |")
    print("| --- " * (len(kinds) + 3) + "|")
    for typeface in (None, *args.fonts):
        right, total = Counter(), Counter()
        for index in tqdm(range(args.pages), name_of(typeface), leave=False):
            rng = random.Random(f"typefaces/{index}")
            page = make_page(rng, "val", look=Print(typeface=typeface))
            asked = [("page", *turn) for turn in caption(page, rng)]
            for name, (kind, count) in kinds.items():
                asked += [(name, fact.question, fact.answer) for fact in questions_of(page, rng, count, {kind: 1})]
            answers = ask_about(model, page.image(), [question for _, question, _ in asked])
            for (name, _, expected), answer in zip(asked, answers):
                right[name] += agree(answer, expected)
                total[name] += 1
            lines = asked[0][2].split("\n")
            right["lines"] += sum(map(str.__eq__, lines, answers[0].split("\n")))
            total["lines"] += len(lines)
        shares = [f"{right[name] / total[name]:.1%}" if total[name] else "none asked"
                  for name in (*kinds, "page", "lines")]
        print(f"| {name_of(typeface)} | {' | '.join(shares)} |", flush=True)


def name_of(typeface):
    return Path(typeface).stem if typeface else "Pillow's own"


def ask_about(model, image, texts):
    """Greedy answers to questions about an image, which is encoded once."""
    visual, = model.encode_images([square(image, model.resolution)])
    prompts = [encode_conversation(model.tokenizer, [(1, text, None)])[0] for text in texts]
    return greedy_answers(model, prompts, [visual] * len(texts), 128)


# ---- types ----
def types(args):
    """Validates the small model in float32, bf16 and 8 bits, and compares its logits in these types."""
    file = "val-instructions.json"
    generate(NANO / "out", {file: FILES[file]})
    columns = ("type", "short answers", "box", "page transcribed", "largest difference of a logit",
               "norm of the difference")
    print(f"| {' | '.join(columns)} |\n|" + " --- |" * len(columns))
    exact = None  # float32's logits
    for name in ("fp32", "bf16", "int8"):
        model = ConvLLaVA.from_pretrained(args.checkpoint, dtype=sample.DTYPES[name]).requires_grad_(False)
        dataset = train.make_dataset([(NANO / "out" / file, NANO / "out")], model,
                                     partial(square, resolution=model.resolution))
        _, counts = validate(model, dataset, kinds_by_id(dataset), batch=64, workers=1, autocast=nullcontext)
        micros = [collate([dataset[index]]) for index in range(args.samples)]
        logits = torch.cat([model(micro["input_ids"], micro["images"])[0] for micro in micros])  # (T, V)
        exact = logits if exact is None else exact
        shares = [share_right(counts), *(right / total for right, total in (counts["box"], counts["transcription"]))]
        cells = [name, *(f"{share:.1%}" for share in shares), f"{(logits - exact).abs().max():.2f}",
                 f"{relative_difference(logits, exact):.1%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


# ---- The program ----
def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} should be at least 1")
    return number


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)

    def add_command(name, function):
        command = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        return command.add_argument

    add = add_command("load", load)
    add("checkpoint")
    add("--device", choices=("cpu", "cuda") if torch.cuda.is_available() else ("cpu",), default="cpu")
    add("--dtype", choices=("bf16", "int8"), default="bf16")
    add("--tokens", type=positive, default=16, help="of the answer (default: 16)")
    add = add_command("data", data)
    add("--samples", type=positive, default=3_000_000)
    add("--workers", type=positive, default=8, help="data processes (default: 8)")
    add_command("flops", figure2)
    add = add_command("plan", plan)
    add("--gpus", type=positive, default=8, help="(default: 8)")
    add("--tflops", type=positive, default=140, help="TFLOP/s of each GPU (default: 140)")
    add("--text", type=positive, default=400, help="tokens of a sample, each with a label (default: 400)")
    add = add_command("train", time_training)
    add("--layers", type=positive, help="of the language model (default: as many as fit)")
    add("--text", type=positive, default=400, help="tokens of a sample, each with a label (default: 400)")
    add = add_command("questions", questions)
    add("--pages", type=positive, default=10, help="(default: 10)")
    add("--each", type=positive, default=6, help="questions about a page (default: 6)")
    add("--rounds", type=positive, default=2, help="of which the median counts (default: 2)")
    add = add_command("typefaces", typefaces)
    add("fonts", nargs="*", metavar="FONT.ttf")
    add("--checkpoint", default=sample.NANO)
    add("--pages", type=positive, default=100, help="for each typeface (default: 100)")
    add = add_command("types", types)
    add("--checkpoint", default=sample.NANO)
    add("--samples", type=positive, default=100, help="whose logits are compared (default: 100)")
    add = add_command("peers", compare_with_peers)
    add("--only", nargs="+", choices=ROWS, metavar="ROW", help=f"of {', '.join(ROWS)} (default: all)")
    add("--rounds", type=positive, default=5, help="of which the median counts (default: 5)")
    add("--checkpoint", metavar="FOLDER", help="for the row load: what tests/make_checkpoint.py has written")
    return parser


def main(argv=None):
    parser = make_parser()
    args, other_options = parser.parse_known_args(argv)
    try:
        if args.function is plan:
            plan(args, train.arguments(other_options))
        elif args.function is time_training:  # ten steps of the 7B, where the options do not say otherwise
            time_training(args, train.arguments(["--preset", "convllava-7b", *other_options]))
        elif other_options:
            parser.error(f"unrecognized arguments: {' '.join(other_options)}")
        else:
            args.function(args)
    except Exception as error:
        print_error("bench.py", error, out_of_memory="use a smaller --micro-batch, or --checkpointing")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

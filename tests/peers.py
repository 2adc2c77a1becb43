"""This project beside what computes the same elsewhere: transformers, timm, and the original's ways of doing it.

    python tests/bench.py peers                                                 # every row of the table
    python tests/bench.py peers --only decode load --checkpoint /tmp/random-7b

In each row both sides compute once, as a warm-up and to check that the results agree. Then they are timed by
turns. A time is the median of the rounds, and so is the ratio, the peer's time over ours. Both have the same random
weights and compute on processors, in bf16 where the row names no other type.

The limit is what the machine does just after the row: the FLOP/s of a matrix product, or the bytes per second that a
copy reads and writes; or the part of the row that nobody can leave out. The share of it is our FLOP/s over the
machine's (torch's counter leaves out attention's two products on processors), or the bytes of the weights, each read
once, over the copy's.
"""
import os
import statistics
import tempfile
from functools import partial
from operator import ne
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import train
from convllava import ConvLLaVA
from convnext import CONVNEXT_L, CONVNEXT_L_DAGGER, NANO, OPENCLIP_NAMES, ConvNeXt
from convnext import published_name as convnext_name
from data.benchmarks import read_benchmark
from data.images import STD, read_image, square
from data.weights import find_tensors
from llama import Int8Linear, KVCache, Llama, LlamaConfig
from measure import (
    ROOT, compare, copy_peak, in_new_process, matrix_peak, peak_memory, relative_difference, run_python, timed,
    timed_decoding)
from plan import state_bytes
from references import picture, random_ids, random_input, randomise

SMALL_MODEL = "data/nano/convllava-nano"

# ---- The sizes, which test_peers.py makes smaller ----
LLAMA = dict(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,  # TinyLlama's, 1.1B
             num_attention_heads=32, num_key_value_heads=4)
PIXELS, RESOLUTIONS = 768, (512, 768, 1024, 1280, 1536)
PREFILL, PROMPT, NEW_TOKENS = 640, 64, 16
PHOTO, PHOTO_PIXELS = (4000, 3000), 1536
TRAINING = dict(convnext=dict(depths=(1, 1, 4, 2, 2), dims=(24, 48, 128, 256, 320)), pixels=512,  # the small model's
                llama=LLAMA | dict(num_hidden_layers=4), texts=(400, 20, 240, 40, 160, 60, 120, 80), micro_batch=2)

BF16 = 0.06  # relative difference of two ways to compute in bf16: 0.03 after 22 layers, 0.3 if one had no attention
INT8 = 0.15  # the same, where one side's matrices are rounded to 8 bits
LOSS = 2e-3  # the same, of a training step's loss and the norm of its gradient


# ---- The table ----
COLUMNS = "row", "ours", "peer", "peer over ours", "limit", "share of the limit"


def compare_with_peers(args):
    """Times beside transformers, timm and the original's ways, and shares of the machine's limit, on processors."""
    os.environ |= dict(TRANSFORMERS_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1", HF_HUB_OFFLINE="1")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds\n\n"
          f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    failed = []
    for key in args.only or ROWS:
        try:
            rows = ROWS[key](args)
        except ModuleNotFoundError as error:
            rows = [row(key, f"{error.name} is not installed")]
        except (ImportError, ValueError, RuntimeError) as error:  # a broken library, unequal results, a full memory
            sentence, *_ = str(error).split("\n")
            rows = [row(key, f"not timed: {sentence}")]
            failed.append(key)
        for cells in rows:
            print(f"| {' | '.join(cells)} |", flush=True)
    if failed:
        raise ValueError(f"these rows could not be compared: {', '.join(failed)}")


def row(name, ours, peer="", ratio=None, limit="", share=None):
    """The cells of a line of the table."""
    return name, ours, peer, f"{ratio:.2f}×" if ratio else "", limit, f"{share:.0%}" if share else ""


def time_row(name, result, limit, share):
    return row(name, f"{result.ours:.3g} s", f"{result.peer:.3g} s", result.ratio, limit, share)


def compute_row(name, result, dtype=torch.bfloat16):
    """The row of what is limited by the speed of matrix products."""
    peak = matrix_peak("cpu", dtype)
    return time_row(name, result, f"{peak / 1e12:.3f} TFLOP/s", result.flops / result.ours / peak)


def memory_row(ours, peer, least):
    """The row below that of a new process's time. least: bytes that cannot be done without."""
    return row("its peak memory", f"{ours / 1e9:.2f} GB", f"{peer / 1e9:.2f} GB", peer / ours,
               f"{least / 1e9:.2f} GB of state", least / ours)


# ---- ConvNeXt ----
def random_model(make, dtype=torch.bfloat16, std=0.02):
    """A model with random weights, always the same ones, which never exist in another type."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = make()
    return randomise(model.to(dtype).to_empty(device="cpu"), std)


@torch.inference_mode()
def convnext_of_five_stages(args):
    """A forward pass, beside transformers' ConvNextModel."""
    from with_transformers import convnext_of
    model = random_model(lambda: ConvNeXt(**CONVNEXT_L_DAGGER))
    peer, pixels = convnext_of(model), random_input(1, 3, PIXELS, PIXELS).bfloat16()
    result = compare(timed(model, pixels), timed(lambda: peer(pixels).last_hidden_state), relative_difference, BF16,
                     args.rounds)
    return [compute_row(f"ConvNeXt-L† at {PIXELS} px; transformers", result)]


@torch.inference_mode()
def convnext_of_four_stages(args):
    """A forward pass, beside timm's convnext_large."""
    from timm import create_model
    model = random_model(lambda: ConvNeXt(**CONVNEXT_L))
    peer, pixels = create_model("convnext_large").eval().bfloat16(), random_input(1, 3, PIXELS, PIXELS).bfloat16()
    tensors = {convnext_name(name, OPENCLIP_NAMES): value for name, value in model.state_dict().items()}
    peer.load_state_dict(peer.state_dict() | tensors)  # its head, which is not used, stays
    result = compare(timed(model, pixels), timed(peer.forward_features, pixels), relative_difference, BF16, args.rounds)
    return [compute_row(f"ConvNeXt-L at {PIXELS} px; timm", result)]


@torch.inference_mode()
def resolutions(args):
    """Forward passes at several resolutions by turns, and the exponent of the time over the pixels. No peer."""
    model, flops = random_model(lambda: ConvNeXt(**CONVNEXT_L_DAGGER)), []
    inputs = [random_input(1, 3, side, side).bfloat16() for side in RESOLUTIONS]
    for pixels in inputs:  # the warm-up
        with FlopCounterMode(display=False) as counter:
            model(pixels)
        flops.append(counter.get_total_flops())
    rounds = [[timed(model, pixels)()[0] for pixels in inputs] for _ in range(args.rounds)]
    seconds = [statistics.median(times) for times in zip(*rounds)]

    peak = matrix_peak("cpu")
    rows = [row(f"ConvNeXt-L† at {side} px", f"{median:.3g} s", limit=f"{peak / 1e12:.3f} TFLOP/s",
                share=count / median / peak) for side, median, count in zip(RESOLUTIONS, seconds, flops)]
    exponent, _ = np.polyfit(np.log(np.square(RESOLUTIONS)), np.log(seconds), deg=1)
    return [*rows, row("exponent of this time over pixels", f"{exponent:.2f}", limit="at most 1.1")]


# ---- Llama ----
def random_convllava():
    """A ConvLLaVA with a Llama of 1.1B, which predicts the id that comes next in the vocabulary.

    That id is so much likelier than the others that rounding to bf16 changes no greedy token.
    """
    std = LLAMA["hidden_size"] ** -0.5  # a matrix keeps the size of its input, so that every layer counts
    model = random_model(lambda: ConvLLaVA(ConvNeXt(**NANO), Llama(LlamaConfig(**LLAMA))), std=std)
    embedding = model.llama.embed_tokens.weight.data
    model.llama.lm_head.weight.data = embedding.roll(1, dims=0)
    embedding /= std  # to a deviation of 1: of the size of what the layers add
    return model


def round_matrices(llama):
    """Makes a model what from_pretrained with torch.int8 makes."""
    for name, part in list(llama.named_modules()):
        if isinstance(part, torch.nn.Linear):
            llama.set_submodule(name, Int8Linear(part.weight))


@torch.inference_mode()
def prefill(args, in_8_bits=False):
    """Reads a prompt into the cache and scores the next token, beside LlamaForCausalLM."""
    from with_transformers import llama_of
    llama, ids = random_convllava().llama, random_ids(PREFILL, LLAMA["vocab_size"])
    peer = llama_of(llama)
    if in_8_bits:
        round_matrices(llama)

    def our_scores():  # as ConvLLaVA.generate does it
        cache = KVCache(llama.config, 1, PREFILL, "cpu", torch.bfloat16)
        return llama.lm_head(llama.hidden(llama.embed_tokens(ids), cache)[:, -1])
    result = compare(timed(our_scores), timed(lambda: peer(ids, use_cache=True, logits_to_keep=1).logits[:, -1]),
                     relative_difference, INT8 if in_8_bits else BF16, args.rounds)
    name = f"prefill of {PREFILL} tokens at 1.1B{', int8' * in_8_bits}; transformers{' in bf16' * in_8_bits}"
    return [compute_row(name, result)]


@torch.inference_mode()
def decode(args, batch=1, in_8_bits=False):
    """Greedy decoding behind the first token, which the prompt gives, beside LlamaForCausalLM.generate."""
    from with_transformers import llama_of
    model, length = random_convllava(), 1 + NEW_TOKENS
    llama, peer = model.llama, llama_of(model.llama)
    if in_8_bits:
        round_matrices(llama)
    ids = random_ids(batch * PROMPT, LLAMA["vocab_size"] // 2).view(batch, PROMPT)  # far from the end: no </s> follows

    def difference(ours, peer):
        """Of the scores; infinite where another token is the likeliest."""
        return relative_difference(ours, peer) if torch.equal(ours.argmax(-1), peer.argmax(-1)) else float("inf")
    settings = dict(do_sample=False, min_new_tokens=length, max_new_tokens=length, pad_token_id=0)
    ours = timed_decoding(llama.lm_head, lambda: list(model.generate(ids.tolist(), max_new_tokens=length)))
    peers = timed_decoding(peer.lm_head,
                           lambda: peer.generate(ids, attention_mask=torch.ones_like(ids), **settings))
    result = compare(ours, peers, difference, INT8 if in_8_bits else BF16, args.rounds)

    tensors = [*llama.parameters(), *llama.buffers()]  # those of 8 bits are buffers
    weights = sum(value.nbytes for value in tensors) - llama.embed_tokens.weight.nbytes  # read in each step
    speed, tokens = copy_peak(), batch * NEW_TOKENS
    name = f"decoding at 1.1B, batch {batch}{', int8' * in_8_bits}; transformers{' in bf16' * in_8_bits}"
    return [row(name, f"{tokens / result.ours:.3g} tokens/s", f"{tokens / result.peer:.3g} tokens/s", result.ratio,
                f"{speed / 1e9:.1f} GB/s", weights * NEW_TOKENS / result.ours / speed)]


def loading(args):
    """Loads a checkpoint's language model in new processes, beside LlamaForCausalLM.from_pretrained."""
    if not args.checkpoint:
        return [row("load", "write a 7B with tests/make_checkpoint.py FOLDER, and give --checkpoint FOLDER")]
    result = compare(lambda: in_new_process(measure_loading, "ours", args.checkpoint),
                     lambda: in_new_process(measure_loading, "peer", args.checkpoint),
                     lambda ours, peer: ours["sums"] != peer["sums"], 0, args.rounds)
    ours, peer = result.results
    speed = copy_peak()
    return [time_row("loading the language model; transformers", result, f"{speed / 1e9:.1f} GB/s",
                     ours["bytes"] / result.ours / speed),
            memory_row(ours["peak"], peer["peak"], ours["bytes"])]


def measure_loading(side, folder):
    """(Seconds, bytes and sums) of loading in this process, until all weights are in its memory."""
    from transformers import LlamaForCausalLM

    def load():
        if side == "peer":
            weights = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).state_dict()
        else:  # as ConvLLaVA.from_pretrained does it
            with torch.device("meta"):
                llama = Llama(LlamaConfig.from_json(Path(folder) / "config.json"))
            others = "model.mm_projector.", "model.vision_tower."
            tensors = {name: stored for name, stored in find_tensors(folder).items() if not name.startswith(others)}
            llama.assign_published(tensors, folder, dtype=torch.bfloat16)
            weights = llama.published_tensors()
        for value in weights.values():
            value.flatten()[::2048].sum()  # touches each page of 4096 bytes: files may only have been mapped
        return weights
    before = peak_memory("cpu")
    seconds, weights = timed(load)()
    peak = peak_memory("cpu") - before
    sums = {name: sum(piece.view(torch.int16).sum().item() for piece in value.flatten().split(2 ** 20))  # of the bits
            for name, value in weights.items()}
    return seconds, dict(peak=peak, bytes=sum(value.nbytes for value in weights.values()), sums=sums)


# ---- Programs ----
def start(args):
    """From a program's start to its answer, beside a program on transformers' modules; the small model in float32."""
    import with_transformers
    question = "data/nano/examples/receipt.png", "What is the total?"
    result = compare(timed(run_python, "sample.py", *question),
                     timed(run_python, with_transformers.__file__, SMALL_MODEL, *question), ne, 0, args.rounds)
    importing = min(timed(run_python, "-c", "import torch")()[0] for _ in range(args.rounds))
    return [time_row("from start to answer, float32; transformers", result, f"{importing:.3g} s to import torch",
                     importing / result.ours)]


def preprocessing(args):
    """A JPEG to normalised pixels, beside the original's padding and transformers' CLIP processor on Pillow."""
    import with_transformers
    processor = with_transformers.make_processor(PHOTO_PIXELS)

    def grey_levels(ours, peer):
        return ((ours - peer).abs() * torch.tensor(STD).view(3, 1, 1) * 255).max().item()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        width, height = PHOTO
        picture(height // 2, width // 2).resize(PHOTO, Image.Resampling.BICUBIC).save(path)
        result = compare(timed(lambda: square(read_image(path), PHOTO_PIXELS)),
                         timed(with_transformers.square, path, processor), grey_levels, 1.01, args.rounds)
        decoding = min(timed(lambda: Image.open(path).load())()[0] for _ in range(args.rounds))
    return [time_row(f"a JPEG of {width}×{height} to {PHOTO_PIXELS} px; transformers", result,
                     f"{decoding:.3g} s to decode it", decoding / result.ours)]


def questions(args):
    """A benchmark in batches of 8, beside one question and its image at a time, as the original asks them."""
    from bench import answers_in_batches, write_questions
    model = ConvLLaVA.from_pretrained(ROOT / SMALL_MODEL, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        asked = read_benchmark(write_questions(Path(folder), num_pages=8, each=4), folder).questions
        result = compare(timed(answers_in_batches, model, asked, 8),
                         timed(lambda: [model.answer(entry.images[0], entry.prompt).strip() for entry in asked]),
                         ne, 0, args.rounds)
    return [compute_row(f"{len(asked)} questions in batches of 8, float32; one at a time", result, torch.float32)]


# ---- Training ----
def training(args):
    """A step of phase 3 on texts of several lengths, beside a loop over transformers' modules."""
    result = compare(timed(training_step("ours", **TRAINING)[0]), timed(training_step("peer", **TRAINING)[0]),
                     lambda ours, peer: relative_difference(torch.tensor(ours), torch.tensor(peer)), LOSS, args.rounds)
    (our_peak, state), (peer_peak, _) = (in_new_process(measure_training, side, TRAINING) for side in ("ours", "peer"))
    return [compute_row("a training step; transformers", result), memory_row(our_peak, peer_peak, state)]


def training_step(side, convnext, llama, pixels, texts, micro_batch):
    """(A function that takes a step and returns its loss and the norm of the gradient, bytes of the training's state).

    texts: tokens of each sample's text, each with a label. AdamW trains projector and language model, in float32 under
    autocast. The peer pads the samples as they come; ours are sorted, as MicroBatchSampler sorts those of a step.
    """
    from bench import random_micro_batch
    from with_transformers import convnext_of, llama_of, make_training_step
    run = train.make_run(train.arguments(["--phase", "3"]), rank=0, world=1, device="cpu", dtype="bf16")
    model = random_model(lambda: ConvLLaVA(ConvNeXt(**convnext), Llama(LlamaConfig(**llama)), resolution=pixels),
                         torch.float32).train()
    train.freeze(model, run.phase.trained)
    train.frozen_to_bf16(model)
    state = sum(state_bytes(model).values())

    torch.manual_seed(0)  # both sides' are the same
    samples = [random_micro_batch(model, 1, length, "cpu") for length in texts]
    if side == "ours":
        samples.sort(key=lambda sample: len(sample["input_ids"][0]))
    micros = [{key: [value for sample in samples[start:start + micro_batch] for value in sample[key]]
               for key in samples[0]} for start in range(0, len(samples), micro_batch)]
    if side == "peer":
        parts = convnext_of(model.vision.bfloat16()), model.projector, llama_of(model.llama).train()
        return make_training_step(*parts, micros, sum(texts), run.phase.lr, train.MAX_NORM), state

    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=run.phase.lr, weight_decay=0, fused=True)

    def step():
        loss_and_norm = train.accumulate_gradients(model, trained, micros, sum(texts), run)
        optimizer.step()
        optimizer.zero_grad()
        return loss_and_norm
    return step, state


def measure_training(side, sizes):
    """Bytes of two steps in this process: (the peak, the training's state)."""
    before = peak_memory("cpu")
    step, state = training_step(side, **sizes)
    for _ in range(2):
        step()
    return peak_memory("cpu") - before, state


ROWS = {
    "convnext5": convnext_of_five_stages, "convnext4": convnext_of_four_stages,
    "prefill": prefill, "prefill-int8": partial(prefill, in_8_bits=True),
    "decode": decode, "decode8": partial(decode, batch=8), "decode-int8": partial(decode, in_8_bits=True),
    "start": start, "preprocess": preprocessing, "train": training, "questions": questions, "load": loading,
    "resolution": resolutions}

"""Measures time and memory for bench.py and peers.py, and what the machine can do at most."""
import multiprocessing
import statistics
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]


class Comparison(NamedTuple):
    """Seconds of both sides, the median of peer / ours, the first results, and our FLOPs in this process."""
    ours: float
    peer: float
    ratio: float
    results: tuple
    flops: int


def compare(ours, peer, difference, at_most, rounds):
    """Times two functions that return (seconds, result), by turns after a first call of each.

    Raises ValueError where `difference` of the first results is above at_most.
    """
    with FlopCounterMode(display=False) as counter:
        _, our_result = ours()
    _, peer_result = peer()
    measured = difference(our_result, peer_result)
    if not measured <= at_most:  # also where it is NaN
        raise ValueError(f"the results differ by {measured:.3g}, and at most {at_most:.3g} is expected")

    pairs = [(ours()[0], peer()[0]) for _ in range(rounds)]
    our_seconds, peer_seconds = (statistics.median(times) for times in zip(*pairs))
    ratio = statistics.median(of_peer / of_ours for of_ours, of_peer in pairs)
    return Comparison(our_seconds, peer_seconds, ratio, (our_result, peer_result), counter.get_total_flops())


def relative_difference(ours, peer):
    """The norm of the difference over the norm."""
    return ((ours.float() - peer.float()).norm() / peer.float().norm()).item()


def timed(function, *arguments):
    """Makes a function return (seconds, result)."""
    def call():
        started = time.perf_counter()
        result = function(*arguments)
        return time.perf_counter() - started, result
    return call


def timed_decoding(lm_head, generate):
    """Makes a function that generates return (seconds behind the first token, the tokens' scores (T, B, V))."""
    def call():
        times, scores = [], []

        def record(module, inputs, output):
            times.append(time.perf_counter())
            scores.append(output.flatten(end_dim=-2))  # (B, V) or (B, 1, V) -> (B, V)
        hook = lm_head.register_forward_hook(record)
        generate()
        hook.remove()
        return times[-1] - times[0], torch.stack(scores)
    return call


# ---- New processes ----
def run_python(*arguments):
    """What a new Python prints. Raises ValueError where it fails."""
    process = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        raise ValueError(f"a program failed: {(process.stderr.strip() or str(process.returncode)).splitlines()[-1]}")
    return process.stdout


def in_new_process(function, *arguments):
    """What a function returns in a process whose memory holds nothing else."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def peak_memory(device):
    """The most bytes so far: of the process, or of the GPU's allocator."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    # The getrusage call would not do: in a new process its number begins with that of the process that started it.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024


# ---- The machine's limits ----
def matrix_peak(device, dtype=torch.bfloat16):
    """FLOP/s of the best of ten matrix products."""
    side = 16384 if device == "cuda" else 2048
    matrix, times = torch.randn(side, side, device=device, dtype=dtype), []
    for _ in range(10):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # waits for it
        times.append(time.perf_counter() - started)
    return 2 * side ** 3 / min(times)


def copy_peak():
    """Bytes per second, read and written, of the best of ten copies that no cache holds."""
    source = torch.ones(2 ** 28, dtype=torch.uint8)
    copy = timed(torch.ones_like(source).copy_, source)
    return 2 * source.nbytes / min(copy()[0] for _ in range(10))

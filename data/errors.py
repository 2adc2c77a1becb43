"""What the programs share: the ranges of their arguments, and how they say what went wrong."""
import math
import os
import re
import sys
import warnings

import torch
import torch.distributed as dist
from tqdm import tqdm


def check_ranges(args, **ranges):
    """Raises ValueError where an argument is set and outside of its range, name=(least, most or None)."""
    for name, (least, most) in ranges.items():
        value = getattr(args, name)
        if value is None or (least <= value < math.inf and (most is None or value <= most)):
            continue
        option = "--" + name.replace("_", "-")
        advice = f"it should be at least {least}" if most is None else f"take {least} to {most}"
        raise ValueError(f"{option} is {value}: {advice}")


def print_error(program, error, out_of_memory, afterwards="begin anew"):
    """Prints what went wrong in one line. An error that was not foreseen is raised again.

    out_of_memory: what to do where the memory is full; afterwards: what to do when a process was lost.
    """
    if is_out_of_memory(error):
        sentence = f"the memory is full: {out_of_memory}"
    elif data_process_fault(error):
        sentence = f"{data_process_fault(error)} ({afterwards})"
    elif is_lost_peer(error):
        sentence = f"another process of this run has ended ({afterwards})"
    elif isinstance(error, (ValueError, OSError)):
        sentence = str(error).strip()
        if "Traceback (most recent call last)" in sentence:  # a data process's error, which ends with the sentence
            sentence = re.split(r"\n\w+: ", sentence)[-1]
    else:
        raise error
    tell(f"{program}: {sentence}")


def tell(text):
    """Prints a printable line to stderr, on a line without a progress bar."""
    is_beside_the_bar = os.environ.get("RANK", "0") != "0"  # rank 0 has the bar
    tqdm.write("\n" * is_beside_the_bar + printable(text), file=sys.stderr)


def printable(text):
    """The text on one line, without what a terminal would obey: a file's name may hold anything."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def tell_warnings(program):
    """Has warnings printed as one line, without the place in the code."""
    warnings.formatwarning = lambda message, *_: f"{program}: warning: {printable(str(message))}\n"


def is_lost_peer(error):
    """Whether another process of a distributed run does not answer: gloo and NCCL say it in their own ways."""
    words = ("gloo", "NCCL", "closed by peer", "reset by peer")
    return isinstance(error, RuntimeError) and dist.is_initialized() and any(word in str(error) for word in words)


def is_out_of_memory(error):
    """Whether the computer's or the GPU's memory is full, which torch says in several ways."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, (RuntimeError, OSError)) and "allocate memory" in str(error)


def data_process_fault(error):
    """The sentence about a data process that has died or does not answer; None where the error is another one."""
    was_reading = isinstance(error, (ConnectionError, EOFError))  # what it had begun to send breaks off
    if not (was_reading or (isinstance(error, RuntimeError) and str(error).startswith("DataLoader "))):
        return None
    return ("a data process has ended or does not answer, most often because the memory or /dev/shm is full: use fewer "
            "--workers (0 uses none), or give a container more with --shm-size")

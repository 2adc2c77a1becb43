"""What a training run writes while it runs: saved states, from which a stopped run goes on, and a log.

States are folders `step-0000250` in `phaseN.partial/`, each a checkpoint and training.pt, which holds all else that the
run needs. A state is complete or not there, as it is written beside its place and renamed. The newest few stay.
"""
import fcntl
import json
import math
import os
import re
import shutil
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions, get_model_state_dict, get_optimizer_state_dict, set_optimizer_state_dict)
from tqdm import tqdm

from data.errors import tell
from data.weights import check_replaceable, interrupted_saves, replacing

# what has to be the same on --resume, and what may change: all but lr and dtype change only the rounding
SETTINGS = dict(trained=list, steps=int, batch=int, seed=int, resolution=int, data=int)
CHANGEABLE = dict(lr=float, dtype=str, world=int, parallel=str, micro_batch=int, compile=bool)
MAX_UNREADABLE = 0.01  # of the samples; more of them end the run
STATE = r"step-\d{7}"  # the name of a state's folder
GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)  # of sharded weights: all of them, on rank 0


def is_first_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def all_sum(numbers):
    """Sums each of a list of numbers over the processes."""
    if not dist.is_initialized():
        return numbers
    sums = torch.tensor(numbers, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(sums)
    return [type(number)(total) for number, total in zip(numbers, sums.tolist())]


@contextmanager
def stop_signals():
    """Collects the signals to stop, for the loop to end between two steps. A second Ctrl-C ends it at once."""
    signals = []

    def collect(number, frame):
        signals.append(number)
        if number == signal.SIGINT and not dist.is_initialized():  # torchrun sends its processes a second one itself
            signal.signal(number, signal.SIG_DFL)
            os.write(2, b"\nstopping when the run is saved; a second Ctrl-C ends it at once\n")

    kinds = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # of a closed terminal; `nohup` has it ignored
        kinds.append(signal.SIGHUP)
    handlers = {kind: signal.signal(kind, collect) for kind in kinds}
    try:
        yield signals
    finally:
        for kind, handler in handlers.items():
            signal.signal(kind, handler)


@contextmanager
def only_run(file):
    """Holds a lock on a file, so that a second run of the phase is refused. It goes when the process ends."""
    out = file.parent
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = open(file, "w")
    except OSError as error:
        raise ValueError(f"--out {out} cannot be written to: {error.strerror}") from None
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock's, data processes do not hold it too
        except OSError:
            raise ValueError(f"another run of this phase is going on in {out}: let it end, or name another "
                             "--out") from None
        try:
            yield
        finally:
            file.unlink()
            if is_new:
                with suppress(OSError):  # where the run has written something
                    out.rmdir()


@dataclass
class Progress:
    """How far a run has come."""
    step: int = 0
    unreadable: int = 0  # samples that others stood in for, and malformed ones
    skipped: int = 0  # steps, as their loss or gradient was not finite or exploded
    skipped_in_a_row: int = 0
    saved_at: int | None = None  # the step of the newest state

    def count(self, took_step, num_unreadable):
        self.step += 1
        self.unreadable += num_unreadable
        self.skipped += not took_step
        self.skipped_in_a_row = 0 if took_step else self.skipped_in_a_row + 1

    def too_many_unreadable(self, num_more, num_samples, steps_per_epoch):
        """What is wrong when more than 1% of the samples could not be read, with these more; else ""."""
        total = self.unreadable + num_more
        epochs = 1 + self.step // steps_per_epoch  # in each of which a sample may be met again
        if total <= MAX_UNREADABLE * num_samples * epochs:
            return ""
        return (f"{total} samples could not be read, more than 1%: put back the images named above, or begin anew with "
                "a repaired JSON file")

    def is_due(self, every):
        """Whether a multiple of `every` steps has passed since the newest state."""
        return self.step // every > (self.saved_at or 0) // every

    def where(self, steps):
        """Where the run has stopped, and how it goes on."""
        advice = "begin anew"
        if self.saved_at is not None:
            advice = f"the same command with --resume goes on from step {self.saved_at}"
        return f"stopped at step {self.step} of {steps}: {advice}"


def run_settings(run, steps, resolution, digest):
    """What a run of train.py has for SETTINGS and CHANGEABLE. digest: of the data."""
    settings = dict(trained=list(run.phase.trained), steps=steps, batch=run.phase.batch, seed=run.args.seed,
                    resolution=resolution, data=digest)
    changeable = dict(lr=run.phase.lr, dtype=run.dtype, world=run.world, parallel=run.args.parallel,
                      micro_batch=run.micro_batch, compile=run.args.compile)
    return dict(settings=settings, changeable=changeable)


class Saver:
    """Writes a run's states and its checkpoint, and puts a state back. All processes take part in each.

    replica: the model as the processes train it, a DDP say; autocast: makes the context that it computes in.
    settings: what has to be the same when the run goes on; changeable: what may differ, which is told.
    """

    def __init__(self, folder, keep, model, replica, optimizer, autocast, settings, changeable):
        self.folder, self.keep = folder, keep
        self.model, self.replica, self.optimizer, self.autocast = model, replica, optimizer, autocast
        self.settings, self.changeable = settings, changeable
        self.is_first = is_first_process()

    def restore(self, state):
        """Puts back the optimizer, the random numbers and the progress, which it returns. Empties the state."""
        changed = {name: value for name, value in state["settings"].items() if value != self.settings.get(name)}
        if changed:
            raise ValueError(f"the stopped run at {self.folder} had {changed}: give the same to go on with it")
        for name, value in state["changeable"].items():
            if value != self.changeable[name] and self.is_first:
                tell(f"the stopped run had {name} {value}, this one has {self.changeable[name]}")
        try:
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"],
                                     options=StateDictOptions(full_state_dict=True))
            fits = all(moments["exp_avg"].shape == moments["exp_avg_sq"].shape == parameter.shape
                       for parameter, moments in self.optimizer.state.items())
        except Exception:  # torch raises many kinds where they are of another model
            fits = False
        progress = Progress(**state["progress"])
        if not (fits and self.optimizer.state):
            raise ValueError(f"the optimizer in the state of step {progress.step} in {self.folder} does not fit: move "
                             "that state away to go on from the one before it")
        torch.set_rng_state(state["rng"])
        state.clear()  # its tensors are mapped from a file that will be removed
        return progress

    def has_diverged(self, progress, micro):
        """Whether the last step was skipped, or the loss of a micro-batch, computed once more, is not finite.

        The weights alone tell nothing: after a step at a learning rate of 1e30 they are still finite.
        """
        if progress.skipped_in_a_row:
            return True
        with torch.no_grad(), self.autocast():
            loss = self.replica(micro["input_ids"], micro["images"], micro["labels"]).item()
        total, = all_sum([loss])
        return not math.isfinite(total)

    def save_state(self, progress, micro):
        """Saves all that the run needs to go on, unless it has just begun, is saved already, or has diverged."""
        if progress.step in (0, progress.saved_at) or self.has_diverged(progress, micro):
            return
        weights = get_model_state_dict(self.model, options=GATHERED)
        moments = get_optimizer_state_dict(self.model, self.optimizer, options=GATHERED)
        if self.is_first:
            training = dict(optimizer=moments, rng=torch.get_rng_state(), settings=self.settings,
                            changeable=self.changeable, progress=asdict(progress) | {"saved_at": progress.step})
            try:
                write_state(self.folder, progress.step, self.model.with_weights(weights), training)
            except OSError as error:  # a full disk
                raise OSError(f"{error} ({progress.where(self.settings['steps'])})") from None
            remove_old_states(self.folder, progress.step, progress.saved_at, self.keep)
        if dist.is_initialized():
            dist.barrier()  # a process that stopped before all is written would end the job
        progress.saved_at = progress.step

    def save_checkpoint(self, out, progress, micro):
        """Writes the phase's checkpoint, in bf16 as the released ones, and removes the states; returns its folder.

        Raises ValueError where the run has diverged; then a checkpoint that was there, and the states, stay.
        """
        if self.has_diverged(progress, micro):
            raise ValueError("the loss is not finite after the last step, so nothing is written: use a lower --lr "
                             f"({progress.where(progress.step)})")
        weights = get_model_state_dict(self.model, options=GATHERED)
        if not self.is_first:
            return out
        self.model.with_weights(weights).save_pretrained(out, torch.bfloat16)
        for path in [*states_in(self.folder), *leftovers(self.folder), *interrupted_saves(out)]:
            remove_save(path)
        with suppress(OSError):  # the folder is a link, or holds other things
            self.folder.rmdir()
        unreadable = f" ({progress.unreadable} unreadable samples)" if progress.unreadable else ""
        skipped = f" ({progress.skipped} skipped steps)" if progress.skipped else ""
        tell(f"the phase is done: {out}{unreadable}{skipped}")
        return out


def states_in(folder):
    """The states in a run's folder, oldest first. What has another name there is not the run's."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if re.fullmatch(STATE, path.name))


def leftovers(folder):
    """Half-written states that a killed run has left."""
    names = rf"{STATE}\.(saving|replaced)-[0-9a-f]{{8}}"
    return [path for path in folder.glob("step-*") if re.fullmatch(names, path.name)]


def remove_save(folder):
    """Removes a state or what is left of one, but not where somebody has put other things into it."""
    with suppress(ValueError):
        check_replaceable(folder, extra=("training.pt",))
        shutil.rmtree(folder, ignore_errors=True)  # network disks keep what a resumed run still has open


def write_state(folder, step, model, training):
    """Writes a state; training: what torch.save can hold of tensors, numbers, lists and dicts."""
    state = folder / f"step-{step:07d}"
    with replacing(state, extra=("training.pt",)) as new:
        model.write_files(new, torch.float32)
        try:
            torch.save(training, new / "training.pt")
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(f"{new} cannot be written: {str(error).splitlines()[0]}") from None


def remove_old_states(folder, step, previous, keep):
    """Leaves the newest `keep` states.

    previous: the last good state before `step`. Any between the two were found damaged on --resume, and go.
    """
    numbers = [int(state.name.removeprefix("step-")) for state in states_in(folder)]
    intact = [number for number in numbers if number == step or (previous is not None and number <= previous)]
    for number in numbers:
        if number not in intact[-keep:]:
            remove_save(folder / f"step-{number:07d}")
    for path in leftovers(folder):
        remove_save(path)


def how_to_go_on(out, folder):
    """What to do after a process was lost, by what the run has written: its checkpoint `out`, or states in `folder`."""
    states = states_in(folder)
    if states:
        return f"--resume goes on from {states[-1].name}"
    return f"{out} is done: --evaluate {out} validates it" if (out / "config.json").is_file() else "begin anew"


def find_state(out, folder, resume, load_checkpoint):
    """The newest complete state to go on from: its folder and what training.pt holds; (None, None) for a new run.

    out: where the checkpoint will be; folder: of the states; load_checkpoint: reads the names and shapes of the model
    in a folder, and fails where it is damaged. Raises ValueError where there is nothing to go on from, or where the run
    would overwrite a stopped one or other things.
    """
    check_replaceable(out)
    if not resume:
        if states_in(folder):
            raise ValueError(f"there is a stopped run at {folder}: go on with it by --resume, or remove the folder")
        return None, None
    for state in reversed(states_in(folder)):
        try:
            load_checkpoint(state)
            training = load_training(state / "training.pt")
            check_training(training, int(state.name.removeprefix("step-")))
            return state, training
        except Exception as error:  # torch raises many kinds on broken files
            tell(f"{state} is passed over, it cannot be read: {error}")
    advice = ", and remove the folder" if folder.exists() else ""
    raise ValueError(f"there is no stopped run at {folder} to go on with: leave --resume out{advice}")


def load_training(file):
    """What training.pt holds, mapped and not read. Raises ValueError where it cannot be read."""
    try:
        if not file.is_file():
            raise FileNotFoundError
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds on broken files
        has_code = "weights only load failed" in str(error).lower()
        raise ValueError(f"{file.name} " + ("holds code, of which nothing was run" if has_code else
                                            "is missing or damaged")) from None


def check_training(training, step):
    """Raises ValueError where training.pt does not hold what Saver writes at a step."""
    parts = dict(optimizer=dict(state=dict, param_groups=list), settings=SETTINGS, changeable=CHANGEABLE,
                 progress={field.name: int for field in fields(Progress)})
    if not isinstance(training, dict) or set(training) != {*parts, "rng"}:
        raise ValueError("training.pt has other parts than it should")
    for name, types in parts.items():
        part = training[name]
        if not isinstance(part, dict) or {key: type(value) for key, value in part.items()} != types:
            raise ValueError(f"training.pt has other {name} than it should")

    progress, rng = training["progress"], training["rng"]
    if not progress["step"] == progress["saved_at"] == step < training["settings"]["steps"]:
        raise ValueError("training.pt has a progress that is not that of its folder")
    if training["changeable"]["dtype"] not in ("bf16", "fp32"):
        raise ValueError("training.pt has an unknown type to compute in")
    if not isinstance(rng, torch.Tensor) or (rng.dtype, rng.shape) != (torch.uint8, torch.get_rng_state().shape):
        raise ValueError("training.pt has no random numbers")


class Log:
    """The progress bar, and a line of metrics in a file for each step; on rank 0.

    batch: samples of a step. A resumed run keeps the file's lines of the steps before it and drops the others.
    """

    def __init__(self, file, batch, steps, progress):
        self.batch, self.steps = batch, steps
        self.start, self.started = progress.step, time.time()
        self.is_first = is_first_process()
        if self.is_first:
            self.metrics = open(file, "ab+")
            self.metrics.seek(0)
            self.metrics.truncate(sum(len(line) for line in self.metrics.readlines()[:progress.step]))
        self.bar = tqdm(total=steps * batch, initial=progress.step * batch, unit="sample",
                        disable=not self.is_first, mininterval=1)

    def announce(self, name, model, malformed):
        """Says what is trained, and which samples are malformed."""
        if self.is_first:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            total = sum(p.numel() for p in model.parameters())
            resumed = f", from step {self.start}" if self.start else ""
            tell(f"{name}: {trained / 1e6:.1f}M of {total / 1e6:.1f}M parameters trained, {self.steps} steps of "
                 f"{self.batch} samples{resumed}")
            self.report(malformed)

    def report(self, unreadable):
        """Names samples that cannot be read."""
        for sentence in unreadable:
            tell(f"unreadable: {sentence}")

    def write(self, progress, loss, lr, norm, num_labels):
        """A step's metrics; norm: the gradient's, before it was clipped."""
        self.bar.update(self.batch)
        self.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}", refresh=False)
        if self.is_first:
            rate = (progress.step - self.start) * self.batch / (time.time() - self.started)
            line = dict(step=progress.step, loss=loss, lr=lr, grad_norm=norm, labels=num_labels,
                        samples_per_s=round(rate, 2), unreadable=progress.unreadable, skipped=progress.skipped)
            self.metrics.write(json.dumps(line).encode() + b"\n")
            self.metrics.flush()

    def close(self):
        self.bar.close()
        if self.is_first:
            self.metrics.close()

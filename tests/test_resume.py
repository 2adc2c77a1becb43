"""Runs that were stopped or killed go on and end the same; those that diverged lose nothing saved."""
import itertools
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import (
    ENVIRONMENT, ROOT, launcher, losses, metrics, needs_torch_2_7, refused, spoiled, train_main)
from convllava import ConvLLaVA

# Batches of 4 are computed in micro-batches of 1, so that a step adds up several gradients.
EXACT = ["--dtype", "fp32", "--micro-batch", 1]


@pytest.fixture
def trained_here(monkeypatch, capsys):
    """Runs train.py's main in this process, which is faster; returns its exit status and its text."""
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
        status, sentence = 0, ""
        try:
            train.main()
        except SystemExit as end:
            status = end.code
        if isinstance(status, str):  # Python would print it, and end with 1
            status, sentence = 1, status
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err + sentence)
    return call


def succeeded(process):
    assert process.returncode == 0, process.stderr
    return process


def doing_in_step(number, action):
    """train.py's accumulate_gradients, which does something in the number-th step of its run."""
    accumulate, numbers = train.accumulate_gradients, itertools.count(1)

    def accumulate_too(*arguments):
        if next(numbers) == number:
            action()
        return accumulate(*arguments)
    return accumulate_too


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def send_sigkill():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def stopped_here(trained_here, monkeypatch):
    """Like trained_here, with a SIGTERM in the number-th step."""
    def call(number, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(train, "accumulate_gradients", doing_in_step(number, send_sigterm))
            done = trained_here(*arguments)
        assert done.returncode == 1 and "stopped at step" in done.stderr, done.stderr
        return done
    return call


def killed_in_step(number, *command):
    """train.py, which gets a SIGKILL in the number-th step."""
    train.accumulate_gradients = doing_in_step(number, send_sigkill)
    train_main(*command)


def goes_on(step, steps, saved_at):
    """The sentence of a run that has stopped."""
    return (f"stopped at step {step} of {steps}: "
            f"the same command with --resume goes on from step {saved_at}")


def weights(out):
    folder = out / "phase1"
    vision = load_file(folder / "vision_tower" / "model.safetensors")
    return load_file(folder / "model.safetensors") | vision


def assert_same_bits(out, other):
    assert losses(out) == losses(other)
    tensors, other_tensors = weights(out), weights(other)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name


def assert_same_to_rounding(out, other, tolerance=1e-6):
    """Losses within `tolerance`; tensors, saved in bfloat16, within 1e-2 of their largest value."""
    assert losses(out) == pytest.approx(losses(other), rel=tolerance)
    tensors, other_tensors = weights(out), weights(other)
    for name, tensor in tensors.items():
        assert (tensor - other_tensors[name]).abs().max() <= 1e-2 * tensor.abs().max(), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path):
    """The folder that a test's run writes to."""
    return tmp_path / "runs"


@pytest.fixture
def states(out):
    """The folder of that run's states."""
    return out / "phase1.partial"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for runs that several tests compare with, and that the first of them makes."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def uninterrupted(trained_here, options, shared):
    """The folder of a run of twelve steps, which are two epochs."""
    if not (shared / "one").exists():
        succeeded(trained_here(*options(steps=12, out=shared / "one"), *EXACT))
    return shared / "one"


@pytest.fixture
def uninterrupted_on_two(forked, command, shared):
    """The folder of such a run on two processes."""
    if not (shared / "two").exists():
        succeeded(forked(*command(steps=12, out=shared / "two"), *EXACT, processes=2))
    return shared / "two"


# ---- A run that is stopped ----
def with_a_signal_to_all(kind, start_method, *command):
    """train.py, which gets a signal before step 5, as do its data processes; prints their group.

    For step 5 it needs more samples than its data process has prepared by then.
    """
    os.setpgrp()
    print(os.getpgrp(), flush=True)
    multiprocessing.set_start_method(start_method, force=True)
    stream = train.micro_batches

    def stream_with_signal(*arguments, **options):
        for number, micro_batch in enumerate(stream(*arguments, **options), start=1):
            yield micro_batch
            if number == 4 * 4:  # of four steps
                os.killpg(0, kind)
    train.micro_batches = stream_with_signal
    train_main(*command)


def assert_group_ends(group):
    until = time.time() + 20
    with pytest.raises(ProcessLookupError):
        while time.time() < until:
            os.killpg(group, 0)
            time.sleep(0.01)


@pytest.mark.parametrize("kind, start_method", [
    (signal.SIGINT, "fork"),  # Ctrl-C in a terminal, on Linux with Python up to 3.13
    (signal.SIGINT, "spawn"),  # the same on macOS
    (signal.SIGTERM, "fork")])  # as SLURM sends it
def test_a_run_stopped_by_a_signal_ends_with_the_same_bits(
        forked, trained_here, command, uninterrupted, out, kind, start_method):
    """The signal goes to the data process too, which ends with the run."""
    arguments = [*command(steps=12), *EXACT, "--workers", 1]
    stopped = forked(*arguments, function=partial(with_a_signal_to_all, kind, start_method))
    assert stopped.returncode == 1 and goes_on(5, 12, saved_at=5) in stopped.stderr, stopped.stderr
    assert names_in(out) == ["phase1.metrics.jsonl", "phase1.partial"]
    assert_group_ends(int(stopped.stdout))

    resumed = succeeded(trained_here(*arguments[1:], "--resume", "--workers", 0))
    assert "12 steps of 4 samples, from step 5" in resumed.stderr
    assert_same_bits(out, uninterrupted)


def test_a_run_stopped_before_its_first_step_takes_that_one(
        trained_here, options, uninterrupted, monkeypatch, out):
    """Only then the optimizer has something to save. The run ends with the same bits."""
    stream = train.micro_batches

    def stream_after_signal(*arguments, **options):
        send_sigterm()
        yield from stream(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(train, "micro_batches", stream_after_signal)
        stopped = trained_here(*options(steps=12), *EXACT)
    assert stopped.returncode == 1 and goes_on(1, 12, saved_at=1) in stopped.stderr, stopped.stderr
    succeeded(trained_here(*options(steps=12), *EXACT, "--resume"))
    assert_same_bits(out, uninterrupted)


def test_a_signal_while_a_state_is_written_waits_for_it(trained_here, options, monkeypatch, states):
    """Two signals, in the state of step 2: the run stops after step 3, both states complete."""
    save, signals = torch.save, [signal.SIGTERM, signal.SIGINT]

    def save_with_signals(*arguments):
        while signals:
            os.kill(os.getpid(), signals.pop())
        save(*arguments)
    monkeypatch.setattr(torch, "save", save_with_signals)
    stopped = trained_here(*options(steps=12), *EXACT, "--save-every", 2)
    assert stopped.returncode == 1 and goes_on(3, 12, saved_at=3) in stopped.stderr, stopped.stderr
    assert names_in(states) == ["step-0000002", "step-0000003"]
    for step in (2, 3):
        folder = states / f"step-000000{step}"
        assert ConvLLaVA.from_pretrained(folder).resolution == 64
        training = torch.load(folder / "training.pt", weights_only=True)
        assert training["progress"]["step"] == step


def kill_data_process():
    """As the kernel does when the memory is full."""
    process, = multiprocessing.active_children()
    os.kill(process.pid, signal.SIGKILL)


def test_a_data_process_killed_while_a_batch_is_waited_for_loses_nothing(trained_here, options, monkeypatch, out, states):
    numbers = itertools.count(1)

    def take_from_killed(batches, count, log, take=train.take):
        if next(numbers) == 4:
            handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it then shows in the wait for the next batch only
            kill_data_process()
            try:
                result = take(batches, count, log)
                while not result[-1]:  # until none is left that was fetched before
                    result = take(batches, count, log)
                return result
            finally:
                signal.signal(signal.SIGCHLD, handler)
        return take(batches, count, log)
    monkeypatch.setattr(train, "take", take_from_killed)
    stopped = trained_here(*options(steps=12), *EXACT, "--workers", 1)
    assert stopped.returncode == 2, stopped.stderr
    assert "use fewer --workers" in stopped.stderr and "--shm-size" in stopped.stderr
    assert "stopped at step 3 of 12: the same command with --resume goes on from step 3" in stopped.stderr
    assert names_in(states) == ["step-0000003"]


def test_a_data_process_killed_during_a_step_names_the_last_state(trained_here, options, monkeypatch, states):
    def kill_and_wait():
        kill_data_process()
        time.sleep(5)  # torch raises an error in the middle of it
    monkeypatch.setattr(train, "accumulate_gradients", doing_in_step(4, kill_and_wait))
    stopped = trained_here(*options(steps=12), *EXACT, "--workers", 1, "--save-every", 2)
    assert stopped.returncode == 2, stopped.stderr
    assert "use fewer --workers (0 uses none), or give a container more with --shm-size" in stopped.stderr
    assert "(--resume goes on from step-0000002)" in stopped.stderr
    assert "Traceback" not in stopped.stderr


def test_signals_have_their_usual_effect_after_a_run(trained_here, options):
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    succeeded(trained_here(*options(steps=1)))
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before


# train.py with a pause of 0.3 s in each step, so that a signal comes before the run's end
SLOWLY = """
import time, train
accumulate = train.accumulate_gradients
def accumulate_late(*arguments):
    time.sleep(0.3)
    return accumulate(*arguments)
train.accumulate_gradients = accumulate_late
train.main()
"""


def send_to_all(kind, out):
    """A signal to every process of the run that writes to `out`, as SLURM sends it."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(out) in (process / "cmdline").read_text():
                os.kill(int(process.name), kind)
        except OSError:  # it has ended by now
            pass


def test_a_run_on_two_processes_stopped_by_sigterm_ends_the_same(
        forked, command, uninterrupted_on_two, out):
    """Sent to torchrun, to both processes and to their data processes; losses within 1e-6."""
    arguments = [*command(steps=12), *EXACT, "--workers", 1]
    program = [*launcher(2), "--no-python", *launcher(1), "-c", SLOWLY, *map(str, arguments[1:])]
    process = subprocess.Popen(
        program, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    log = out / "phase1.metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    send_to_all(signal.SIGTERM, out)
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and errors.count("--resume goes on from step") == 1, errors
    succeeded(forked(*arguments, "--resume", "--workers", 0, processes=2))
    assert_same_to_rounding(out, uninterrupted_on_two)


# ---- A run that is killed ----
def test_a_killed_run_loses_the_steps_since_its_last_state(
        forked, trained_here, command, uninterrupted, out, states):
    """SIGKILL in step 7, the first of the second epoch: it goes on from 6, to the same bits."""
    arguments = [*command(steps=12), *EXACT, "--save-every", 2]
    killed = forked(*arguments, function=partial(killed_in_step, 7))
    assert killed.returncode == -signal.SIGKILL
    assert names_in(states) == ["step-0000004", "step-0000006"]
    resumed = succeeded(trained_here(*arguments[1:], "--resume"))
    assert "12 steps of 4 samples, from step 6" in resumed.stderr
    assert_same_bits(out, uninterrupted)
    assert names_in(out) == ["phase1", "phase1.metrics.jsonl"]


def killed_while_it_saves(step, *command):
    """train.py, which gets a SIGKILL when the state of a step is half-written."""
    save = torch.save

    def save_half(training, file):
        if training["progress"]["step"] == step:
            file.write_bytes(b"half")
            send_sigkill()
        save(training, file)
    torch.save = save_half
    train_main(*command)


def test_a_run_killed_while_it_writes_a_state_goes_on_from_the_one_before(
        forked, trained_here, command, uninterrupted, out, states):
    """To the same bits. The half-written state goes, though no other of its name is written."""
    arguments = [*command(steps=12), *EXACT, "--save-every", 2]
    killed = forked(*arguments, function=partial(killed_while_it_saves, 4))
    assert killed.returncode == -signal.SIGKILL
    complete, half_written = names_in(states)
    assert complete == "step-0000002" and half_written.startswith("step-0000004.saving-")
    resumed = succeeded(trained_here(*arguments[1:], "--resume", "--save-every", 250))
    assert "12 steps of 4 samples, from step 2" in resumed.stderr
    assert_same_bits(out, uninterrupted)
    assert names_in(out) == ["phase1", "phase1.metrics.jsonl"]


def test_a_run_killed_on_two_processes_goes_on_on_one(
        forked, trained_here, command, uninterrupted_on_two, out):
    """Which is told; losses within 1e-5."""
    arguments = [*command(steps=12), *EXACT, "--save-every", 2]
    killed = forked(*arguments, function=partial(killed_in_step, 6), processes=2)
    assert killed.returncode == -signal.SIGKILL
    resumed = succeeded(trained_here(*arguments[1:], "--resume"))
    assert "the stopped run had world 2, this one has 1\n" in resumed.stderr
    assert "from step 4" in resumed.stderr
    assert_same_to_rounding(out, uninterrupted_on_two, tolerance=1e-5)


def with_a_signal_to_the_second(*command):
    """train.py on two processes, of which the second gets a SIGTERM in step 2."""
    if os.environ["RANK"] == "1":
        train.accumulate_gradients = doing_in_step(2, send_sigterm)
    train_main(*command)


@needs_torch_2_7
def test_a_sharded_run_goes_on_on_two_processes_or_on_one(forked, trained_here, command, tmp_path):
    """A signal to one process stops both. Losses within 1e-6 on two, within 1e-5 on one."""
    def arguments(name):
        return [*command(steps=4, out=tmp_path / name), *EXACT]
    sharded = ["--parallel", "fsdp"]
    uninterrupted, on_two, on_one = (tmp_path / name for name in ("uninterrupted", "two", "one"))
    succeeded(forked(*arguments("uninterrupted"), *sharded, processes=2))
    stopped = forked(
        *arguments("two"), *sharded, processes=2, function=with_a_signal_to_the_second)
    assert stopped.returncode == 1 and goes_on(2, 4, saved_at=2) in stopped.stderr, stopped.stderr
    shutil.copytree(on_two, on_one)

    succeeded(forked(*arguments("two"), *sharded, "--resume", processes=2))
    assert_same_to_rounding(on_two, uninterrupted)
    resumed = succeeded(trained_here(*arguments("one")[1:], "--resume"))
    assert "the stopped run had parallel fsdp, this one has ddp\n" in resumed.stderr
    assert_same_to_rounding(on_one, uninterrupted, tolerance=1e-5)


# ---- What may change on --resume ----
@pytest.fixture
def stopped_run(stopped_here, options, pages, tmp_path):
    """The arguments of a run that was stopped in its second step of four."""
    arguments = [*options(data=spoiled(pages, tmp_path, bad=0, total=24), steps=4), *EXACT]
    stopped_here(2, *arguments)
    return arguments


def test_a_stopped_run_is_not_overwritten(stopped_run, ended):
    refused(ended(train.main, *stopped_run), "there is a stopped run", "--resume")


@pytest.mark.parametrize("change, setting", [
    (["--batch", 8], "batch"), (["--steps", 5], "steps"), (["--seed", 7], "seed"),
    (["--resolution", 128], "resolution"), (["--recipe", "table12"], "trained")])
def test_what_decides_on_the_result_may_not_change(stopped_run, ended, change, setting):
    refused(ended(train.main, *stopped_run, "--resume", *change), f"'{setting}': ", "give the same")


def test_the_data_may_not_change(stopped_run, ended, pages, tmp_path):
    spoiled(pages, tmp_path, bad=1, total=24)
    refused(ended(train.main, *stopped_run, "--resume"), "'data': ", "give the same")


def test_the_depth_of_stage_5_may_not_change(stopped_run, ended):
    done = ended(train.main, *stopped_run, "--resume", "--stage5-depth", 1)
    refused(done, "has a stage 5 of 2 blocks")


def test_what_changes_only_the_rounding_may_change_and_is_told(
        stopped_run, trained_here, options, tmp_path, out, monkeypatch):
    """Losses within 1e-5 of those of a run that changes nothing."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    resumed = succeeded(trained_here(*stopped_run, "--resume", "--micro-batch", 2, "--compile"))
    assert "the stopped run had micro_batch 1, this one has 2\n" in resumed.stderr
    assert "the stopped run had compile False, this one has True\n" in resumed.stderr
    assert resumed.stderr.count("the stopped run had") == 2
    unchanged = options(data=tmp_path / "spoiled.json", steps=4, out=tmp_path / "unchanged")
    succeeded(trained_here(*unchanged, *EXACT))
    assert losses(out) == pytest.approx(losses(tmp_path / "unchanged"), rel=1e-5)


def test_a_resumed_run_computes_in_the_stopped_runs_type(
        stopped_here, trained_here, options, monkeypatch, tmp_path):
    """Whichever is faster here: it ends with the same bits as an uninterrupted run in that type."""
    uninterrupted, resumed = tmp_path / "uninterrupted", tmp_path / "resumed"
    succeeded(trained_here(*options(steps=3, out=uninterrupted), "--dtype", "bf16"))
    stopped_here(2, *options(steps=3, out=resumed), "--dtype", "bf16")
    monkeypatch.setattr(train, "faster_dtype", lambda device: "fp32")
    done = succeeded(trained_here(*options(steps=3, out=resumed), "--resume"))
    assert "the stopped run had" not in done.stderr
    assert_same_bits(resumed, uninterrupted)


def test_another_type_may_be_asked_for(stopped_run, trained_here):
    resumed = succeeded(trained_here(*stopped_run, "--resume", "--dtype", "bf16"))
    assert "the stopped run had dtype fp32, this one has bf16\n" in resumed.stderr


# ---- Steps that are skipped, and runs that diverge ----
def reporting(reports):
    """train.py's accumulate_gradients with other losses and norms, {step: (loss, norm)}."""
    accumulate, numbers = train.accumulate_gradients, itertools.count(1)

    def accumulate_and_report(*arguments):
        computed = accumulate(*arguments)
        return reports.get(next(numbers), computed)
    return accumulate_and_report


def test_steps_without_a_finite_gradient_are_skipped(trained_here, options, monkeypatch, out):
    """Those too whose loss is not finite, or whose gradient norm is above 1000."""
    reports = {2: (math.nan, 1.0), 3: (1.0, math.inf), 4: (1.0, math.nan), 5: (1.0, 1001.0)}
    monkeypatch.setattr(train, "accumulate_gradients", reporting(reports))
    taken, take_step = [], torch.optim.AdamW.step

    def take_and_count(optimizer):
        taken.append(optimizer)
        return take_step(optimizer)
    monkeypatch.setattr(torch.optim.AdamW, "step", take_and_count)
    done = succeeded(trained_here(*options(steps=6)))
    assert [line["skipped"] for line in metrics(out)] == [0, 1, 2, 3, 4, 4]
    assert len(taken) == 2
    assert "(4 skipped steps)" in done.stderr


def test_no_state_is_saved_after_a_skipped_step(stopped_here, options, monkeypatch, states):
    """States are due after steps 3 and 6, and one as it stops after 7; 3 and 7 are skipped."""
    reports = {3: (1.0, math.inf), 7: (1.0, math.inf)}
    monkeypatch.setattr(train, "accumulate_gradients", reporting(reports))
    stopped = stopped_here(7, *options(steps=12), "--save-every", 3)
    assert names_in(states) == ["step-0000004", "step-0000006"]
    assert goes_on(7, 12, saved_at=6) in stopped.stderr


def test_no_checkpoint_is_written_after_a_skipped_step(trained_here, options, monkeypatch, out):
    monkeypatch.setattr(train, "accumulate_gradients", reporting({2: (1.0, math.inf)}))
    done = trained_here(*options(steps=2))
    assert done.returncode == 2 and "nothing is written" in done.stderr, done.stderr
    assert names_in(out) == ["phase1.metrics.jsonl"]


def test_no_state_is_saved_after_a_step_that_ruins_the_weights(stopped_here, options, out, states):
    """The step's loss is finite, so that it is taken; that of the weights it makes is not."""
    arguments = [*options(steps=12), "--dtype", "fp32"]
    stopped_here(3, *arguments)
    stopped = stopped_here(1, *arguments, "--resume", "--lr", 1e30)
    assert goes_on(4, 12, saved_at=3) in stopped.stderr
    assert metrics(out)[-1]["skipped"] == 0
    assert names_in(states) == ["step-0000003"]


def test_ten_skipped_steps_in_a_row_end_the_run(
        stopped_here, forked, trained_here, command, out, states):
    """On two processes alike. The older state stays; with a lower rate the run goes on from it."""
    arguments = [*command(steps=16), "--dtype", "fp32"]
    stopped_here(3, *arguments[1:])
    diverged = forked(*arguments, "--resume", "--lr", 1e30, "--save-every", 1, processes=2)
    assert diverged.returncode == 2, diverged.stderr
    fault = "10 steps in a row were skipped, their gradient norm was not finite or above 1000"
    advice = f"use a lower --lr ({goes_on(14, 16, saved_at=3)})"
    assert f"train.py: {fault}: {advice}" in diverged.stderr, diverged.stderr
    assert [line["skipped"] for line in metrics(out)] == [0] * 4 + [*range(1, 11)]
    assert names_in(states) == ["step-0000003"]

    succeeded(trained_here(*arguments[1:], "--resume"))
    assert len(losses(out)) == 16 and max(losses(out)) < 10


def test_ten_skipped_steps_at_the_end_leave_nothing_to_go_on_from(trained_here, options, out):
    done = trained_here(*options(steps=11), "--dtype", "fp32", "--lr", 1e30)
    assert done.returncode == 2 and "10 steps in a row were skipped" in done.stderr, done.stderr
    assert "(stopped at step 11 of 11: begin anew)" in done.stderr
    assert names_in(out) == ["phase1.metrics.jsonl"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("steps", [1, 3])
def test_a_diverged_run_leaves_the_older_checkpoint(trained_here, options, out, steps):
    """After one step at a rate of 1e30 all weights are finite, and the loss is not."""
    succeeded(trained_here(*options(steps=1), "--dtype", "fp32"))
    older = contents(out / "phase1")
    done = trained_here(*options(steps=steps), "--dtype", "fp32", "--lr", 1e30)
    assert done.returncode == 2, done.stderr
    sentence = "train.py: the loss is not finite after the last step, so nothing is written"
    assert sentence in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert f"(stopped at step {steps} of {steps}: begin anew)" in done.stderr
    assert names_in(out) == ["phase1", "phase1.metrics.jsonl"]
    assert contents(out / "phase1") == older


def test_a_diverged_run_leaves_the_older_states(stopped_here, trained_here, options, out, states):
    """With a lower rate it goes on from them."""
    arguments = [*options(steps=4), "--dtype", "fp32"]
    stopped_here(3, *arguments)
    older = contents(states)
    done = trained_here(*arguments, "--resume", "--lr", 1e30)
    assert done.returncode == 2 and goes_on(4, 4, saved_at=3) in done.stderr, done.stderr
    assert contents(states) == older
    succeeded(trained_here(*arguments, "--resume"))
    assert names_in(out) == ["phase1", "phase1.metrics.jsonl"]

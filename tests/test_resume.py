"""Saved states: a run that was stopped, killed or has diverged goes on as if nothing had happened."""
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import train
from conftest import ENVIRONMENT, ROOT, launcher, losses, metrics, needs_torch_2_7, refused, spoiled, train_main
from convllava import ConvLLaVA
from data import states
from data.states import Log, Progress, Saver, find_state, states_in

# Batches of 4 are computed in micro-batches of 1, so that a step adds up several gradients.
EXACT = ["--dtype", "fp32", "--micro-batch", 1]


@pytest.fixture(autouse=True)
def one_thread():
    """Runs in this process compute as the programs that tests start."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trained_here(monkeypatch, capsys):
    """Runs train.py's main in this process, which is faster: its exit status and its text."""
    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["train.py", *map(str, arguments)])
        status, sentence = 0, ""
        try:
            train.main()
        except SystemExit as end:
            status, sentence = (1, end.code) if isinstance(end.code, str) else (end.code, "")
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
    train.accumulate_gradients = doing_in_step(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train_main(*command)


def weights(out, phase=1):
    folder = out / f"phase{phase}"
    return load_file(folder / "model.safetensors") | load_file(folder / "vision_tower" / "model.safetensors")


def assert_same_bits(out, other):
    assert losses(out) == losses(other)
    assert weights(out).keys() == weights(other).keys()
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, weights(other)[name]), name


def assert_same_to_rounding(out, other, tolerance=1e-6):
    """Losses within 1e-6, and tensors, which are saved in bfloat16, within 1e-2 of their largest value."""
    assert losses(out) == pytest.approx(losses(other), rel=tolerance)
    for name, tensor in weights(out).items():
        assert (tensor - weights(other)[name]).abs().max() <= 1e-2 * tensor.abs().max(), name


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for what several tests compare with, and which the first of them makes."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def uninterrupted(trained_here, options, shared):
    """The folder of a run of twelve steps, which are two epochs."""
    out = shared / "one"
    if not out.exists():
        succeeded(trained_here(*options(steps=12, out=out), *EXACT))
    return out


@pytest.fixture
def uninterrupted_on_two(forked, command, shared):
    """The folder of such a run on two processes."""
    out = shared / "two"
    if not out.exists():
        succeeded(forked(*command(steps=12, out=out), *EXACT, processes=2))
    return out


# ---- A run that is stopped ----
def with_a_signal_to_all(kind, start_method, *command):
    """train.py with a signal to its data processes and itself in step 5; prints the number of their group."""
    os.setpgrp()
    print(os.getpgrp(), flush=True)
    multiprocessing.set_start_method(start_method, force=True)
    train.accumulate_gradients = doing_in_step(5, lambda: os.killpg(0, kind))
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
def test_a_run_stopped_by_a_signal_ends_with_the_same_bits(forked, trained_here, command, uninterrupted, tmp_path, kind,
                                                          start_method):
    """The signal goes to the data process too, which ends with the run."""
    arguments = [*command(steps=12), *EXACT, "--workers", 1]
    stopped = forked(*arguments, function=partial(with_a_signal_to_all, kind, start_method))
    assert stopped.returncode == 1, stopped.stderr
    assert "stopped at step 5 of 12: the same command with --resume goes on from step 5" in stopped.stderr
    assert not (tmp_path / "runs" / "phase1").exists()
    assert_group_ends(int(stopped.stdout))
    resumed = succeeded(trained_here(*arguments[1:], "--resume", "--workers", 0))
    assert "12 steps of 4 samples, from step 5" in resumed.stderr
    assert_same_bits(tmp_path / "runs", uninterrupted)


def test_a_run_stopped_before_its_first_step_takes_that_one(
        trained_here, options, uninterrupted, monkeypatch, tmp_path):
    """Only then the optimizer has something to save. It ends with the same bits."""
    stream = train.micro_batches

    def stream_after_signal(*arguments, **options):
        send_sigterm()
        yield from stream(*arguments, **options)
    with monkeypatch.context() as patch:
        patch.setattr(train, "micro_batches", stream_after_signal)
        stopped = trained_here(*options(steps=12), *EXACT)
    assert stopped.returncode == 1, stopped.stderr
    assert "stopped at step 1 of 12: the same command with --resume goes on from step 1" in stopped.stderr
    succeeded(trained_here(*options(steps=12), *EXACT, "--resume"))
    assert_same_bits(tmp_path / "runs", uninterrupted)


def test_a_signal_while_a_state_is_written_waits_for_it(trained_here, options, monkeypatch, tmp_path):
    """Two signals, in the state of step 2: the run stops after step 3, with both states complete."""
    save = torch.save

    def save_with_signals(*arguments):
        send_sigterm()
        os.kill(os.getpid(), signal.SIGINT)
        save(*arguments)
    monkeypatch.setattr(torch, "save", save_with_signals)
    stopped = trained_here(*options(steps=12), *EXACT, "--save-every", 2)
    assert stopped.returncode == 1 and "stopped at step 3 of 12" in stopped.stderr, stopped.stderr
    assert names_in(tmp_path / "runs" / "phase1.partial") == ["step-0000002", "step-0000003"]
    for state in states_in(tmp_path / "runs" / "phase1.partial"):
        assert ConvLLaVA.from_pretrained(state).llama.config.vocab_size == 768
        assert torch.load(state / "training.pt", weights_only=True)["progress"]["step"] == int(state.name[5:])


def test_signals_have_their_usual_effect_after_a_run(trained_here, options):
    before = [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)]
    succeeded(trained_here(*options(steps=1)))
    assert [signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)] == before


# A pause of 0.3 s in each step, so that a signal comes before the run's end.
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


def test_a_run_on_two_processes_stopped_by_sigterm_ends_the_same(forked, command, uninterrupted_on_two, tmp_path):
    """Sent to torchrun, to both processes and to their data processes; losses within 1e-6."""
    arguments = [*command(steps=12), *EXACT, "--workers", 1]
    program = [*launcher(2), "--no-python", *launcher(1), "-c", SLOWLY, *map(str, arguments[1:])]
    process = subprocess.Popen(program, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "runs" / "phase1.metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    send_to_all(signal.SIGTERM, tmp_path / "runs")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0 and errors.count("--resume goes on from step") == 1, errors
    succeeded(forked(*arguments, "--resume", "--workers", 0, processes=2))
    assert_same_to_rounding(tmp_path / "runs", uninterrupted_on_two)


# ---- A run that is killed ----
def test_a_killed_run_loses_the_steps_since_its_last_state(forked, trained_here, command, uninterrupted, tmp_path):
    """SIGKILL in step 7, the first of the second epoch; the run goes on from step 6 and ends with the same bits."""
    arguments = [*command(steps=12), *EXACT, "--save-every", 2]
    killed = forked(*arguments, function=partial(killed_in_step, 7))
    assert killed.returncode == -signal.SIGKILL
    assert names_in(tmp_path / "runs" / "phase1.partial") == ["step-0000004", "step-0000006"]
    resumed = succeeded(trained_here(*arguments[1:], "--resume"))
    assert "12 steps of 4 samples, from step 6" in resumed.stderr
    assert_same_bits(tmp_path / "runs", uninterrupted)
    assert names_in(tmp_path / "runs") == ["phase1", "phase1.metrics.jsonl"]


def killed_while_it_saves(step, *command):
    """train.py, which gets a SIGKILL when the state of a step is half-written."""
    save = torch.save

    def save_half(training, file):
        if training["progress"]["step"] == step:
            file.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        save(training, file)
    torch.save = save_half
    train_main(*command)


def test_a_run_killed_while_it_writes_a_state_goes_on_from_the_one_before(forked, trained_here, command, uninterrupted,
                                                                         tmp_path):
    """It ends with the same bits, and the half-written state is gone, though none of its name was written since."""
    arguments = [*command(steps=12), *EXACT, "--save-every", 2]
    killed = forked(*arguments, function=partial(killed_while_it_saves, 4))
    assert killed.returncode == -signal.SIGKILL
    assert names_in(tmp_path / "runs" / "phase1.partial") == ["step-0000002", "step-0000004.saving"]
    resumed = succeeded(trained_here(*arguments[1:], "--resume", "--save-every", 250))
    assert "from step 2" in resumed.stderr
    assert_same_bits(tmp_path / "runs", uninterrupted)
    assert names_in(tmp_path / "runs") == ["phase1", "phase1.metrics.jsonl"]


def test_a_run_killed_on_two_processes_goes_on_on_one(forked, trained_here, command, uninterrupted_on_two, tmp_path):
    """Which is told; losses within 1e-5."""
    arguments = [*command(steps=12), *EXACT, "--save-every", 2]
    killed = forked(*arguments, function=partial(killed_in_step, 6), processes=2)
    assert killed.returncode == -signal.SIGKILL
    resumed = succeeded(trained_here(*arguments[1:], "--resume"))
    assert "the stopped run had world 2, this one has 1" in resumed.stderr and "from step 4" in resumed.stderr
    assert_same_to_rounding(tmp_path / "runs", uninterrupted_on_two, tolerance=1e-5)


def with_a_signal_to_the_second(*command):
    """train.py on two processes, of which the second gets a SIGTERM in step 2."""
    if os.environ["RANK"] == "1":
        train.accumulate_gradients = doing_in_step(2, send_sigterm)
    train_main(*command)


@needs_torch_2_7
def test_a_sharded_run_goes_on_on_two_processes_or_on_one(forked, trained_here, command, tmp_path):
    """A signal to one process stops both. Losses within 1e-6 on two, within 1e-5 on one, with DDP."""
    def arguments(out):
        return [*command(steps=4, out=tmp_path / out), *EXACT]
    sharded = ["--parallel", "fsdp"]
    succeeded(forked(*arguments("uninterrupted"), *sharded, processes=2))
    stopped = forked(*arguments("two"), *sharded, processes=2, function=with_a_signal_to_the_second)
    assert stopped.returncode == 1, stopped.stderr
    assert names_in(tmp_path / "two" / "phase1.partial") == ["step-0000002"]
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    succeeded(forked(*arguments("two"), *sharded, "--resume", processes=2))
    assert_same_to_rounding(tmp_path / "two", tmp_path / "uninterrupted")
    resumed = succeeded(trained_here(*arguments("one")[1:], "--resume"))
    assert "the stopped run had parallel fsdp, this one has ddp" in resumed.stderr
    assert_same_to_rounding(tmp_path / "one", tmp_path / "uninterrupted", tolerance=1e-5)


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
    (["--batch", 8], "batch"), (["--steps", 5], "steps"), (["--seed", 7], "seed"), (["--resolution", 128], "resolution"),
    (["--recipe", "table12"], "trained")])
def test_what_decides_on_the_result_may_not_change(stopped_run, ended, change, setting):
    refused(ended(train.main, *stopped_run, "--resume", *change), f"'{setting}': ", "give the same")


def test_the_data_may_not_change(stopped_run, ended, pages, tmp_path):
    spoiled(pages, tmp_path, bad=1, total=24)
    refused(ended(train.main, *stopped_run, "--resume"), "'data': ", "give the same")


def test_the_depth_of_stage_5_may_not_change(stopped_run, ended):
    refused(ended(train.main, *stopped_run, "--resume", "--stage5-depth", 1), "has a stage 5 of 2 blocks")


def test_what_changes_only_the_rounding_may_change_and_is_told(stopped_run, trained_here, options, tmp_path, monkeypatch):
    """Losses within 1e-5 of those of a run with the first micro-batch and without --compile."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    resumed = succeeded(trained_here(*stopped_run, "--resume", "--micro-batch", 2, "--compile"))
    assert "the stopped run had micro_batch 1, this one has 2\n" in resumed.stderr
    assert "the stopped run had compile False, this one has True\n" in resumed.stderr
    assert resumed.stderr.count("the stopped run had") == 2
    succeeded(trained_here(*options(data=tmp_path / "spoiled.json", steps=4, out=tmp_path / "other"), *EXACT))
    assert losses(tmp_path / "runs") == pytest.approx(losses(tmp_path / "other"), rel=1e-5)


def test_a_resumed_run_computes_in_the_stopped_runs_type(stopped_here, trained_here, options, monkeypatch, tmp_path):
    """Whatever is faster here: with the same bits as a run in that type that was never stopped."""
    for name in ("uninterrupted", "resumed"):
        arguments = options(steps=3, out=tmp_path / name)
        if name == "resumed":
            stopped_here(2, *arguments, "--dtype", "bf16")
            monkeypatch.setattr(train, "faster_dtype", lambda device: "fp32")
            resumed = succeeded(trained_here(*arguments, "--resume"))
            assert "the stopped run had" not in resumed.stderr
        else:
            succeeded(trained_here(*arguments, "--dtype", "bf16"))
    assert_same_bits(tmp_path / "resumed", tmp_path / "uninterrupted")


def test_another_type_may_be_asked_for(stopped_run, trained_here):
    resumed = succeeded(trained_here(*stopped_run, "--resume", "--dtype", "bf16"))
    assert "the stopped run had dtype fp32, this one has bf16\n" in resumed.stderr


# ---- The states themselves ----
MICRO_BATCH = dict(input_ids=[torch.tensor([1, 5, 6])], images=[], labels=[torch.tensor([1, 5, 6])])


@pytest.fixture
def optimizer(model):
    """An optimizer that has taken a step."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(MICRO_BATCH["input_ids"], labels=MICRO_BATCH["labels"]).backward()
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.fixture
def saver(model, optimizer, tmp_path):
    return Saver(tmp_path / "states", 2, model, model, optimizer, nullcontext, settings={}, changeable={})


def newest_state(folder):
    """What a run with --resume would go on from."""
    load_checkpoint = partial(ConvLLaVA.from_pretrained, device="meta")
    return find_state(folder.parent / "phase1", folder, True, load_checkpoint)


def save_states(saver, *steps):
    """Saves the states of a run after some of its steps; returns its progress."""
    progress = Progress()
    for step in steps:
        progress.step = step
        saver.save_state(progress, MICRO_BATCH)
    return progress


def test_the_newest_states_stay(saver):
    save_states(saver, 3, 6, 9)
    assert names_in(saver.folder) == ["step-0000006", "step-0000009"]
    assert newest_state(saver.folder)[0].name == "step-0000009"


def test_a_step_is_saved_once_and_none_before_the_first(saver, monkeypatch):
    written = []
    monkeypatch.setattr(states, "write_state", lambda folder, step, *_: written.append(step))
    save_states(saver, 0, 3, 3)
    assert written == [3]


def test_a_state_puts_everything_back(saver, model, optimizer):
    """The weights, the optimizer's moments, the random numbers and the progress."""
    progress = Progress(step=7, unreadable=3, skipped=2)
    random_numbers = torch.get_rng_state()
    moments = [{name: value.clone() for name, value in moment.items()} for moment in optimizer.state.values()]
    saver.save_state(progress, MICRO_BATCH)

    torch.manual_seed(99)
    folder, state = newest_state(saver.folder)
    saver.optimizer = torch.optim.AdamW(model.parameters())
    assert saver.restore(state) == Progress(step=7, unreadable=3, skipped=2, saved_at=7)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    for moment, restored in zip(moments, saver.optimizer.state.values(), strict=True):
        assert all(torch.equal(value, restored[name]) for name, value in moment.items())
    loaded = ConvLLaVA.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("file, size", [
    ("training.pt", 100), ("model.safetensors", 1000), ("config.json", None), ("tokenizer.model", None)])
def test_a_damaged_state_is_passed_over_and_removed_with_the_next(saver, capsys, file, size):
    """One whose file was cut to that size, or is missing."""
    progress = save_states(saver, 2, 4)
    damaged = saver.folder / "step-0000009"
    shutil.copytree(saver.folder / "step-0000004", damaged)
    if size:
        os.truncate(damaged / file, size)
    else:
        (damaged / file).unlink()
    folder, state = newest_state(saver.folder)
    assert folder.name == "step-0000004" and state["progress"]["step"] == 4
    assert f"{damaged} is passed over, it cannot be read: " in capsys.readouterr().err
    progress.step = 6
    saver.save_state(progress, MICRO_BATCH)
    assert names_in(saver.folder) == ["step-0000004", "step-0000006"]


def test_a_damaged_state_of_the_same_step_is_replaced(saver):
    progress = save_states(saver, 2)
    shutil.copytree(saver.folder / "step-0000002", saver.folder / "step-0000004")
    (saver.folder / "step-0000004" / "config.json").unlink()
    progress.step = 4
    saver.save_state(progress, MICRO_BATCH)
    assert newest_state(saver.folder)[0].name == "step-0000004"


def test_a_half_written_state_is_not_taken_and_removed_with_the_next(saver):
    progress = save_states(saver, 2)
    (saver.folder / "step-0000004.saving").mkdir()
    assert newest_state(saver.folder)[0].name == "step-0000002"
    progress.step = 6
    saver.save_state(progress, MICRO_BATCH)
    assert names_in(saver.folder) == ["step-0000002", "step-0000006"]


class TouchesFile:
    """A pickle of it makes a file when it is run."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def test_code_in_a_state_is_not_run(saver, tmp_path):
    save_states(saver, 2, 4)
    torch.save({"optimizer": TouchesFile(tmp_path / "was-run")}, saver.folder / "step-0000004" / "training.pt")
    assert newest_state(saver.folder)[0].name == "step-0000002"
    assert not (tmp_path / "was-run").exists()


def test_a_full_disk_is_one_sentence_and_leaves_the_states(saver, monkeypatch):
    def full(*arguments):
        raise RuntimeError("PytorchStreamWriter failed\nand more")
    progress = save_states(saver, 2, 4)
    monkeypatch.setattr(torch, "save", full)
    progress.step = 6
    with pytest.raises(OSError, match="cannot be written: PytorchStreamWriter failed$"):
        saver.save_state(progress, MICRO_BATCH)
    assert names_in(saver.folder) == ["step-0000002", "step-0000004"]


def test_other_things_beside_the_states_stay(saver, tmp_path):
    """In a folder elsewhere, a larger disk say, of which the states' folder is a link."""
    (tmp_path / "disk" / "mine").mkdir(parents=True)
    saver.folder.symlink_to(tmp_path / "disk")
    progress = save_states(saver, 2)
    assert names_in(tmp_path / "disk") == ["mine", "step-0000002"]
    saver.save_checkpoint(tmp_path / "phase1", progress, MICRO_BATCH)
    assert names_in(tmp_path / "disk") == ["mine"]


def test_without_a_state_there_is_nothing_to_go_on_with(tmp_path):
    with pytest.raises(ValueError, match="there is no stopped run at .*: leave --resume out$"):
        newest_state(tmp_path / "states")
    (tmp_path / "states").mkdir()
    with pytest.raises(ValueError, match="leave --resume out, and remove the folder$"):
        newest_state(tmp_path / "states")


# ---- Steps that are skipped, and runs that diverge ----
def reporting(reports):
    """train.py's accumulate_gradients, which reports other losses and norms, {step: (loss, norm)}."""
    accumulate, numbers = train.accumulate_gradients, itertools.count(1)

    def accumulate_and_report(*arguments):
        computed = accumulate(*arguments)
        return reports.get(next(numbers), computed)
    return accumulate_and_report


def test_steps_without_a_finite_gradient_are_skipped(trained_here, options, monkeypatch, tmp_path):
    """Those too whose loss is not finite, or whose gradient norm is above 1000."""
    reports = {2: (math.nan, 1.0), 3: (1.0, math.inf), 4: (1.0, math.nan), 5: (1.0, 1001.0)}
    monkeypatch.setattr(train, "accumulate_gradients", reporting(reports))
    taken, take_step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: taken.append(self) or take_step(self))
    done = succeeded(trained_here(*options(steps=6)))
    assert [line["skipped"] for line in metrics(tmp_path / "runs")] == [0, 1, 2, 3, 4, 4]
    assert len(taken) == 2
    assert "(4 skipped steps)" in done.stderr


def test_no_state_is_saved_after_a_skipped_step(stopped_here, options, monkeypatch, tmp_path):
    """States are due after steps 3 and 6, and one for the stop after step 7: 3 and 7 are skipped."""
    monkeypatch.setattr(train, "accumulate_gradients", reporting({3: (1.0, math.inf), 7: (1.0, math.inf)}))
    stopped = stopped_here(7, *options(steps=12), "--save-every", 3)
    assert names_in(tmp_path / "runs" / "phase1.partial") == ["step-0000004", "step-0000006"]
    assert "stopped at step 7 of 12: the same command with --resume goes on from step 6" in stopped.stderr


def test_no_checkpoint_is_written_after_a_skipped_step(trained_here, options, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "accumulate_gradients", reporting({2: (1.0, math.inf)}))
    done = trained_here(*options(steps=2))
    assert done.returncode == 2 and "nothing is written" in done.stderr, done.stderr
    assert not (tmp_path / "runs" / "phase1").exists()


def test_no_state_is_saved_after_a_step_that_ruins_the_weights(stopped_here, options, tmp_path):
    """Its own loss is finite, and that of the weights it makes is not."""
    stopped_here(3, *options(steps=12), "--dtype", "fp32")
    stopped = stopped_here(1, *options(steps=12), "--dtype", "fp32", "--resume", "--lr", 1e30)
    assert "stopped at step 4 of 12: the same command with --resume goes on from step 3" in stopped.stderr
    assert metrics(tmp_path / "runs")[-1]["skipped"] == 0
    assert names_in(tmp_path / "runs" / "phase1.partial") == ["step-0000003"]


def test_ten_skipped_steps_in_a_row_end_the_run(stopped_here, forked, trained_here, command, tmp_path):
    """On two processes alike. The state of before stays, and with a lower rate the run goes on from it."""
    arguments = [*command(steps=16), "--dtype", "fp32"]
    stopped_here(3, *arguments[1:])
    ended_early = forked(*arguments, "--resume", "--lr", 1e30, "--save-every", 1, processes=2)
    assert ended_early.returncode == 2, ended_early.stderr
    assert ("10 steps in a row were skipped, their gradient norm was not finite or above 1000: go on with a lower "
            "--lr (stopped at step 14 of 16: the same command with --resume goes on from step 3)") in ended_early.stderr
    assert [line["skipped"] for line in metrics(tmp_path / "runs")] == [0] * 4 + [*range(1, 11)]
    assert names_in(tmp_path / "runs" / "phase1.partial") == ["step-0000003"]
    succeeded(trained_here(*arguments[1:], "--resume"))
    assert len(losses(tmp_path / "runs")) == 16 and max(losses(tmp_path / "runs")) < 10


def test_ten_skipped_steps_at_the_end_leave_nothing_to_go_on_from(trained_here, options, tmp_path):
    done = trained_here(*options(steps=11), "--dtype", "fp32", "--lr", 1e30)
    assert done.returncode == 2 and "10 steps in a row were skipped" in done.stderr, done.stderr
    assert "(stopped at step 11 of 11: begin anew)" in done.stderr
    assert names_in(tmp_path / "runs") == ["phase1.metrics.jsonl"]


@pytest.mark.parametrize("steps", [1, 3])
def test_a_diverged_run_leaves_the_older_checkpoint(trained_here, options, tmp_path, steps):
    """After one step at a rate of 1e30 all weights are finite, and the loss is not."""
    succeeded(trained_here(*options(steps=1), "--dtype", "fp32"))
    older = {file: file.read_bytes() for file in (tmp_path / "runs" / "phase1").rglob("*.*")}
    done = trained_here(*options(steps=steps), "--dtype", "fp32", "--lr", 1e30)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "train.py: the loss is not finite after the last step, so nothing is written" in done.stderr
    assert f"(stopped at step {steps} of {steps}: begin anew)" in done.stderr
    assert names_in(tmp_path / "runs") == ["phase1", "phase1.metrics.jsonl"]
    assert {file: file.read_bytes() for file in (tmp_path / "runs" / "phase1").rglob("*.*")} == older


def test_a_diverged_run_leaves_the_older_states(stopped_here, trained_here, options, tmp_path):
    """From which it goes on with a lower rate."""
    arguments = [*options(steps=4), "--dtype", "fp32"]
    stopped_here(3, *arguments)
    done = trained_here(*arguments, "--resume", "--lr", 1e30)
    assert done.returncode == 2, done.stderr
    assert "the same command with --resume goes on from step 3" in done.stderr
    assert names_in(tmp_path / "runs") == ["phase1.metrics.jsonl", "phase1.partial"]
    succeeded(trained_here(*arguments, "--resume"))
    assert names_in(tmp_path / "runs") == ["phase1", "phase1.metrics.jsonl"]


# ---- The log ----
def test_a_resumed_run_drops_the_lines_after_its_state(tmp_path):
    """And one that was half-written when the run was killed."""
    file = tmp_path / "phase1.metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = Log(file, 4, 5, Progress(step=2))
    log.write(Progress(step=3), loss=1.0, lr=0.1, norm=2.0, num_labels=9)
    log.close()
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "loss" in lines[2]


def test_a_line_says_what_a_step_did(tmp_path, monkeypatch):
    """Samples per second are those of this run: after its one step of 4 samples, which took 2 seconds, 2."""
    clock = iter((1, 3))
    monkeypatch.setattr(states, "time", SimpleNamespace(time=lambda: next(clock)))
    log = Log(tmp_path / "metrics.jsonl", 4, 40, Progress(step=7))
    log.write(Progress(step=8, unreadable=1, skipped=2), loss=1.5, lr=0.1, norm=2.5, num_labels=9)
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == dict(
        step=8, loss=1.5, lr=0.1, grad_norm=2.5, labels=9, samples_per_s=2, unreadable=1, skipped=2)


def test_the_bar_counts_the_samples_of_all_steps(tmp_path, capsys):
    log = Log(tmp_path / "metrics.jsonl", 4, 40, Progress(step=7))
    log.write(Progress(step=8), loss=1.5, lr=0.1, norm=2.5, num_labels=9)
    log.close()
    text = capsys.readouterr().err
    assert "28/160" in text and "32/160" in text and "loss=1.500" in text


def test_one_process_writes_the_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(states, "is_first_process", lambda: False)
    log = Log(tmp_path / "metrics.jsonl", 4, 40, Progress())
    log.write(Progress(step=1), loss=1.5, lr=0.1, norm=2.5, num_labels=9)
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().err == ""

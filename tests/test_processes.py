"""Several processes train as one does, however the work is shared, and all end when one fails."""
import multiprocessing
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

import llama
import train
from conftest import (
    ENVIRONMENT, ROOT, launcher, losses, metrics, needs_torch_2_7, run, run_of, small_config, spoiled,
    train_main)
from data import states
from data.conversation import IGNORE
from llama import Llama


def succeeded(process):
    assert process.returncode == 0, process.stderr
    return process


def checkpoint_tensors(folder):
    vision = load_file(folder / "vision_tower" / "model.safetensors")
    return load_file(folder / "model.safetensors") | vision


def files_in(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def assert_weights_are_close(folder, other):
    """Each tensor, saved in bfloat16, within 1e-2 of its largest value."""
    tensors, other_tensors = checkpoint_tensors(folder), checkpoint_tensors(other)
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert (tensor - other_tensors[name]).abs().max() <= 1e-2 * tensor.abs().max(), name


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A folder for what several tests compare with, and which the first of them makes."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture
def phase_1_checkpoint(forked, command, mixtures, shared):
    """The checkpoint of one step of phase 1."""
    if not (shared / "phase1").exists():
        two_images = command(data=mixtures / "two.json", images=mixtures, steps=1, out=shared)
        succeeded(forked(*two_images))
    return shared / "phase1"


@pytest.fixture
def phase_2(command, mixtures, phase_1_checkpoint):
    """Four steps of phase 2: an epoch has a batch of texts, one of images, and one of both."""
    def make(out):
        arguments = command(
            data=mixtures / "both.json", images=mixtures, steps=4, phase=2, batch=6, out=out)
        return [*arguments, "--init", phase_1_checkpoint]
    return make


@pytest.fixture
def ddp_run(forked, phase_2, shared):
    """The folder of phase 2 on two processes with DDP, in float32."""
    out = shared / "ddp"
    if not out.exists():
        succeeded(forked(*phase_2(out), "--dtype", "fp32", processes=2))
    return out


# ---- Several processes equal one ----
@pytest.mark.parametrize("name, phase", [("text", 1), ("two", 2), ("both", 3)])
def test_two_processes_equal_one(
        command, forked, mixtures, phase_1_checkpoint, tmp_path, name, phase):
    """Batches of samples without images, with two, and of both: float32 losses within 1e-5."""
    start = ["--init", phase_1_checkpoint] if phase > 1 else []
    one, two = tmp_path / "one", tmp_path / "two"
    for out, processes in ((one, 1), (two, 2)):
        arguments = command(
            data=mixtures / f"{name}.json", images=mixtures, steps=4, phase=phase, batch=6, out=out)
        succeeded(forked(*arguments, *start, "--dtype", "fp32", processes=processes))
    assert losses(two, phase) == pytest.approx(losses(one, phase), rel=1e-5)
    assert len(losses(one, phase)) == 4
    assert_weights_are_close(one / f"phase{phase}", two / f"phase{phase}")


def test_accumulation_on_two_processes_equals_one_batch(command, forked, tmp_path):
    """Losses of three steps within 1e-4: gradients are summed in another order."""
    one, two = tmp_path / "one", tmp_path / "two"
    for out, processes, micro_batch in ((one, 1, 8), (two, 2, 2)):
        arguments = [*command(batch=8, steps=3, out=out), "--micro-batch", micro_batch]
        succeeded(forked(*arguments, "--dtype", "fp32", processes=processes))
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert len(losses(one)) == 3


@pytest.fixture
def one_step_of_24(command, forked, pages, shared):
    """A step of all 24 pages, in two micro-batches on each of two processes: arguments and folder."""
    out = shared / "step"
    arguments = [*command(batch=24, steps=1, out=out), "--micro-batch", 6, "--dtype", "fp32",
                 "--val", pages / "val.json"]
    if not out.exists():
        done = succeeded(forked(*arguments, processes=2))
        (out / "stderr.txt").write_text(done.stderr)
    return arguments[1:], out


def test_loss_and_labels_are_those_of_the_global_batch(one_step_of_24):
    """Against every sample alone, weighted by its number of labels: the logged loss within 1e-5."""
    arguments, out = one_step_of_24
    torch.manual_seed(0)
    run_on_one = run_of(*arguments)
    sources, _ = train.find_data(run_on_one)
    model, _, dataset, _ = train.prepare(run_on_one, sources)
    sum_of_losses = sum_of_labels = 0
    for i in range(24):
        sample = dataset[i]
        num_labels = int((sample["labels"][1:] != IGNORE).sum())
        with torch.no_grad():
            loss = model([sample["input_ids"]], sample["images"], [sample["labels"]]).item()
        sum_of_losses += num_labels * loss
        sum_of_labels += num_labels
    step, _ = metrics(out)
    assert step["labels"] == sum_of_labels
    assert step["loss"] == pytest.approx(sum_of_losses / sum_of_labels, rel=1e-5)


def test_one_of_two_processes_reports_and_validates(one_step_of_24):
    """Each sentence once, on a line of its own; the bar goes to its end; no warning is shown."""
    arguments, out = one_step_of_24
    model = train.load_model(run_of(*arguments), None, "cpu")
    train.freeze(model, train.RECIPES["table15"][0].trained)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    total = sum(p.numel() for p in model.parameters()) / 1e6
    assert trained > 0.1

    text = (out / "stderr.txt").read_text()
    beginning = (f"phase 1, projector initialization: {trained:.1f}M of {total:.1f}M parameters "
                 "trained, 1 steps of 24 samples")
    assert text.count(f"\n{beginning}\n") == 1, text
    assert text.count(f"\nthe phase is done: {out / 'phase1'}\n") == 1, text
    assert " 24/24 " in text and "Warning" not in text, text
    _, validation = metrics(out)
    assert validation["right"]["all"][1] == 6


# ---- Compiled and sharded training equal DDP's ----
def without_kernels(*command):
    """train.py, which compiles without building kernels, as that takes a minute.

    Each block has to be one program, not several with Python in between.
    """
    torch.compile = partial(torch.compile, backend="eager")
    train_main(*command)
    assert not counters["graph_break"], counters["graph_break"]


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=needs_torch_2_7)])
def test_compiled_training_equals_ddp(phase_2, forked, ddp_run, tmp_path, parallel):
    """Phase 2 on two processes: float32 losses within 1e-5."""
    arguments = [*phase_2(tmp_path), "--dtype", "fp32", "--parallel", parallel, "--compile"]
    done = succeeded(forked(*arguments, processes=2, function=without_kernels))
    assert "_limit" not in done.stderr  # torch's warning that further programs are not compiled
    assert losses(tmp_path, 2) == pytest.approx(losses(ddp_run, 2), rel=1e-5)


def with_angles_in_float32(*command):
    """train.py, which fails where the Llama's layers get rounded rotary angles."""
    rotate = llama.rotate

    def rotate_checked(x, *angles):
        assert {angle.dtype for angle in angles} == {torch.float32}
        return rotate(x, *angles)
    llama.rotate = rotate_checked
    train_main(*command)


@needs_torch_2_7
@pytest.mark.parametrize("dtype, tolerance", [("fp32", 1e-5), ("bf16", 0.02)])
def test_sharded_training_equals_ddp(phase_2, forked, ddp_run, tmp_path, dtype, tolerance):
    """With accumulated gradients, recomputed activations and a saved state.

    Losses against DDP's in float32: within 1e-5, in bf16 within 2%.
    """
    arguments = [*phase_2(tmp_path), "--parallel", "fsdp", "--dtype", dtype, "--micro-batch", 1,
                 "--checkpointing", "--save-every", 3]
    succeeded(forked(*arguments, processes=2, function=with_angles_in_float32))
    assert losses(tmp_path, 2) == pytest.approx(losses(ddp_run, 2), rel=tolerance)
    assert files_in(tmp_path / "phase2") == files_in(ddp_run / "phase2")
    if dtype == "fp32":
        assert_weights_are_close(tmp_path / "phase2", ddp_run / "phase2")


@pytest.mark.parametrize("rank, device", [(0, "cpu"), (1, "meta")])
def test_one_process_alone_reads_what_will_be_sharded(options, monkeypatch, rank, device):
    monkeypatch.setattr(train, "shard", lambda model, run: model)
    run_sharded = run_of(*options(), "--parallel", "fsdp", rank=rank, world=2)
    sources, _ = train.find_data(run_sharded)
    model, *_ = train.prepare(run_sharded, sources)
    assert {parameter.device.type for parameter in model.parameters()} == {device}


def test_tied_embeddings_are_not_sharded():
    tied = SimpleNamespace(llama=Llama(small_config(tie_word_embeddings=True)))
    with pytest.raises(ValueError, match="does not support tied embeddings: use --parallel ddp"):
        train.shard(tied, run_of("--phase", 3, "--parallel", "fsdp", world=2))


# ---- When one fails, all end ----
def kill_rank(number, out):
    """SIGKILL to the process of that rank of the run that writes to `out`."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = ((process / name).read_text() for name in ("cmdline", "environ"))
            if str(out) in command and f"\0RANK={number}\0" in environment:
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:  # it has ended by now
            pass


def test_a_rank_that_dies_ends_the_job(command, tmp_path):
    """One of two processes is killed: the other does not wait for it."""
    process = subprocess.Popen([*launcher(2), *map(str, command(steps=5000))], cwd=ROOT,
                               env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "runs" / "phase1.metrics.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 2):
        time.sleep(0.01)
    kill_rank(1, tmp_path / "runs")
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0 and "SIGKILL" in errors, errors


def test_an_error_on_several_processes_ends_the_job_with_its_sentence(command, pages, tmp_path):
    """The sentence stands before torchrun's report."""
    data = spoiled(pages, tmp_path, bad=24, total=24)
    done = run(*command(data=data), processes=2)
    assert done.returncode != 0
    assert "train.py: no sample can be read" in done.stderr, done.stderr
    assert done.stderr.index("no sample can be read") < done.stderr.index("ChildFailed")


def with_a_fault(*command):
    """train.py with a fault in its loop, and data processes as on Linux with Python up to 3.13."""
    multiprocessing.set_start_method("fork", force=True)
    train.accumulate_gradients = None
    train_main(*command)


def test_an_unforeseen_error_ends_the_data_processes_too(command, forked):
    """Python waits for them as it ends, and they ignore the SIGTERM that it sends them."""
    done = forked(*command(), "--workers", 1, function=with_a_fault)
    assert done.returncode == 1 and "TypeError" in done.stderr, done.stderr


def test_ctrl_c_before_the_first_step_is_no_traceback(options, ended, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt
    monkeypatch.setattr(train, "train", interrupted)
    done = ended(train.main, *options())
    assert done.returncode == 130
    assert not done.stdout + done.stderr


# ---- Samples that cannot be read ----
def test_unreadable_samples_are_named_and_counted(command, forked, pages, tmp_path):
    """1 of 100, in each of two epochs: another sample stands in for it."""
    data = spoiled(pages, tmp_path, bad=1, total=100)
    done = succeeded(forked(*command(data=data, steps=20, batch=10)))
    assert done.stderr.count("gone.jpg") == 2
    assert "(2 unreadable samples)" in done.stderr
    assert metrics(tmp_path / "runs")[-1]["unreadable"] == 2


def slow_to_save(*command):
    """train.py, which saves two seconds later: time for the other process to leave too early."""
    write_state = states.write_state

    def write_late(*arguments):
        time.sleep(2)
        write_state(*arguments)
    states.write_state = write_late
    train_main(*command)


def test_more_than_one_percent_unreadable_samples_end_the_run(command, forked, pages, tmp_path):
    """3 of 200: the steps before the third are saved; the step that met it is not taken."""
    data = spoiled(pages, tmp_path, bad=3, total=200)
    done = forked(*command(data=data, steps=50, batch=4), processes=2, function=slow_to_save)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "3 samples could not be read, more than 1%" in done.stderr
    last = metrics(tmp_path / "runs")[-1]
    assert last["unreadable"] <= 2
    assert f"--resume goes on from step {last['step']}" in done.stderr
    state, = (tmp_path / "runs" / "phase1.partial").iterdir()
    assert state.name == f"step-{last['step']:07d}" and (state / "training.pt").exists()
    assert not (tmp_path / "runs" / "phase1").exists()

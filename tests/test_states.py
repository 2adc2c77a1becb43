"""What a run writes while it runs: its states, complete or not there, and its log."""
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import train
from conftest import ROOT, refused
from convllava import ConvLLaVA
from data import states
from data.states import Log, Progress, Saver, find_state

# ---- States ----
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
    settings = dict(trained=["projector"], steps=100, batch=4, seed=0, resolution=64, data=1)
    changeable = dict(lr=0.1, dtype="fp32", world=1, parallel="ddp", micro_batch=4, compile=False)
    return Saver(tmp_path / "states", 2, model, model, optimizer, nullcontext, settings, changeable)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


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
    moments = copy.deepcopy([*optimizer.state.values()])
    saver.save_state(progress, MICRO_BATCH)

    torch.manual_seed(99)
    folder, state = newest_state(saver.folder)
    saver.optimizer = torch.optim.AdamW(model.parameters())
    assert saver.restore(state) == Progress(step=7, unreadable=3, skipped=2, saved_at=7)
    assert torch.equal(torch.get_rng_state(), random_numbers)
    for saved, restored in zip(moments, saver.optimizer.state.values(), strict=True):
        assert all(torch.equal(value, restored[name]) for name, value in saved.items())
    loaded = ConvLLaVA.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("file, size", [
    ("training.pt", 100), ("model.safetensors", 1000), ("config.json", None),
    ("tokenizer.model", None)])
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


def without(part, key=None):
    """Takes a part out of what training.pt holds, or a key out of that part."""
    def change(training):
        del (training[part] if key else training)[key or part]
    return change


def with_another(part, key, value):
    def change(training):
        training[part][key] = value
    return change


@pytest.mark.parametrize("change", [
    without("optimizer"), without("rng"), without("settings"), without("changeable"), without("progress"),
    without("optimizer", "state"), without("settings", "steps"), without("changeable", "lr"), without("progress", "step"),
    with_another("progress", "step", "2"), with_another("progress", "step", None), with_another("progress", "step", 3),
    with_another("progress", "unknown", 2), with_another("settings", "unknown", 2), with_another("settings", "steps", 4),
    with_another("changeable", "dtype", "fp8"), with_another("changeable", "lr", "0.1"),
    lambda training: training.update(rng=training["rng"][:5]), lambda training: training.update(unknown=2)])
def test_a_state_with_other_content_is_passed_over(saver, capsys, change):
    save_states(saver, 2, 4)
    file = saver.folder / "step-0000004" / "training.pt"
    training = torch.load(file, weights_only=True)
    change(training)
    torch.save(training, file)
    assert newest_state(saver.folder)[0].name == "step-0000002"
    assert "step-0000004 is passed over, it cannot be read: training.pt has" in capsys.readouterr().err


def test_a_copy_of_a_state_is_neither_read_nor_removed(saver, tmp_path):
    progress = save_states(saver, 2)
    shutil.copytree(saver.folder / "step-0000002", saver.folder / "step-0000009-backup")
    assert newest_state(saver.folder)[0].name == "step-0000002"
    for progress.step in (4, 6, 8):
        saver.save_state(progress, MICRO_BATCH)
    saver.save_checkpoint(tmp_path / "phase1", progress, MICRO_BATCH)
    assert names_in(saver.folder) == ["step-0000009-backup"]


def test_a_damaged_state_of_the_same_step_is_replaced(saver):
    progress = save_states(saver, 2)
    shutil.copytree(saver.folder / "step-0000002", saver.folder / "step-0000004")
    (saver.folder / "step-0000004" / "config.json").unlink()
    progress.step = 4
    saver.save_state(progress, MICRO_BATCH)
    assert newest_state(saver.folder)[0].name == "step-0000004"


def test_a_half_written_state_is_not_taken_and_removed_with_the_next(saver):
    progress = save_states(saver, 2)
    (saver.folder / "step-0000004.saving-0123abcd").mkdir()
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
    malicious = {"optimizer": TouchesFile(tmp_path / "was-run")}
    torch.save(malicious, saver.folder / "step-0000004" / "training.pt")
    assert newest_state(saver.folder)[0].name == "step-0000002"
    assert not (tmp_path / "was-run").exists()


def test_a_full_disk_is_one_sentence_and_leaves_the_states(saver, monkeypatch):
    def full(*arguments):
        raise RuntimeError("PytorchStreamWriter failed\nand more")
    progress = save_states(saver, 2, 4)
    monkeypatch.setattr(torch, "save", full)
    progress.step = 6
    advice = "the same command with --resume goes on from step 4"
    with pytest.raises(OSError, match=f"cannot be written: PytorchStreamWriter failed .*{advice}"):
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


def test_what_somebody_has_put_into_a_state_stays(saver):
    progress = save_states(saver, 2)
    (saver.folder / "step-0000002" / "thesis.txt").write_text("mine")
    for progress.step in (4, 6, 8):
        saver.save_state(progress, MICRO_BATCH)
    assert names_in(saver.folder) == ["step-0000002", "step-0000006", "step-0000008"]


def test_moments_of_another_shape_are_refused(saver, model):
    save_states(saver, 2)
    _, state = newest_state(saver.folder)
    moments = state["optimizer"]["state"]["projector.0.bias"]
    moments["exp_avg"] = moments["exp_avg"][:1]
    saver.optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="the optimizer in the state of step 2 .* does not fit: move that state away"):
        saver.restore(state)


# ---- A run has its phase for itself ----
HOLDS_THE_LOCK = """
import sys, time
from pathlib import Path
from data.states import only_run
with only_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_of_a_phase_is_refused_until_the_first_ends(tmp_path, options, ended):
    """However it ends: here it is killed. The lock's file goes with the run that comes after it."""
    file = tmp_path / "runs" / "phase1.lock"
    first = subprocess.Popen([sys.executable, "-c", HOLDS_THE_LOCK, file], cwd=ROOT, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"held\n"
    refused(ended(train.main, *options()), "another run of this phase is going on in", "runs: let it end")
    first.kill()
    first.communicate()
    with states.only_run(file):
        assert file.exists()
    assert not file.exists()


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path):
    with states.only_run(tmp_path / "runs" / "phase1.lock"):
        pass
    assert not (tmp_path / "runs").exists()


# ---- Signals ----
def test_a_first_ctrl_c_is_collected_and_a_second_ends_the_program():
    with states.stop_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals == [signal.SIGINT]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


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
    """Samples per second are those of this run: 2, after one step of 4 samples in 2 seconds."""
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

"""Small random models and data in the real layouts, shared by the tests, and ways to run the programs.

    run("sample.py", ...)            a program as a user starts it
    forked("train.py", ...)          train.py in new processes that have torch imported already, which is faster
    ended(train.main, ...)           a program's main in this process, for what ends before any work
    options(...), command(...)       the arguments of a short run of train.py, without and with its name
    run_of(...)                      the train.Run that such arguments make
    refused(process, words)          asserts one sentence with these words, and status 2
"""
import itertools
import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from convllava import ConvLLaVA  # noqa: E402
from convnext import ConvNeXt  # noqa: E402
from data.conversation import Tokenizer  # noqa: E402
from data.nano.generate import generate  # noqa: E402
from llama import Llama, LlamaConfig  # noqa: E402

torch.set_num_threads(1)  # models as small as these gain nothing from more, and lose much beside other programs
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")  # of the programs that tests run
TOKENIZER = ROOT / "tests" / "tokenizer" / "tokenizer.model"  # of 768 pieces
needs_torch_2_7 = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"),
                                     reason="fully_shard of torch 2.6 does not run on processors")


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer(TOKENIZER)


def small_config(**changes):
    return LlamaConfig(**dict(vocab_size=768, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512) | changes)


def small_llama(**changes):
    llama = Llama(small_config(**changes))
    llama.init_weights()
    for parameter in llama.parameters():  # larger than at the start of training, so that differences show
        parameter.data.mul_(3 if parameter.dim() > 1 else 1)
    return llama


def awake(convnext):
    """Layer scales of a trained network's size: at 1e-6 the blocks would hide their mistakes."""
    for stage in convnext.stages:
        for block in stage.blocks:
            torch.nn.init.uniform_(block.gamma, 0.2, 0.8)
    return convnext


def small_convnext(stages=5):
    return awake(ConvNeXt((1, 1, 2, 1, 2)[:stages], (8, 12, 16, 20, 24)[:stages]))


@pytest.fixture
def model(tokenizer):
    """A random five-stage ConvLLaVA in training mode, float32."""
    torch.manual_seed(0)
    return ConvLLaVA(small_convnext(), small_llama(), tokenizer, resolution=128, max_length=512)


@pytest.fixture(scope="session")
def backbones(tmp_path_factory, tokenizer):
    """Folder with a four-stage `vision` (ConvNeXt) and an `llm` (Llama), random."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("backbones")
    small_convnext(stages=4).save_pretrained(folder / "vision", resolution=128)
    small_llama().save_pretrained(folder / "llm")
    (folder / "llm" / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    return folder


@pytest.fixture(scope="session")
def pages(tmp_path_factory):
    """Folder with generated captions.json, instructions.json and val.json."""
    folder = tmp_path_factory.mktemp("pages")
    generate(folder, {"captions.json": ("train", "captions", 24), "instructions.json": ("train", "instructions", 24),
                      "val.json": ("val", "instructions", 6)}, workers=1, quiet=True)
    return folder


def launcher(processes):
    """The start of a command that runs a program of the repo on so many processes."""
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]


def run(*command, processes=1, **options):
    """Runs a program of the repo; returns the finished process with its text."""
    return subprocess.run([*launcher(processes), *map(str, command)], cwd=ROOT, env=ENVIRONMENT, capture_output=True,
                          text=True, timeout=240, **options)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["conftest", "train"])


def redirected(function, arguments, environment, out, err):
    """What a process of forked() does."""
    for descriptor, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.environ.update(environment)
    function(*arguments)


def train_main(*command):
    import train
    sys.argv = [*map(str, command)]
    train.main()


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """Like run(), of train.py's main or another function, in processes that are forked from one with torch and
    train.py imported: a new Python takes seconds for that. torchrun's part is played here."""
    numbers = itertools.count()  # calls may overlap

    def call(*command, processes=1, function=train_main):
        for name, value in dict(ENVIRONMENT, PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}").items():
            monkeypatch.setenv(name, value)  # for the server, which starts with the first call
        environment = {}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                environment = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
        out, err = (tmp_path / f"{name}-{next(numbers)}.txt" for name in ("stdout", "stderr"))
        ranks = []
        for rank in range(processes):
            if processes > 1:
                environment |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            ranks.append(FORKS.Process(target=redirected, args=(function, command, environment, out, err)))
            ranks[-1].start()
        until = time.time() + 240
        try:
            while any(rank.exitcode is None for rank in ranks) and not any(rank.exitcode for rank in ranks):
                assert time.time() < until, f"{command} takes more than 240 s"
                ranks[0].join(0.02)
            code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        finally:
            for rank in ranks:  # one that failed, or the time limit, ends the others
                rank.kill()
                rank.join()
        texts = [file.read_text() for file in (out, err)]
        out.unlink(), err.unlink()
        return SimpleNamespace(returncode=code, stdout=texts[0], stderr=texts[1])
    return call


@pytest.fixture
def ended(monkeypatch, capsys):
    """Like run(), but calls the program's main in this process: faster, for what ends before any work."""
    def call(main, *arguments):
        monkeypatch.setattr("sys.argv", ["program", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code, stdout=out, stderr=err)
    return call


def refused(process, *words):
    """Asserts one sentence on stderr with these words, exit status 2, and nothing on stdout."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr and len(process.stderr.strip().splitlines()) == 1, process.stderr
    assert process.stdout == ""
    for word in words:
        assert word in process.stderr, process.stderr


# ---- Training: the command of a small run, its data, and what it writes ----
@pytest.fixture
def options(backbones, pages, tmp_path):
    """train.py's arguments for two steps of phase 1 on generated captions, with the small random backbones."""
    def make(data=pages / "captions.json", images=pages, steps=2, phase=1, out=tmp_path / "runs", batch=4):
        length = ["--steps", steps] if steps else []  # without: an epoch
        return ["--phase", phase, "--vision", backbones / "vision", "--llm", backbones / "llm", "--resolution", 64,
                "--data", data, "--images", images, "--batch", batch, "--out", out, "--workers", 0, *length]
    return make


@pytest.fixture
def command(options):
    """The same as a command line, to be run in other processes."""
    return lambda *data, **changes: ["train.py", *options(*data, **changes)]


def run_of(*arguments, rank=0, world=1, device="cpu", dtype="fp32"):
    """The Run that train.py makes of its arguments."""
    args = train.arguments([str(argument) for argument in arguments])
    Path(args.out).mkdir(parents=True, exist_ok=True)  # as the program has it by then
    return train.make_run(args, rank, world, device, dtype)


def metrics(out, phase=1):
    """The lines of a phase's metrics file: one for each step, then one of the validation where there was one."""
    return [json.loads(line) for line in (out / f"phase{phase}.metrics.jsonl").read_text().splitlines()]


def losses(out, phase=1):
    """The losses of a phase's steps."""
    return [line["loss"] for line in metrics(out, phase) if "loss" in line]


def conversation(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def spoiled(pages, folder, bad, total):
    """Writes an annotation file of `total` captions, the images of whose first `bad` are not there."""
    entries = (json.loads((pages / "captions.json").read_text()) * 20)[:total]
    for i in range(bad):
        entries[i] = entries[i] | {"image": "gone.jpg"}
    (folder / "spoiled.json").write_text(json.dumps(entries))
    return folder / "spoiled.json"


@pytest.fixture(scope="session")
def mixtures(tmp_path_factory):
    """Folder with annotation files: text.json without images, two.json with two each, both.json with both by turns."""
    folder = tmp_path_factory.mktemp("mixtures")
    for i in range(2):
        Image.effect_noise((50, 40 + 20 * i), 80).save(folder / f"{i}.png")
    text = [{"id": f"t{i}", "conversations": conversation(f"What is {i}?", "x" * (i + 1))} for i in range(8)]
    two = [{"id": f"i{i}", "image": ["0.png", "1.png"],
            "conversations": conversation("<image>\n<image>\nCompare.", f"They differ {i}.")} for i in range(8)]
    both = [entry for pair in zip(text, two) for entry in pair]
    for name, entries in (("text", text), ("two", two), ("both", both)):
        (folder / f"{name}.json").write_text(json.dumps(entries))
    return folder

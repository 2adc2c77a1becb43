"""bench.py peers: its table at small sizes, and what it says where nothing can be compared."""
import sys

import pytest

import bench
import peers

with_transformers = pytest.importorskip("with_transformers", reason="the peers are models of transformers 5")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    llama = dict(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2)
    convnext = dict(depths=(1, 1, 2, 1, 1), dims=(8, 12, 16, 20, 24))
    training = dict(convnext=convnext, llama=llama, pixels=64, texts=(9, 2, 5, 3), micro_batch=2)
    sizes = dict(LLAMA=llama, CONVNEXT_L_DAGGER=convnext, TRAINING=training, PIXELS=64, RESOLUTIONS=(64, 128),
                 PREFILL=20, PROMPT=5, NEW_TOKENS=4, PHOTO=(80, 60), PHOTO_PIXELS=64)
    limits = dict(matrix_peak=lambda *_: 1e12, copy_peak=lambda: 1e12, in_new_process=lambda *_: (2e9, 1e9))
    for name, value in (sizes | limits).items():
        monkeypatch.setattr(peers, name, value)


def cells(text):
    """Of the table's lines behind its head."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[4:]]


def test_equal_results_are_timed(capsys):
    bench.main(["peers", "--rounds", "2", "--only", "convnext5", "prefill", "decode", "decode8", "prefill-int8",
                "decode-int8", "preprocess", "train", "resolution"])
    rows = cells(capsys.readouterr().out)
    assert len(rows) == 8 + 1 + 3  # two of training, three of the resolutions
    for name, ours, peer, ratio, limit, share in rows[:9]:
        assert ours and peer and float(ratio.removesuffix("×")) > 0 and limit and share.endswith("%"), name
    assert [row[0].split()[-2] for row in rows[9:]] == ["64", "128", "over"] and float(rows[11][1]) < 1.5


def test_what_is_not_there_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    bench.main(["peers", "--only", "convnext4", "load"])
    timm, checkpoint = cells(capsys.readouterr().out)
    assert timm[1] == "timm is not installed" and "--checkpoint FOLDER" in checkpoint[1]


@pytest.mark.parametrize("key", ["prefill", "decode"])
def test_unequal_results_are_not_timed(capsys, monkeypatch, key):
    config = with_transformers.LlamaConfig
    monkeypatch.setattr(with_transformers, "LlamaConfig", lambda **sizes: config(**sizes | dict(rope_theta=100.0)))
    with pytest.raises(SystemExit, match="2"):
        bench.main(["peers", "--only", key])
    out, err = capsys.readouterr()
    assert "the results differ by" in cells(out)[0][1] and f"could not be compared: {key}" in err

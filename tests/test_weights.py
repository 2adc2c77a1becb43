"""Weights on disk: shards, the four layouts, and files that are broken or hostile."""
import json
import os
import pickle
import struct

import pytest
import torch
from conftest import ROOT, refused, small_llama
from safetensors.torch import load_file, save_file

import sample
from convllava import ConvLLaVA
from data import weights
from llama import Llama, LlamaConfig


@pytest.fixture
def checkpoint(model, tmp_path):
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k].to(a[k].dtype)) for k in a)


def rewrite(folder, kind, dtype=None):
    """The folder's one safetensors file as another published form."""
    tensors = {k: v.to(dtype) for k, v in load_file(folder / "model.safetensors").items()}
    os.remove(folder / "model.safetensors")
    if kind in ("safetensors", "bin"):
        (save_file if kind == "safetensors" else torch.save)(
            tensors, folder / {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}[kind])
        return
    old = lambda tensors, file: torch.save(tensors, file, _use_new_zipfile_serialization=kind != "old bin shards")
    stem, end, save = (("model", "safetensors", save_file) if kind == "safetensors shards" else
                       ("pytorch_model", "bin", old))
    names = sorted(tensors)
    index = {name: f"{stem}-{1 + i % 3:05d}-of-00003.{end}" for i, name in enumerate(names)}
    for file in set(index.values()):
        save({name: tensors[name] for name in names if index[name] == file}, folder / file)
    (folder / f"{stem}.{end}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["safetensors", "bin", "safetensors shards", "bin shards", "old bin shards"])
def test_every_form_of_file_gives_the_same_model(model, checkpoint, kind, dtype):
    model.to(dtype)
    for folder in (checkpoint, checkpoint / "vision_tower"):
        rewrite(folder, kind, dtype)
    assert same(model, ConvLLaVA.from_pretrained(checkpoint))
    asked = ConvLLaVA.from_pretrained(checkpoint, dtype=torch.float32)
    assert same(model.float(), asked) and {p.dtype for p in asked.parameters()} == {torch.float32}


def test_large_models_are_written_in_shards(model, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)
    model.save_pretrained(tmp_path / "a")
    shards = sorted(tmp_path.glob("a/model-*-of-*.safetensors"))
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and {s.name for s in shards} == set(index["weight_map"].values())
    biggest = max(v.numel() * 4 for v in model.state_dict().values())
    assert all(sum(v.numel() * 4 for v in load_file(s).values()) <= max(40_000, biggest) for s in shards)
    held = {name: s.name for s in shards for name in load_file(s)}
    assert held == index["weight_map"]
    assert index["metadata"]["total_size"] == sum(4 * v.numel() for s in shards for v in load_file(s).values())
    assert same(model, ConvLLaVA.from_pretrained(tmp_path / "a"))
    for files, most in ((1, index["metadata"]["total_size"]), (2, index["metadata"]["total_size"] - 1)):
        monkeypatch.setattr(weights, "SHARD_BYTES", most)
        model.save_pretrained(tmp_path / f"{files}")
        assert len(list(tmp_path.glob(f"{files}/*.safetensors"))) == files
        assert same(model, ConvLLaVA.from_pretrained(tmp_path / f"{files}"))


def test_weights_of_several_types_get_the_first_ones(model, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].bfloat16()
    save_file(tensors, checkpoint / "model.safetensors")
    assert {p.dtype for p in ConvLLaVA.from_pretrained(checkpoint).parameters()} == {torch.float32}


def test_unused_keys_are_ignored_and_others_are_not(tmp_path):
    llama = small_llama()
    llama.save_pretrained(tmp_path / "llm")
    file = tmp_path / "llm" / "model.safetensors"
    tensors = load_file(file) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors, file)
    assert same(llama, Llama.from_pretrained(tmp_path / "llm"))
    save_file(tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(4)}, file)
    with pytest.raises(ValueError, match=r"llm does not fit.*1 unexpected: model.layers.0.self_attn.q_proj.bias"):
        Llama.from_pretrained(tmp_path / "llm")
    tensors["model.norm.weight"] = torch.ones(5)
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file)
    expected = r"2 missing: lm_head.weight, model.layers.1.*model.norm.weight is \[5\] and not \[32\]"
    with pytest.raises(ValueError, match=expected):
        Llama.from_pretrained(tmp_path / "llm")


@pytest.mark.parametrize("field, value", [
    ("mm_projector_type", "linear"), ("rope_scaling", {"type": "linear", "factor": 2.0}), ("hidden_act", "gelu"),
    ("attention_bias", True), ("mlp_bias", True), ("head_dim", 16), ("image_aspect_ratio", "anyres"),
    ("mm_use_im_start_end", True), ("mm_use_im_patch_token", True), ("mm_vision_resolution", "1536"),
    ("tokenizer_model_max_length", 2048.5), ("mm_vision_tower", 5), ("hidden_size", "32"), ("num_key_value_heads", 3),
    ("rms_norm_eps", None), ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})])
def test_settings_that_would_make_another_model_are_refused(checkpoint, field, value):
    config = json.loads((checkpoint / "config.json").read_text()) | {field: value}
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=f"config.json: .*{field.replace('rope_parameters', 'rope_scaling')}"):
        ConvLLaVA.from_pretrained(checkpoint)


def test_settings_that_say_the_same_are_read(checkpoint):
    """Those of files of several ages, and what is taken for settings that lack."""
    config = json.loads((checkpoint / "config.json").read_text())
    for field in ("mm_vision_resolution", "tokenizer_model_max_length", "rope_theta", "tie_word_embeddings"):
        del config[field]
    config |= dict(mm_use_im_start_end=False, mm_use_im_patch_token=False, rope_scaling=None, attention_bias=False,
                   mlp_bias=False, head_dim=None, rope_parameters=dict(rope_type="default", rope_theta=500.0),
                   mm_vision_select_layer=-2, pretraining_tp=1)
    (checkpoint / "config.json").write_text(json.dumps(config))
    model = ConvLLaVA.from_pretrained(checkpoint)
    assert (model.resolution, model.max_length, model.llama.config.rope_theta) == (1536, 2048, 500.0)
    for change in (dict(num_key_value_heads=None), {}):  # before there was grouped-query attention
        del config["num_key_value_heads"]
        (checkpoint / "config.json").write_text(json.dumps(config := config | change))
        assert LlamaConfig.from_json(checkpoint / "config.json").num_key_value_heads == 4


def test_nan_is_a_warning_that_names_the_tensor(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.warns(UserWarning, match="model.layers.1.mlp.up_proj.weight holds NaN"):
        ConvLLaVA.from_pretrained(checkpoint)


def test_an_interrupted_save_leaves_the_older_checkpoint(model, checkpoint, monkeypatch):
    before = {f: f.read_bytes() for f in checkpoint.rglob("*") if f.is_file()}
    saving, older = (checkpoint.with_name(f"checkpoint.{end}") for end in ("saving", "replaced"))

    def is_as_it_was():
        return ({f: f.read_bytes() for f in checkpoint.rglob("*") if f.is_file()} == before
                and list(checkpoint.parent.iterdir()) == [checkpoint])

    monkeypatch.setattr("llama.Tokenizer.save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(checkpoint)
    assert is_as_it_was()
    checkpoint.rename(older)  # stopped between the two renames
    with pytest.raises(ValueError, match="checkpoint.replaced"):
        ConvLLaVA.from_pretrained(checkpoint)
    with pytest.raises(OSError, match="disk full"):  # and then again, before them
        model.save_pretrained(checkpoint)
    assert is_as_it_was()
    monkeypatch.undo()
    for rest in (saving, older):  # stopped while writing, and behind the two renames
        rest.mkdir()
        (rest / "half.safetensors").write_bytes(b"half")
    model.save_pretrained(checkpoint)
    assert same(model, ConvLLaVA.from_pretrained(checkpoint)) and is_as_it_was()


def test_a_checkpoint_behind_a_link_is_replaced_there(model, checkpoint):
    link = checkpoint.with_name("link")
    link.symlink_to(checkpoint)
    for dtype in (torch.float16, torch.bfloat16):
        model.save_pretrained(link, dtype)
        assert link.is_symlink() and ConvLLaVA.from_pretrained(checkpoint).projector[0].weight.dtype == dtype
    assert len(list(checkpoint.parent.iterdir())) == 2


def test_a_save_removes_nothing_but_an_older_save(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="holds other things"):
            model.save_pretrained(path)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


class Runs:
    def __reduce__(self):
        return os.system, ("touch was-run",)


def break_pickle(folder):
    os.remove(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": Runs()}))


def break_zipped_pickle(folder):
    os.remove(folder / "model.safetensors")
    torch.save({"model.norm.weight": Runs()}, folder / "pytorch_model.bin")


def break_shard(folder):
    rewrite(folder, "safetensors shards")
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])


def break_bin_shard(folder):
    rewrite(folder, "bin shards")
    shard = folder / "pytorch_model-00002-of-00003.bin"
    shard.write_bytes(shard.read_bytes()[:-1000])


def lose_shard(folder):
    rewrite(folder, "safetensors shards")
    os.remove(folder / "model-00002-of-00003.safetensors")


def leave_folder(folder):
    rewrite(folder, "safetensors shards")
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00003", "../model-00002-of-00003"))


def spoil_index(folder):
    rewrite(folder, "safetensors shards")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": ["model-00001-of-00003.safetensors"]}')


def number_shards(folder):
    rewrite(folder, "safetensors shards")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": 1}}')


def spoil_config(folder):
    (folder / "config.json").write_text("{not JSON")


def list_config(folder):
    (folder / "config.json").write_text('["hidden_size"]')


def clear_config(folder):
    (folder / "config.json").write_text("{}")


def shorten_config(folder):
    fields = json.loads((folder / "config.json").read_text())
    del fields["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(fields))


def promise_more(folder):
    promised = {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4 * 10**9]}
    header = json.dumps({"model.norm.weight": promised}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))


def promise_header(folder):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 10**12) + b"{}")


def hold_integers(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v.to(torch.int8) for k, v in tensors.items()}, folder / "model.safetensors")


def empty(folder):
    (folder / "model.safetensors").write_bytes(b"")


def change_tokenizer(folder):
    fields = json.loads((folder / "config.json").read_text()) | {"vocab_size": 700}
    (folder / "config.json").write_text(json.dumps(fields))


def empty_bin(folder):
    os.remove(folder / "model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"")


def hold(name, value):
    """Puts one tensor, or a function of it, into a .bin file."""
    def damage(folder):
        rewrite(folder, "bin")
        tensors = torch.load(folder / "pytorch_model.bin", weights_only=True)
        tensors[name] = value(tensors.get(name))
        torch.save(tensors, folder / "pytorch_model.bin")
    return damage


def shrink_scale(folder):
    hold("encoder.stages.1.layers.0.layer_scale_parameter", lambda scale: scale[0])(folder / "vision_tower")


def enlarge(folder):
    fields = json.loads((folder / "config.json").read_text()) | dict(intermediate_size=2 ** 62)
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("damage, said", [
    (empty_bin, "pytorch_model.bin cannot be read"), (hold("model.norm.weight", torch.Tensor.to_sparse), "only dense"),
    (hold("model.norm.weight", lambda value: value.to("meta")), "only dense"), (hold(5, lambda _: torch.ones(1)), "5"),
    (hold("model.norm.weight", lambda value: value.to(torch.float8_e4m3fn)), "float8_e4m3fn"),
    (shrink_scale, "layer_scale_parameter is [] and not [1]"), (enlarge, "intermediate_size is 46"),
    (break_pickle, "nothing of it was run"), (break_zipped_pickle, "nothing of it was run"),
    (break_shard, "model-00002-of-00003.safetensors cannot be read"),
    (break_bin_shard, "pytorch_model-00002-of-00003.bin cannot be read"),
    (lose_shard, "model-00002-of-00003.safetensors is missing"), (leave_folder, "names '../model-00002"),
    (spoil_index, "weight_map"), (number_shards, "weight_map"), (spoil_config, "config.json is not"),
    (list_config, "config.json should hold a JSON object"), (clear_config, "config.json should hold a JSON object"),
    (shorten_config, "lacks 'intermediate_size'"), (promise_more, "model.safetensors cannot be read"),
    (promise_header, "model.safetensors cannot be read"),
    (hold_integers, "torch.int8"), (empty, "model.safetensors cannot be read"), (change_tokenizer, "768 pieces")])
def test_broken_or_hostile_weights_are_one_sentence(checkpoint, tmp_path, monkeypatch, damage, said):
    monkeypatch.chdir(tmp_path)
    damage(checkpoint)
    with pytest.raises(ValueError) as caught:
        ConvLLaVA.from_pretrained(checkpoint)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "was-run").exists()


def test_sample_refuses_them_with_status_2(checkpoint, ended):
    break_pickle(checkpoint)
    image = ROOT / "data" / "nano" / "examples" / "receipt.png"
    refused(ended(sample.main, image, "What?", "--checkpoint", checkpoint), "nothing of it was run")

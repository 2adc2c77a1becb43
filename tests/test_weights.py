"""Weights on disk: their forms, shards, settings, saves that are interrupted, and damaged files."""
import json
import os
import pickle
import struct
import warnings
from functools import partial

import pytest
import torch
from conftest import ROOT, refused, small_llama
from safetensors.torch import load_file, save_file

import sample
from convllava import ConvLLaVA
from convnext import ConvNeXt
from data import weights
from data.conversation import Tokenizer
from llama import Llama, LlamaConfig


@pytest.fixture
def checkpoint(model, tmp_path):
    """The folder of a saved model, in float32."""
    model.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def assert_same_weights(model, expected):
    weights, expected_weights = model.state_dict(), expected.state_dict()
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        assert weights[name].dtype == value.dtype, name
        assert torch.equal(weights[name], value), name


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def remove_from_config(folder, *fields):
    config = json.loads((folder / "config.json").read_text())
    for field in fields:
        del config[field]
    (folder / "config.json").write_text(json.dumps(config))


# ---- Forms of files ----

def take_tensors(folder, dtype=None):
    """Removes the folder's model.safetensors, and returns its tensors."""
    file = folder / "model.safetensors"
    tensors = {name: value.to(dtype) for name, value in load_file(file).items()}
    file.unlink()
    return tensors


def rewrite_as_file(folder, name, save, dtype=None):
    save(take_tensors(folder, dtype), folder / name)


def rewrite_as_shards(folder, name, save, dtype=None):
    """Three shards and their index."""
    tensors = take_tensors(folder, dtype)
    stem, suffix = name.split(".")
    weight_map = {}
    for i, tensor_name in enumerate(sorted(tensors)):
        weight_map[tensor_name] = f"{stem}-{i % 3 + 1:05d}-of-00003.{suffix}"
    for file in set(weight_map.values()):
        shard = {name: value for name, value in tensors.items() if weight_map[name] == file}
        save(shard, folder / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


FORMS = {
    "safetensors": (rewrite_as_file, "model.safetensors", save_file),
    "bin": (rewrite_as_file, "pytorch_model.bin", torch.save),
    "safetensors shards": (rewrite_as_shards, "model.safetensors", save_file),
    "bin shards": (rewrite_as_shards, "pytorch_model.bin", torch.save),
    "older bin shards": (rewrite_as_shards, "pytorch_model.bin",
                         partial(torch.save, _use_new_zipfile_serialization=False)),
}


def rewrite(folder, form, dtype=None):
    """Gives the folder's weights another published form."""
    rewrite_as, name, save = FORMS[form]
    rewrite_as(folder, name, save, dtype)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_type_of_file_gives_the_same_model(model, checkpoint, form, dtype):
    for folder in (checkpoint, checkpoint / "vision_tower"):
        rewrite(folder, form, dtype)
    assert_same_weights(ConvLLaVA.from_pretrained(checkpoint), model.to(dtype))


@DTYPES
def test_weights_are_converted_to_the_type_that_is_asked_for(model, checkpoint, dtype):
    for folder in (checkpoint, checkpoint / "vision_tower"):
        rewrite(folder, "safetensors", dtype)
    loaded = ConvLLaVA.from_pretrained(checkpoint, dtype=torch.float32)
    assert_same_weights(loaded, model.to(dtype).float())


def replace_tensor(folder, name, change):
    """Puts change(tensor) in place of a tensor of the folder's model.safetensors."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors")


def test_weights_of_several_types_get_the_first_ones(checkpoint):
    replace_tensor(checkpoint, "model.layers.0.mlp.up_proj.weight", torch.Tensor.bfloat16)
    types = {parameter.dtype for parameter in ConvLLaVA.from_pretrained(checkpoint).parameters()}
    assert types == {torch.float32}


def test_a_value_that_overflows_in_float16_is_not_called_damage(checkpoint):
    replace_tensor(checkpoint, "model.norm.weight", lambda value: value * 1e6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ConvLLaVA.from_pretrained(checkpoint, dtype=torch.float16)
    assert model.llama.norm.weight.isinf().all()


def test_nan_is_a_warning_that_names_the_tensor(checkpoint):
    def put_nan(value):
        value[3, 4] = float("nan")
        return value

    replace_tensor(checkpoint, "model.layers.1.mlp.up_proj.weight", put_nan)
    with pytest.warns(UserWarning, match="model.layers.1.mlp.up_proj.weight holds NaN"):
        ConvLLaVA.from_pretrained(checkpoint)


# ---- Names and shapes that do not fit ----

@pytest.fixture
def saved_llama(tmp_path):
    """A saved Llama, and its tensors by their published names."""
    llama = small_llama()
    llama.save_pretrained(tmp_path / "llm")
    return llama, load_file(tmp_path / "llm" / "model.safetensors")


def load_llama(tmp_path, tensors):
    save_file(tensors, tmp_path / "llm" / "model.safetensors")
    return Llama.from_pretrained(tmp_path / "llm")


def test_rotary_frequencies_of_older_files_are_not_used(saved_llama, tmp_path):
    llama, tensors = saved_llama
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    assert_same_weights(load_llama(tmp_path, tensors), llama)


def test_an_unexpected_tensor_is_named(saved_llama, tmp_path):
    _, tensors = saved_llama
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(4)
    problem = r"llm does not fit.*1 unexpected: model.layers.0.self_attn.q_proj.bias"
    with pytest.raises(ValueError, match=problem):
        load_llama(tmp_path, tensors)


def test_missing_tensors_are_named(saved_llama, tmp_path):
    _, tensors = saved_llama
    del tensors["lm_head.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    problem = r"2 missing: lm_head.weight, model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=problem):
        load_llama(tmp_path, tensors)


def test_a_tensor_of_another_shape_is_named_beside_a_missing_one(saved_llama, tmp_path):
    _, tensors = saved_llama
    del tensors["lm_head.weight"]
    tensors["model.norm.weight"] = torch.ones(5)
    problem = (r"1 missing: lm_head.weight; "
               r"1 of another shape: model.norm.weight is \[5\] and not \[32\]")
    with pytest.raises(ValueError, match=problem):
        load_llama(tmp_path, tensors)


# ---- Shards that are written ----

@pytest.fixture
def sharded(model, tmp_path, monkeypatch):
    """The folder of a model that was saved in shards of at most 40,000 bytes."""
    monkeypatch.setattr(weights, "SHARD_BYTES", 40_000)
    model.save_pretrained(tmp_path / "sharded")
    return tmp_path / "sharded"


def shards_in(folder):
    """{file name: {tensor name: tensor}}"""
    return {file.name: load_file(file) for file in folder.glob("model-*-of-*.safetensors")}


def read_index(folder):
    return json.loads((folder / "model.safetensors.index.json").read_text())


def num_bytes(tensors):
    return sum(value.nbytes for value in tensors)


def test_a_model_saved_in_shards_is_loaded_again(model, sharded):
    assert len(shards_in(sharded)) > 2
    assert_same_weights(ConvLLaVA.from_pretrained(sharded), model)


def test_the_index_says_which_shard_holds_a_tensor(sharded):
    weight_map = {}
    for file, tensors in shards_in(sharded).items():
        assert not weight_map.keys() & tensors.keys()
        weight_map |= dict.fromkeys(tensors, file)
    assert read_index(sharded)["weight_map"] == weight_map


def test_the_index_says_the_size_of_all_shards(sharded):
    total = sum(num_bytes(tensors.values()) for tensors in shards_in(sharded).values())
    assert read_index(sharded)["metadata"]["total_size"] == total


def test_a_shard_is_no_larger_than_the_limit_unless_it_holds_a_single_tensor(sharded):
    for tensors in shards_in(sharded).values():
        assert num_bytes(tensors.values()) <= 40_000 or len(tensors) == 1


@pytest.mark.parametrize("missing_bytes, num_files", [(0, 1), (1, 2)])
def test_a_model_of_the_limits_size_is_a_single_file(
        model, sharded, tmp_path, monkeypatch, missing_bytes, num_files):
    total = read_index(sharded)["metadata"]["total_size"]
    monkeypatch.setattr(weights, "SHARD_BYTES", total - missing_bytes)
    model.save_pretrained(tmp_path / "saved")
    assert len(list((tmp_path / "saved").glob("*.safetensors"))) == num_files
    assert_same_weights(ConvLLaVA.from_pretrained(tmp_path / "saved"), model)


# ---- Settings in config.json ----

LLAMA_3_ROPE = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}


@pytest.mark.parametrize("field, value, named", [
    ("mm_projector_type", "linear", "mm_projector_type"),
    ("image_aspect_ratio", "anyres", "image_aspect_ratio"),
    ("mm_use_im_start_end", True, "mm_use_im_start_end"),
    ("mm_use_im_patch_token", True, "mm_use_im_patch_token"),
    ("mm_vision_resolution", "1536", "mm_vision_resolution"),
    ("mm_vision_tower", 5, "mm_vision_tower"),
    ("tokenizer_model_max_length", 2048.5, "tokenizer_model_max_length"),
    ("hidden_act", "gelu", "hidden_act"),
    ("hidden_size", "32", "hidden_size"),
    ("intermediate_size", 2 ** 62, "intermediate_size is 46"),
    ("attention_bias", True, "attention_bias"),
    ("mlp_bias", True, "mlp_bias"),
    ("head_dim", 16, "head_dim"),
    ("num_key_value_heads", 3, "num_key_value_heads"),
    ("rms_norm_eps", None, "rms_norm_eps"),
    ("rope_scaling", {"type": "linear", "factor": 2.0}, "rope_scaling"),
    ("rope_parameters", LLAMA_3_ROPE, "rope_parameters"),
    ("rope_parameters", {"rope_theta": 500.0}, "rope_theta is 10000.0, and in rope_parameters 500.0"),
])
def test_a_setting_of_another_model_is_refused(checkpoint, field, value, named):
    change_config(checkpoint, **{field: value})
    with pytest.raises(ValueError, match=f"config.json: .*{named}"):
        ConvLLaVA.from_pretrained(checkpoint)


def test_settings_that_change_nothing_are_read(model, checkpoint):
    change_config(
        checkpoint, mm_use_im_start_end=False, mm_use_im_patch_token=False, rope_scaling={"rope_type": "default"},
        attention_bias=False, mlp_bias=False, head_dim=None, mm_vision_select_layer=-2,
        pretraining_tp=1)
    assert_same_weights(ConvLLaVA.from_pretrained(checkpoint), model)


def test_missing_settings_are_the_published_models(checkpoint):
    remove_from_config(checkpoint, "mm_vision_resolution", "tokenizer_model_max_length",
                       "rope_theta", "tie_word_embeddings")
    model = ConvLLaVA.from_pretrained(checkpoint)
    assert (model.resolution, model.max_length) == (1536, 2048)
    assert model.llama.config.rope_theta == 10_000
    assert not model.llama.config.tie_word_embeddings


def test_theta_is_read_where_newer_files_have_it(checkpoint):
    remove_from_config(checkpoint, "rope_theta")
    change_config(checkpoint, rope_parameters=dict(rope_type="default", rope_theta=500.0))
    assert ConvLLaVA.from_pretrained(checkpoint).llama.config.rope_theta == 500


def test_without_key_value_heads_there_are_as_many_as_heads(checkpoint):
    """Files from before grouped-query attention lack the number."""
    remove_from_config(checkpoint, "num_key_value_heads")
    assert LlamaConfig.from_json(checkpoint / "config.json").num_key_value_heads == 4


def test_key_value_heads_of_null_are_as_many_as_heads(checkpoint):
    change_config(checkpoint, num_key_value_heads=None)
    assert LlamaConfig.from_json(checkpoint / "config.json").num_key_value_heads == 4


# ---- Saves, and what they leave when they are interrupted ----

def contents(folder):
    """{path: bytes of a file, or None for a folder}"""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def full_disk(monkeypatch):
    """Writing the tokenizer, the last file of a save, fails."""
    def save(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Tokenizer, "save", save)


def test_an_interrupted_save_leaves_the_older_checkpoint(model, checkpoint, full_disk):
    before = contents(checkpoint.parent)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(checkpoint)
    assert contents(checkpoint.parent) == before


def test_a_save_stopped_between_its_two_renames_says_what_to_do(checkpoint):
    """The first moves the older checkpoint away, the second moves the new one to its place."""
    older = checkpoint.with_name("checkpoint.replaced-0123abcd")
    checkpoint.rename(older)
    with pytest.raises(ValueError, match="a save was interrupted, rename .*checkpoint.replaced-0123abcd to it"):
        ConvLLaVA.from_pretrained(checkpoint)


def test_a_killed_saves_folders_are_told_from_others(tmp_path):
    left = [tmp_path / "a.saving-0123abcd", tmp_path / "a.replaced-ffffffff"]
    for folder in (*left, tmp_path / "a.saving", tmp_path / "a.saving-mine", tmp_path / "b.saving-0123abcd"):
        folder.mkdir()
    assert sorted(weights.interrupted_saves(tmp_path / "a")) == sorted(left)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_checkpoint_behind_a_link_is_replaced_there(model, checkpoint, dtype):
    link = checkpoint.with_name("link")
    link.symlink_to(checkpoint)
    model.save_pretrained(link, dtype)
    assert link.is_symlink()
    assert ConvLLaVA.from_pretrained(checkpoint).projector[0].weight.dtype == dtype
    assert sorted(checkpoint.parent.iterdir()) == [checkpoint, link]


@pytest.mark.parametrize("name", [
    "thesis.txt", ".git/HEAD", "vision_tower/notes.txt", "step-0000003/config.json", "training.pt",
    "config.json"])  # of another program
def test_a_folder_with_anything_that_no_save_writes_is_refused(model, checkpoint, name):
    (checkpoint / name).parent.mkdir(exist_ok=True)
    (checkpoint / name).write_text("mine")
    before = contents(checkpoint.parent)
    with pytest.raises(ValueError, match=f"holds {name.split('/')[0]}.*, which no save has written"):
        model.save_pretrained(checkpoint)
    assert contents(checkpoint.parent) == before


def test_a_file_in_the_vision_towers_place_is_refused(model, tmp_path):
    (tmp_path / "vision_tower").write_text("mine")
    with pytest.raises(ValueError, match="holds vision_tower, which no save has written"):
        model.save_pretrained(tmp_path)


def test_a_file_in_the_folders_place_is_refused(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="notes.txt is a file"):
        model.save_pretrained(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["checkpoint.saving", "checkpoint.replaced"])
def test_a_save_leaves_folders_beside_it_alone(model, checkpoint, name):
    (checkpoint.with_name(name)).mkdir()
    (checkpoint.with_name(name) / "thesis.txt").write_text("mine")
    model.save_pretrained(checkpoint)
    assert (checkpoint.with_name(name) / "thesis.txt").read_text() == "mine"


def test_a_save_in_shards_is_replaced_by_one_in_a_file(model, checkpoint, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(weights, "SHARD_BYTES", 40_000)
        model.save_pretrained(checkpoint)
    model.save_pretrained(checkpoint)
    assert not list(checkpoint.glob("model-*"))


# ---- Damaged and hostile files: one sentence that names the file ----

def refusal(checkpoint):
    """The sentence with which loading is refused."""
    with pytest.raises(ValueError) as caught:
        ConvLLaVA.from_pretrained(checkpoint)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


class RunsACommand:
    """What a pickle of this makes Python do when it is loaded without care."""

    def __reduce__(self):
        return os.system, ("touch was-run",)


def write_hostile_bin(checkpoint, zipped):
    (checkpoint / "model.safetensors").unlink()
    content = {"model.norm.weight": RunsACommand()}
    file = checkpoint / "pytorch_model.bin"
    if zipped:
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content))


@pytest.mark.parametrize("zipped", [True, False], ids=["zipped", "bare pickle"])
def test_code_in_a_bin_file_is_not_run(checkpoint, tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    write_hostile_bin(checkpoint, zipped)
    sentence = "pytorch_model.bin holds other things than tensors: nothing of it was run"
    assert sentence in refusal(checkpoint)
    assert not (tmp_path / "was-run").exists()


def test_sample_refuses_damaged_weights_with_status_2(checkpoint, ended):
    write_hostile_bin(checkpoint, zipped=False)
    image = ROOT / "data" / "nano" / "examples" / "receipt.png"
    done = ended(sample.main, image, "What?", "--checkpoint", checkpoint)
    refused(done, "nothing of it was run")


@pytest.mark.parametrize("form, shard", [
    ("safetensors shards", "model-00002-of-00003.safetensors"),
    ("bin shards", "pytorch_model-00002-of-00003.bin"),
])
def test_a_shard_that_ends_early(checkpoint, form, shard):
    rewrite(checkpoint, form)
    content = (checkpoint / shard).read_bytes()
    (checkpoint / shard).write_bytes(content[:-1000])
    assert f"{shard} cannot be read" in refusal(checkpoint)


def test_a_shard_that_is_missing(checkpoint):
    rewrite(checkpoint, "safetensors shards")
    (checkpoint / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(checkpoint)


def test_an_index_that_names_a_file_outside_of_its_folder(checkpoint):
    rewrite(checkpoint, "safetensors shards")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00002-of-00003", "../model-00002-of-00003"))
    assert "names '../model-00002" in refusal(checkpoint)


@pytest.mark.parametrize("weight_map", [
    ["model-00001-of-00003.safetensors"],  # a list in place of an object
    {"model.norm.weight": 1},  # a number in place of a file name
])
def test_an_index_without_file_names(checkpoint, weight_map):
    rewrite(checkpoint, "safetensors shards")
    index = checkpoint / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert "model.safetensors.index.json has no 'weight_map'" in refusal(checkpoint)


@pytest.mark.parametrize("form, file", [
    ("safetensors", "model.safetensors"),
    ("bin", "pytorch_model.bin"),
])
def test_an_empty_file(checkpoint, form, file):
    rewrite(checkpoint, form)
    (checkpoint / file).write_bytes(b"")
    assert f"{file} cannot be read" in refusal(checkpoint)


@pytest.mark.parametrize("form, file", [("safetensors", "model.safetensors"), ("bin", "pytorch_model.bin")])
@pytest.mark.parametrize("content, problem", [
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "is a git-LFS pointer"),
    (b"<!doctype html><html>", "is a web page"),
], ids=["pointer", "page"])
def test_what_was_downloaded_in_place_of_the_file(checkpoint, form, file, content, problem):
    rewrite(checkpoint, form)
    (checkpoint / file).write_bytes(content)
    assert f"{file} {problem} and not the file" in refusal(checkpoint)


def test_a_bin_file_of_another_thing_than_tensors_by_name(tmp_path):
    torch.save([torch.ones(1)], tmp_path / "list.bin")
    with pytest.raises(ValueError, match="list.bin cannot be read as weights, .*: it holds no tensors by name"):
        ConvNeXt.from_pretrained(tmp_path / "list.bin")


def test_a_training_checkpoint_in_place_of_weights(tmp_path):
    torch.save({"epoch": 3, "state_dict": {"a": torch.ones(1)}}, tmp_path / "epoch_3.pt")
    with pytest.raises(ValueError, match="epoch_3.pt holds epoch, state_dict beside tensors, as a training checkpoint"):
        ConvNeXt.from_pretrained(tmp_path / "epoch_3.pt")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.model"])
def test_a_pipe_is_refused_and_not_waited_for(checkpoint, name):
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    refusal(checkpoint)


def test_a_full_memory_is_not_called_a_damaged_file(checkpoint, monkeypatch):
    def full(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ...")
    monkeypatch.setattr(weights, "safe_open", full)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        ConvLLaVA.from_pretrained(checkpoint)


def test_a_tied_head_that_differs_from_the_embedding(tmp_path):
    llama = small_llama()
    llama.save_pretrained(tmp_path)
    change_config(tmp_path, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="tie_word_embeddings is true, and its lm_head differs"):
        Llama.from_pretrained(tmp_path)


def test_a_header_that_promises_more_data_than_there_is(checkpoint):
    tensor = {"dtype": "F32", "shape": [10 ** 9], "data_offsets": [0, 4 * 10 ** 9]}
    header = json.dumps({"model.norm.weight": tensor}).encode()
    content = struct.pack("<Q", len(header)) + header + bytes(64)
    (checkpoint / "model.safetensors").write_bytes(content)
    assert "model.safetensors cannot be read" in refusal(checkpoint)


def test_a_header_that_is_longer_than_the_file(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(struct.pack("<Q", 10 ** 12) + b"{}")
    assert "model.safetensors cannot be read" in refusal(checkpoint)


def test_a_quantised_model(checkpoint):
    tensors = {name: value.to(torch.int8) for name, value in take_tensors(checkpoint).items()}
    save_file(tensors, checkpoint / "model.safetensors")
    assert "torch.int8" in refusal(checkpoint)


def replace_tensor_in_bin(folder, name, change):
    """The same in a .bin file, which can hold tensors of any kind."""
    tensors = take_tensors(folder)
    tensors[name] = change(tensors.get(name))
    torch.save(tensors, folder / "pytorch_model.bin")


@pytest.mark.parametrize("change, problem", [
    (torch.Tensor.to_sparse, "only dense"),
    (partial(torch.Tensor.to, device="meta"), "only dense"),
    (partial(torch.Tensor.to, dtype=torch.float8_e4m3fn), "float8_e4m3fn"),
], ids=["sparse", "without data", "of 8 bits"])
def test_a_tensor_of_a_kind_that_is_not_read(checkpoint, change, problem):
    replace_tensor_in_bin(checkpoint, "model.norm.weight", change)
    sentence = refusal(checkpoint)
    assert "model.norm.weight" in sentence and problem in sentence


def test_a_tensor_whose_name_is_a_number(checkpoint):
    replace_tensor_in_bin(checkpoint, 5, lambda _: torch.ones(1))
    assert "1 unexpected: 5" in refusal(checkpoint)


def test_a_layer_scale_of_no_dimension(checkpoint):
    scale = "encoder.stages.1.layers.0.layer_scale_parameter"
    replace_tensor_in_bin(checkpoint / "vision_tower", scale, lambda value: value[0])
    assert "layer_scale_parameter is [] and not [1]" in refusal(checkpoint)


@pytest.mark.parametrize("text, problem", [
    ("{not JSON", "is not a readable JSON file"),
    ('["hidden_size"]', "should hold a JSON object"),
    ("{}", "should hold a JSON object that is not empty"),
])
def test_a_config_that_is_no_json_object(checkpoint, text, problem):
    (checkpoint / "config.json").write_text(text)
    assert f"config.json {problem}" in refusal(checkpoint)


def test_a_config_that_lacks_a_size(checkpoint):
    remove_from_config(checkpoint, "intermediate_size")
    assert "config.json lacks 'intermediate_size'" in refusal(checkpoint)


def test_a_tokenizer_of_another_size(checkpoint):
    change_config(checkpoint, vocab_size=700)
    assert "tokenizer.model has 768 pieces, and config.json says 700" in refusal(checkpoint)

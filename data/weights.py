"""Published weights on disk: safetensors or .bin, one file or shards with an index, in and out.

    stored = find_tensors("vicuna-7b-v1.5")     # {published name: Stored}; nothing is read yet
    assign(llama, stored, names, "vicuna-7b-v1.5", device="cpu", dtype=torch.bfloat16)
"""
import json
import math
import os
import shutil
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

DTYPES = torch.float32, torch.float16, torch.bfloat16
SHARD_BYTES = 5_000_000_000  # of one file
REPLACED = ".replaced"  # the end of an older folder's name for the moment that a save takes its place


@dataclass(frozen=True)
class Stored:
    """A tensor in a file, read when it is asked for."""
    file: Path
    name: str
    shape: tuple

    def load(self, device="cpu", dtype=None):
        """Reads the tensor; on the meta device only its shape.

        The file is opened anew each time, so that no more of it than this stays in memory.
        """
        if torch.device(device).type == "meta":
            return torch.empty(self.shape, dtype=dtype, device=device)
        try:
            if self.file.suffix == ".safetensors":
                with safe_open(self.file, framework="pt") as file:
                    tensor = file.get_tensor(self.name)
            else:
                tensor = read_bin(self.file)[self.name]
        except Exception as error:
            raise unreadable(self.file, error) from None
        if tensor.dtype not in DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{self.file}: {self.name} is {tensor.dtype} ({tensor.layout}, {tensor.device}): "
                             "only dense float32, float16 and bfloat16 are read")
        tensor = tensor.to(device, dtype)
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):
            warnings.warn(f"{self.file}: {self.name} holds NaN or infinite values: the file is damaged", stacklevel=2)
        return tensor


def read_bin(file):
    """The tensors of a .bin file, mapped where its format allows; code in a pickle is refused, not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on odd pickles
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def unreadable(file, error):
    if not file.is_file():
        return ValueError(f"{file} is missing")
    if "weights only load failed" in str(error).lower():
        return ValueError(f"{file} holds other things than tensors: nothing of it was run; use a .safetensors file")
    return ValueError(f"{file} cannot be read as weights, download it again: "
                      + (str(error) or "it ends early").splitlines()[0])


def find_tensors(path):
    """The tensors of a weight file, or of a folder's one file or shards: {published name: Stored}."""
    path = Path(path)
    files = [path] if not path.is_dir() else weight_files(path)
    found = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
            else:
                shapes = {str(name): tensor.shape for name, tensor in read_bin(file).items()}
        except Exception as error:  # safetensors and torch raise many kinds on broken files
            raise unreadable(file, error) from None
        found |= {name: Stored(file, name, tuple(shape)) for name, shape in shapes.items()}
    return found


def weight_files(folder):
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            index = folder / f"{name}.index.json"
            shards = read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{index} has no 'weight_map' of tensor names to file names")
            for shard in sorted(set(shards.values())):
                if Path(shard).name != shard or Path(shard).suffix not in (".safetensors", ".bin"):
                    raise ValueError(f"{index} names {shard!r}, which is no weight file in its folder")
            return [folder / shard for shard in sorted(set(shards.values()))]
    raise ValueError(f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin or an index of shards")


def assign(module, stored, names, source, device="cpu", dtype=None):
    """Gives a module built on the meta device its weights; names: {our name: published name}.

    All get one type: without a `dtype`, the first one's. Raises ValueError where any is missing, unexpected or of
    another shape.
    """
    shapes = {names[ours]: tuple(value.shape) for ours, value in module.state_dict().items()}
    wrong = [f"{name} is {list(stored[name].shape)} and not {list(shape)}" for name, shape in shapes.items()
             if name in stored and stored[name].shape != shape]
    problems = {"missing": sorted(shapes.keys() - stored.keys()), "unexpected": sorted(stored.keys() - shapes.keys()),
                "of another shape": wrong}
    if any(problems.values()):
        said = "; ".join(f"{len(keys)} {what}: {', '.join(keys[:3])}" for what, keys in problems.items() if keys)
        raise ValueError(f"{source} does not fit the {type(module).__name__} that was expected: {said}")
    dtype = dtype or stored[next(iter(shapes))].load(device).dtype
    loaded = {name: stored[name].load(device, dtype) for name in shapes}
    module.load_state_dict({ours: loaded[names[ours]] for ours in module.state_dict()}, assign=True)


def write_tensors(folder, tensors, dtype=None):
    """Writes {published name: tensor} as model.safetensors, or as shards of at most 5 GB and their index."""
    size = {name: value.numel() * (dtype or value.dtype).itemsize for name, value in tensors.items()}
    shards = [[]]
    for name in tensors:
        if shards[-1] and sum(size[other] for other in shards[-1]) + size[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, names in zip(files, shards):
        converted = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        try:
            save_file(converted, folder / file, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / file} cannot be written: {error}") from None
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(size.values())},
            "weight_map": {name: file for file, names in zip(files, shards) for name in names}})


def check_replaceable(folder):
    """Raises ValueError where `folder` is or holds other things than a save."""
    other = folder.exists() if not folder.is_dir() else any(folder.iterdir())
    if other and not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds other things than a save, which would be lost: name another folder")


@contextmanager
def replacing(folder):
    """A new folder to write into, which takes `folder`'s place at the end: a crash before that leaves it as it was.

    Raises ValueError as check_replaceable does.
    """
    folder = Path(folder).resolve()  # behind a link
    check_replaceable(folder)
    new, old = folder.with_name(folder.name + ".saving"), folder.with_name(folder.name + REPLACED)
    if old.is_dir() and not folder.exists():  # stopped between the two renames below
        os.rename(old, folder)
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for file in [new, *new.rglob("*")]:  # on the disk before the name is: a power cut leaves a whole folder or none
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def read_json(path, kind=dict):
    """What a JSON file holds: an object (dict) or an array (list) that is not empty."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(found, kind) or not found:
        raise ValueError(f"{path} should hold a JSON {'object' if kind is dict else 'array'} that is not empty")
    return found


def require(path, found, **supported):
    """Refuses a config.json, as read from path, where it gives a key another value than the one that is supported."""
    for key, value in supported.items():
        if found.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {found[key]!r}, and only {value!r} is supported")


def write_json(path, fields):
    path.write_text(json.dumps(fields, indent=2) + "\n")

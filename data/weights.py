"""Published weights on disk: safetensors or .bin, one file or shards with an index, in and out.

    stored = find_tensors("vicuna-7b-v1.5")     # {published name: Stored}; nothing is read yet
    load_into(llama, stored, names, "vicuna-7b-v1.5", device="cpu", dtype=torch.bfloat16)
"""
import json
import math
import os
import re
import shutil
import uuid
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from data.errors import is_out_of_memory

STORED_DTYPES = torch.float32, torch.float16, torch.bfloat16
SHARD_BYTES = 5_000_000_000  # of one file
SAVED = re.compile("|".join((  # the files that a save writes, relative to its folder
    r"(vision_tower/)?(config|preprocessor_config|generation_config|tokenizer_config)\.json",
    r"(vision_tower/)?model(-\d{5}-of-\d{5})?\.safetensors",
    r"(vision_tower/)?model\.safetensors\.index\.json",
    r"tokenizer\.model")))


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
            if is_out_of_memory(error):
                raise
            raise reading_error(self.file, error) from None
        if tensor.dtype not in STORED_DTYPES or tensor.layout != torch.strided or tensor.is_meta:
            raise ValueError(f"{self.file}: {self.name} is {tensor.dtype} ({tensor.layout}, {tensor.device}): "
                             "only dense float32, float16 and bfloat16 are read")
        if not all(math.isfinite(bound) for bound in tensor.aminmax()):
            warnings.warn(f"{self.file}: {self.name} holds NaN or infinite values: the file is damaged", stacklevel=2)
        return tensor.to(device, dtype)


def read_bin(file):
    """The tensors of a .bin file, mapped where its format allows; code in a pickle is refused, not run."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's remarks on odd pickles
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def not_downloaded(file):
    """A ValueError where a file is what was downloaded in its place, else None."""
    with open(file, "rb") as opened:
        start = opened.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"version https://git-lfs"):
        return ValueError(f"{file} is a git-LFS pointer and not the file: fetch it with `git lfs pull`")
    if start.startswith(b"<"):
        return ValueError(f"{file} is a web page and not the file: download the file itself")
    return None


def reading_error(file, error):
    """What is wrong with a weight file that could not be read, as a ValueError."""
    if not file.is_file():
        return ValueError(f"{file} is " + ("no file but a folder, a pipe or a device" if file.exists() else "missing"))
    if not_downloaded(file):
        return not_downloaded(file)
    if "weights only load failed" in str(error).lower():
        return ValueError(f"{file} holds other things than tensors: nothing of it was run; use a .safetensors file")
    return ValueError(f"{file} cannot be read as weights, download it again: "
                      + (str(error) or "it ends early").splitlines()[0])


def find_tensors(path):
    """The tensors of a weight file, or of a folder's one file or shards: {published name: Stored}."""
    path = Path(path)
    files = weight_files(path) if path.is_dir() else [path]
    tensors = {}
    for file in files:
        try:
            if not file.is_file():  # reading a pipe or a device might never end
                raise FileNotFoundError
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}
            else:
                content = read_bin(file)
                if not isinstance(content, dict):
                    raise ValueError("it holds no tensors by name")
                shapes = {str(name): value.shape for name, value in content.items() if isinstance(value, torch.Tensor)}
        except Exception as error:  # safetensors and torch raise many kinds on broken files
            if is_out_of_memory(error):
                raise
            raise reading_error(file, error) from None
        if file.suffix != ".safetensors" and len(shapes) < len(content):
            others = [str(name) for name in content if str(name) not in shapes]
            raise ValueError(f"{file} holds {', '.join(others[:3])} beside tensors, as a training checkpoint does: "
                             "save the weights alone, {name: tensor}, and name that file")
        for name, shape in shapes.items():
            tensors[name] = Stored(file, name, tuple(shape))
    return tensors


def weight_files(folder):
    """The weight files of a folder: one, or the shards that its index names."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / shard for shard in shards_of(index)]
    raise ValueError(f"{folder} holds no weights: expected model.safetensors, pytorch_model.bin or an index of shards")


def shards_of(index):
    """The names of the files that an index names. Raises ValueError where one is no weight file beside the index."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index} has no 'weight_map' of tensor names to file names")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).name != shard or Path(shard).suffix not in (".safetensors", ".bin"):
            raise ValueError(f"{index} names {shard!r}, which is no weight file in its folder")
    return shards


def load_into(module, stored, names, source, device="cpu", dtype=None):
    """Gives a module built on the meta device its weights. All get one type: without a `dtype`, the first one's.

    The other arguments are check_fit's, which is asked first.
    """
    check_fit(module, stored, names, source)
    parameters = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    dtype = dtype or stored[names[parameters[0]]].load(device).dtype
    published = dict.fromkeys(names[name] for name in parameters)  # each once, as tied weights share theirs
    loaded = {name: stored[name].load(device, dtype) for name in published}
    module.load_state_dict({name: loaded[names[name]] for name in parameters}, assign=True)


def check_fit(module, stored, names, source):
    """Raises ValueError where any of a module's weights is missing, unexpected or of another shape.

    stored: {published name: Stored}; names: {our name: published name}; source: for errors.
    """
    parameters = module.named_parameters(remove_duplicate=False)
    shapes = {names[name]: tuple(value.shape) for name, value in parameters}
    missing = sorted(shapes.keys() - stored.keys())
    unexpected = sorted(stored.keys() - shapes.keys())
    misshapen = [f"{name} is {list(stored[name].shape)} and not {list(shape)}" for name, shape in shapes.items()
                 if name in stored and stored[name].shape != shape]
    problems = []
    for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen)):
        if keys:
            problems.append(f"{len(keys)} {what}: {', '.join(keys[:3])}")
    if problems:
        raise ValueError(f"{source} does not fit the {type(module).__name__} that was expected: {'; '.join(problems)}")


def write_tensors(folder, tensors, dtype=None):
    """Writes {published name: tensor} as model.safetensors, or as shards of at most 5 GB and their index."""
    # in order, each shard is filled until the next tensor would not fit
    size = {name: value.numel() * (dtype or value.dtype).itemsize for name, value in tensors.items()}
    shards = [[]]
    for name in tensors:
        if shards[-1] and sum(size[other] for other in shards[-1]) + size[name] > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]

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


def check_replaceable(folder, extra=()):
    """Raises ValueError where a save to `folder` would remove anything that no save has written.

    extra: names of files that a save of this kind writes too.
    """
    folder = Path(folder).resolve()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name another folder")
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        is_config = path.name == "config.json" and path.is_file()
        is_saved = path.is_file() and (SAVED.fullmatch(name) or name in extra)
        if is_config and not extra and b'"model_type"' not in path.read_bytes():  # of another program
            is_saved = False
        if not (is_saved or (name == "vision_tower" and path.is_dir())):
            raise ValueError(f"{folder} holds {name}, which no save has written and which would be lost: move it, or "
                             "name another folder")


@contextmanager
def replacing(folder, extra=()):
    """Yields a new folder that takes `folder`'s place when the block ends. A crash leaves the old one,
    at worst under its `.replaced-` name.

    Raises ValueError as check_replaceable does.
    """
    folder = Path(folder).resolve()  # behind a link
    check_replaceable(folder, extra)
    number = uuid.uuid4().hex[:8]  # so that nothing else has these names
    new, old = (folder.with_name(f"{folder.name}.{role}-{number}") for role in ("saving", "replaced"))
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    for file in [new, *new.rglob("*")]:  # everything is on the disk before the rename, in case of a power cut
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def interrupted_saves(folder):
    """What killed saves to `folder` left beside it: new folders that are not complete, and older ones."""
    name = re.compile(re.escape(folder.name) + r"\.(saving|replaced)-[0-9a-f]{8}")
    return [path for path in folder.parent.glob("*") if name.fullmatch(path.name)]


def read_json(path, kind=dict):
    """What a JSON file holds: an object (dict) or an array (list) that is not empty."""
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise OSError("it is a folder, a pipe or a device")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise not_downloaded(path) or ValueError(f"{path} is not a readable JSON file: {error}") from None
    except OSError as error:
        raise ValueError(f"{path} is not a readable JSON file: {error}") from None
    if not isinstance(content, kind) or not content:
        raise ValueError(f"{path} should hold a JSON {'object' if kind is dict else 'array'} that is not empty")
    return content


def require(path, config, **supported):
    """Raises ValueError where a config.json, as read from path, gives a key another value than the supported one."""
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise ValueError(f"{path}: {key} is {config[key]!r}, and only {value!r} is supported")


def write_json(path, fields):
    path.write_text(json.dumps(fields, indent=2) + "\n")

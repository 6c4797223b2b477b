"""Makes a diffusers folder of a finetune that is published as one file per expert, with Wan-Video's own names.

The experts come from the files, everything else from a base folder of the same architecture. Names and shapes are
checked from headers before a byte is written; then the tensors are copied as they are stored, a shard at a time.
"""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from stepquant.errors import InvalidInput, MissingFile, UnsupportedCheckpoint, UserError
from stepquant.models.configs import read_config
from stepquant.models.families import find_denoiser, find_family
from stepquant.models.native_names import diffusers_key
from stepquant.models.weights import PICKLE_SUFFIXES, TensorInfo, open_weights, read_header
from stepquant.storage.atomic import finished_folder_or_absent, sync, sync_tree

STEM = "diffusion_pytorch_model"
SHARD_BYTES = 4_000_000_000  # in memory at a time
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e5m2)
_PREFIX = re.compile(r"(model\.diffusion_model\.|diffusion_model\.)?")
# Keys that say what a file is instead.
_OTHER_FILES = {
    r"scale_weight|scaled_fp8|scale_input": "scaled fp8, whose weights need their scales; use the bf16 or fp16 file",
    r"weight_scale|weight_s_rel|comfy_quant|\.qweight$": "a quantized file; use the bf16 or fp16 file",
    r"lora_|\.diff(_b)?$": "a LoRA; name it in model.loras, docs/finetunes.md says how",
}


@dataclass(frozen=True)
class SourceFile:
    """A file that is checked and fits an expert.

    Attributes:
        file: the safetensors file.
        keys: name of each tensor in the file by its name in diffusers, sorted.
        infos: dtype and shape by the name in the file.
    """

    file: Path
    keys: dict[str, str]
    infos: Mapping[str, TensorInfo]

    def read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Some tensors by their names in diffusers, as stored."""
        with safe_open(self.file, framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(self.keys[name]) for name in names}

    def shards(self, limit: int) -> Iterator[list[str]]:
        """The names in groups of at most `limit` bytes; a larger tensor is alone."""
        shard: list[str] = []
        size = 0
        for name, key in self.keys.items():
            if shard and size + self.infos[key].nbytes > limit:
                yield shard
                shard, size = [], 0
            shard.append(name)
            size += self.infos[key].nbytes
        yield shard


def import_files(base: Path, files: Mapping[str, Path], out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a diffusers folder with the experts of some files and the other components of a base.

    Args:
        base: diffusers folder of the model that was finetuned. Its experts need no weights, only a config.json.
        files: file of each expert by the expert's name.
        out: the folder to write; it must not exist.
        shard_bytes: most bytes of a weight file, which are in memory at a time.

    Raises:
        UserError: `out` exists, the base or a file is missing or broken, or a file does not fit its expert. The message
            names the first key.
    """
    if out.exists():
        raise InvalidInput(f"{out}: exists; remove it first, or name another folder")
    index = read_config(base / "model_index.json")
    subfolders = {found.name: found.subfolder for found in find_family(index.get("_class_name")).experts(index)}
    _check_experts(base, files, list(subfolders))
    sources = {name: _check_file(file, base / subfolders[name]) for name, file in files.items()}
    _check_exchanged(base, subfolders, sources)
    components = [name for name, value in index.items() if isinstance(value, list) and value and value[0]]
    others = [name for name in components if name not in subfolders.values()]
    for name in others:
        if not (base / name).is_dir():
            raise MissingFile(f"{base / name}: no such folder, but {base / 'model_index.json'} names this component")
        if (base / name / "config.json").is_file():  # only models have one
            open_weights(base / name)
    with finished_folder_or_absent(out) as work:
        shutil.copyfile(base / "model_index.json", work / "model_index.json")
        for name in others:
            # Copied, not linked: the folder stays what it is when the base is changed or removed.
            shutil.copytree(base / name, work / name, copy_function=shutil.copyfile, ignore=_pickles)
        for name, source in sources.items():
            folder = work / subfolders[name]
            folder.mkdir()
            shutil.copyfile(base / subfolders[name] / "config.json", folder / "config.json")
            _write_shards(source, folder, shard_bytes)
        sync_tree(work)
    sync(out.parent)


def _check_experts(base: Path, files: Mapping[str, Path], experts: list[str]) -> None:
    if sorted(files) != sorted(experts):
        wanted = " and ".join(f"--{name.replace('_', '-')} FILE" for name in experts)
        raise InvalidInput(f"{base}: this model has {' and '.join(experts)}; expected {wanted}, and nothing else")
    if len({file.resolve() for file in files.values()}) < len(files):
        raise InvalidInput(f"{next(iter(files.values()))}: given for both experts; expected a file for each")


def _check_file(file: Path, folder: Path) -> SourceFile:
    """Check a file against an expert of the base, by its header. Raises UserError with the first key that is wrong."""
    config = read_config(folder / "config.json")
    if "quantization_config" in config:
        raise InvalidInput(f"{folder}: is quantized; expected the unquantized model as base")
    header = _read_header(file)
    expected = _expected_shapes(config)
    keys: dict[str, str] = {}
    for pattern, what in _OTHER_FILES.items():
        if telling := next(filter(re.compile(pattern).search, sorted(header)), None):
            raise UnsupportedCheckpoint(f"{file}: {telling}: this is {what}")
    for key in sorted(header):
        plain = key[_PREFIX.match(key).end() :]  # type: ignore[union-attr]  # matches nothing, too
        name = plain if plain in expected else diffusers_key(plain)
        if name not in expected:
            _refuse(file, key, f"is no tensor of the model in {folder}; the file is of another model, or holds more")
        if name in keys:
            _refuse(file, key, f"is the same tensor as {keys[name]}")
        if header[key].shape != expected[name]:
            found, needed = list(header[key].shape), list(expected[name])
            _refuse(file, key, f"has shape {found}; the model in {folder} has {needed}: the file is of another model")
        if header[key].dtype not in DTYPES:
            _refuse(file, key, f"has dtype {header[key].dtype}; allowed: {', '.join(map(str, DTYPES))}")
        keys[name] = key
    if missing := sorted(set(expected) - set(keys)):
        raise InvalidInput(
            f"{file}: lacks {missing[0]} (diffusers' name); the model in {folder} has it: incomplete, or another model"
        )
    return SourceFile(file, dict(sorted(keys.items())), header)


def _read_header(file: Path) -> dict[str, TensorInfo]:
    if not file.is_file():
        raise MissingFile(f"{file}: no such file")
    with file.open("rb") as opened:
        magic = opened.read(4)
    if magic == b"GGUF":
        raise UnsupportedCheckpoint(f"{file}: a GGUF file, which is quantized already; use the bf16 or fp16 file")
    if file.suffix in PICKLE_SUFFIXES or magic[:2] in (b"PK", b"\x80\x02"):
        raise UnsupportedCheckpoint(f"{file}: a pickled file, which can run code; use the safetensors file")
    return read_header(file)


def _expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a denoiser, from its class and config, without its weights."""
    with torch.device("meta"):
        model = find_denoiser(config.get("_class_name")).load().from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_exchanged(base: Path, subfolders: Mapping[str, str], sources: Mapping[str, SourceFile]) -> None:
    """Refuse files that were exchanged: a finetune is nearer to its own expert of the base than to the other one.

    A base without weights cannot tell. One tensor is compared: the query projection of the middle block.
    """
    if len(sources) < 2 or not all(any((base / folder).glob("*.safetensors")) for folder in subfolders.values()):
        return
    blocks = len({name.split(".")[1] for name in next(iter(sources.values())).keys if name.startswith("blocks.")})
    name = f"blocks.{blocks // 2}.attn1.to_q.weight"
    originals = {expert: open_weights(base / folder).get(name).float() for expert, folder in subfolders.items()}
    for expert, source in sources.items():
        tensor = source.read([name])[name].float()
        distances = {other: float((tensor - original).norm()) for other, original in originals.items()}
        nearest = min(distances, key=lambda other: distances[other])
        if distances[nearest] < distances[expert]:
            raise InvalidInput(
                f"{source.file}: given as {expert}, but its {name} is nearer to that of {nearest} in {base}; "
                "exchange the two files"
            )


def _write_shards(source: SourceFile, folder: Path, limit: int) -> None:
    """Write an expert's tensors under diffusers' names, and the index."""
    shards = list(source.shards(limit))
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{STEM}-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(source.read(names), folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(names, file)
    total = sum(source.infos[key].nbytes for key in source.keys.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _pickles(_: str, names: list[str]) -> set[str]:
    return {name for name in names if Path(name).suffix in PICKLE_SUFFIXES}


def _refuse(file: Path, key: str, why: str) -> NoReturn:
    raise UserError(f"{file}: {key} {why}")

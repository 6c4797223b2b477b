"""The LoRAs of a source model: recorded in its manifest, and added to the weights that every stage reads.

They are fused as the weights are read, so nothing is written: trajectories, replay, packing and evaluation see one
model. What the LoRAs contain is part of an expert's digest.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from stepquant.errors import InvalidInput, MissingFile, UserError
from stepquant.models.loras.config import config_file
from stepquant.models.loras.file import read_lora
from stepquant.models.loras.fused_weights import FusedWeights, Update
from stepquant.models.manifest import ExpertManifest, LoraManifest, ModelManifest
from stepquant.models.weights import Weights, open_weights
from stepquant.params import Lora
from stepquant.storage.digests import file_digest


def check_files(loras: Sequence[Lora]) -> None:
    """Refuse LoRAs that are not there. Raises MissingFile."""
    for number, lora in enumerate(loras):
        if not Path(lora.file).is_file():
            raise MissingFile(f"model.loras.{number}.file: no such file {lora.file}; put the LoRA there")


def check_loras(manifest: ModelManifest, folder: Path, loras: Sequence[Lora]) -> None:
    """Check LoRAs against the model, by the headers of the files.

    Args:
        manifest: of the source model.
        folder: the local folder of the model.
        loras: `model.loras` of the params.

    Raises:
        UserError: an expert that the model does not have, or as `read_lora`.
    """
    check_files(loras)
    for number, lora in enumerate(loras):
        if lora.expert not in manifest.experts:
            raise InvalidInput(
                f"model.loras.{number}.expert: found {lora.expert!r}; this model has {', '.join(manifest.experts)}"
            )
        read_lora(Path(lora.file), lora.weight, open_weights(folder / manifest.expert(lora.expert).subfolder))


def record_loras(manifest: ModelManifest, folder: Path, loras: Sequence[Lora]) -> ModelManifest:
    """Check the LoRAs of the params, and record them with their digests, for which every file is read once.

    Arguments and errors are those of `check_loras`.

    Returns:
        The manifest with each expert's LoRAs, in the order of the params.
    """
    check_loras(manifest, folder, loras)
    experts = dict(manifest.experts)
    for lora in loras:
        file, described = Path(lora.file), experts[lora.expert]
        config = config_file(file)
        record = LoraManifest(
            file=lora.file,
            weight=lora.weight,
            digest=file_digest(file),
            config_digest=None if config is None else file_digest(config),
        )
        experts[lora.expert] = described.model_copy(update={"loras": (*described.loras, record)})
    return manifest.model_copy(update={"experts": experts})


def open_expert_weights(folder: Path, described: ExpertManifest) -> Weights:
    """Open the weights of an expert, with its LoRAs.

    Args:
        folder: the local folder of the model.
        described: the expert.

    Raises:
        UserError: weights or a LoRA are missing, broken, or changed since stage model recorded them.
    """
    weights = open_weights(folder / described.subfolder)
    updates: dict[str, list[Update]] = {}
    for lora in described.loras:
        file = Path(lora.file)
        _check_unchanged(file, lora.digest)
        found = config_file(file)
        if (found is None) != (lora.config_digest is None):
            raise _changed(file)
        if found is not None and lora.config_digest is not None:
            _check_unchanged(found, lora.config_digest)
        for key, update in read_lora(file, lora.weight, weights).items():
            updates.setdefault(key, []).append(update)
    return FusedWeights(weights, updates) if updates else weights


def fuse_into_pipeline(pipe: Any, folder: Path, experts: Sequence[ExpertManifest]) -> None:
    """Give a loaded pipeline the fused weights of its experts, with the values that `open_expert_weights` reads.

    Args:
        pipe: the pipeline, whose experts are on the CPU, in any dtype.
        folder: the local folder that it was loaded from.
        experts: its experts.
    """
    for described in experts:
        weights = open_expert_weights(folder, described)
        parameters = dict(getattr(pipe, described.subfolder).named_parameters())
        for key in weights.changed:
            parameters[key].data = weights.get(key).to(parameters[key].dtype)


def _check_unchanged(file: Path, digest: str) -> None:
    if not file.is_file():
        raise InvalidInput(
            f"{file}: no such file; stage model recorded it as a LoRA; put it back or run stage model again"
        )
    stat = file.stat()
    if _digest_of_state(file, stat.st_size, stat.st_mtime_ns) != digest:
        raise _changed(file)


def _changed(file: Path) -> UserError:
    return InvalidInput(f"{file}: changed since stage model recorded it; run `dvc repro`, or stage model again")


@cache
def _digest_of_state(file: Path, size: int, modified: int) -> str:
    """The digest of a file, computed once per process and state of the file, which a worker opens for every block."""
    return file_digest(file)

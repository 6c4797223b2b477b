"""The source model: its folder, a description of its components, and the BF16 pipeline."""

import json
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from stepquant.errors import DamagedFile, InvalidInput, MissingFile
from stepquant.models.loras import fuse_into_pipeline
from stepquant.models.manifest import Compression, DenoiserInputs, ExpertManifest, ModelManifest, SiteManifest
from stepquant.models.sites import WAN_SITES
from stepquant.models.weights import open_weights
from stepquant.storage.digests import file_digests

# Subfolder of each expert. Above the boundary timestep the pipeline calls `transformer`, below it `transformer_2`.
EXPERT_FOLDERS = {"high_noise": "transformer", "low_noise": "transformer_2"}
DENSE_EXPERT = {"denoiser": "transformer"}
# The keys of an expert's config.json that determine the size of its inputs.
INPUT_KEYS = ("in_channels", "out_channels", "patch_size", "text_dim")
# The Wan VAE's pixels per latent, and frames per latent frame after the first; config.json of the VAE overrides them.
COMPRESSION = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}


def resolve_source(source: str, revision: str | None) -> Path:
    """The local folder of a source model. A hub id is downloaded; this is the only network access of stepquant.

    Args:
        source: a diffusers folder, or a hub id such as owner/name.
        revision: of the hub model; None for its main branch.

    Raises:
        MissingFile: if there is neither a folder with a model_index.json nor such a model on the hub.
    """
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return folder
    if folder.exists() or source.count("/") != 1:
        raise MissingFile(
            f"model.source: {source} has no model_index.json; "
            "expected a diffusers folder, or a hub id such as owner/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(source, revision=revision, ignore_patterns=["*.bin", "*.pt", "*.pth", "*.ckpt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise MissingFile(
            f"model.source: no folder {source}, and the hub gave no such model: {' '.join(str(error).split())}"
        ) from None


def describe_source(folder: Path, source: str, revision: str | None) -> ModelManifest:
    """The manifest of a source model: `describe_experts`, and the SHA-256 of every file of its components.

    Loads no weights. Arguments and errors are those of `describe_experts`.
    """
    described = describe_experts(folder, source, revision)
    files = {name: digest for name, digest in file_digests(folder).items() if "/" in name or name == "model_index.json"}
    return described.model_copy(update={"files": files})


def describe_experts(folder: Path, source: str, revision: str | None) -> ModelManifest:
    """The manifest of a source model without file digests, from its configs and the headers of its weight files.

    Args:
        folder: the local folder of the model, from `resolve_source`.
        source: `model.source` of the params, which is recorded.
        revision: `model.revision` of the params, which is recorded.

    Returns:
        Experts with t ranges, blocks, sites and shapes. Paths are relative to the folder.

    Raises:
        MissingFile: if a component or its weights are missing.
        DamagedFile: if a config or weight file is truncated or broken.
        UnsupportedCheckpoint: if a component has pickled weights only.
    """
    index = _read_json(folder / "model_index.json", "_class_name")
    _check_components(folder)
    steps = _read_json(folder / "scheduler" / "scheduler_config.json", "num_train_timesteps")["num_train_timesteps"]
    boundary = index.get("boundary_ratio")
    folders = DENSE_EXPERT if boundary is None else EXPERT_FOLDERS
    edges = [0, steps] if boundary is None else [0, boundary * steps, steps]
    ranges = list(zip(edges, edges[1:]))[::-1]
    return ModelManifest(
        source=source,
        revision=revision,
        pipeline=index["_class_name"],
        num_train_timesteps=steps,
        compression=_compression(folder / "vae" / "config.json"),
        experts={
            name: _describe_expert(folder / subfolder, subfolder, low, high)
            for (name, subfolder), (low, high) in zip(folders.items(), ranges)
        },
    )


def _compression(file: Path) -> Compression:
    """The compression factors of the VAE; those of the Wan VAE if the config has none."""
    config = _read_json(file) if file.is_file() else {}
    return Compression.model_validate({key: config.get(key, factor) for key, factor in COMPRESSION.items()})


def _check_components(folder: Path) -> None:
    """Refuse a pipeline with a missing or broken component, because the errors of diffusers are cryptic."""
    for name, value in _read_json(folder / "model_index.json", "_class_name").items():
        if not isinstance(value, list) or not value[0]:
            continue
        if not (folder / name).is_dir():
            raise MissingFile(
                f"{folder / name}: no such folder, but {folder / 'model_index.json'} names this component"
            )
        # Only models have a config.json. Schedulers, tokenizers and image processors have configs with other names.
        if (folder / name / "config.json").is_file():
            open_weights(folder / name)


def _read_json(file: Path, *keys: str) -> dict[str, Any]:
    """Read a JSON file of the source that must have the given keys."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MissingFile(f"{file}: no such file; expected that of a diffusers pipeline") from None
    except ValueError as error:
        raise DamagedFile(f"{file}: not JSON ({error})") from None
    for key in keys:
        if not isinstance(content, dict) or key not in content:
            raise InvalidInput(f"{file}: no '{key}' in it; expected that of a diffusers pipeline")
    return content


def _describe_expert(folder: Path, subfolder: str, low: float, high: float) -> ExpertManifest:
    weights = open_weights(folder)
    config = _read_json(folder / "config.json", "num_layers", *INPUT_KEYS)
    sites = {
        site.name: SiteManifest(
            depends_on_timestep=site.depends_on_timestep,
            linears={path: _matrix(weights.shape(f"blocks.0.{path}.weight")) for path in site.linears},
        )
        for site in WAN_SITES
    }
    return ExpertManifest(
        subfolder=subfolder,
        t_range=(low, high),
        blocks=config["num_layers"],
        sites=sites,
        inputs=DenoiserInputs.model_validate({key: config[key] for key in INPUT_KEYS}),
        bf16_bytes=sum(2 * prod(weights.shape(key)) for key in weights),
    )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def load_source_pipeline(folder: Path, experts: Sequence[ExpertManifest], device: str, dtype: torch.dtype) -> Any:
    """Load the unquantized pipeline, with its LoRAs.

    Args:
        folder: the local folder of the model.
        experts: its experts, which say what LoRAs they have.
        device: where it computes; components are offloaded as in `place_pipeline`.
        dtype: of the components.

    Raises:
        UserError: as `describe_experts` and `open_expert_weights`, because files may have changed since the model was
            described.
    """
    _check_components(folder)
    from diffusers import WanImageToVideoPipeline

    pipe = WanImageToVideoPipeline.from_pretrained(folder, dtype=dtype, local_files_only=True)
    fuse_into_pipeline(pipe, folder, experts)
    return place_pipeline(pipe, device)


def place_pipeline(pipe: Any, device: str) -> Any:
    """Hide the pipeline's progress bar and put it on the device. Returns the pipeline.

    On a GPU, model offload keeps one component at a time on the device, because two 14B experts, a text encoder and a
    VAE need more memory than most GPUs have.
    """
    pipe.set_progress_bar_config(disable=True)
    if torch.device(device).type == "cpu":
        return pipe.to(device)
    pipe.enable_model_cpu_offload(device=device)
    return pipe

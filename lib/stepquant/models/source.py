"""The source model: its folder, a description of its components, and the BF16 pipeline."""

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch

from stepquant.errors import InvalidInput, MissingFile
from stepquant.models.checks import check_source
from stepquant.models.configs import located, read_config
from stepquant.models.families import find_denoiser, find_family
from stepquant.models.families.description import ExpertRange
from stepquant.models.hub import commit_of, is_hub_id, snapshot
from stepquant.models.loras import fuse_into_pipeline, open_expert_weights, record_loras
from stepquant.models.manifest import Compression, DenoiserInputs, ExpertManifest, ModelManifest, SiteManifest
from stepquant.models.offload import load_mapped, place_pipeline
from stepquant.models.weights import open_weights
from stepquant.params import Compute, Lora
from stepquant.storage.digests import file_digest, file_digests
from stepquant.torch_setup import torch_dtype

# The keys of an expert's config.json that determine the size of its inputs.
INPUT_KEYS = ("in_channels", "out_channels", "patch_size", "text_dim")
# The Wan VAE's pixels per latent, and frames per latent frame after the first; config.json of the VAE overrides them.
COMPRESSION = {"scale_factor_spatial": 8, "scale_factor_temporal": 4}


def resolve_source(source: str, revision: str | None) -> Path:
    """The local folder of a source model. A hub id is downloaded unless its commit is here already (models/hub.py).

    Args:
        source: a diffusers folder, or a hub id such as owner/name.
        revision: of the hub model; None for its main branch.

    Raises:
        MissingFile: if there is neither a folder with a model_index.json nor such a model on the hub.
    """
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return folder
    if not is_hub_id(source):
        raise MissingFile(
            f"model.source: {source} has no model_index.json; "
            "expected a diffusers folder, or a hub id such as owner/name"
        )
    return snapshot(source, revision)


def describe_source(folder: Path, source: str, revision: str | None, loras: Sequence[Lora] = ()) -> ModelManifest:
    """The manifest of a source model: `describe_experts`, its LoRAs, and the SHA-256 of every file of its components.

    For a hub model it records the commit. Loads no weights. Arguments and errors are those of `describe_experts` and
    `record_loras`.
    """
    described = record_loras(describe_experts(folder, source, commit_of(folder, revision)), folder, loras)
    index = read_config(folder / "model_index.json")
    files = {"model_index.json": file_digest(folder / "model_index.json")}
    for name in sorted(name for name, value in index.items() if isinstance(value, list) and any(value)):
        files |= {f"{name}/{path}": digest for path, digest in file_digests(folder / name).items()}
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
        InvalidInput: if the pipeline or a denoiser is of another class, or configured as the class cannot run it.
    """
    index = read_config(folder / "model_index.json", "_class_name")
    with located(folder):
        family = find_family(index["_class_name"])
        ranges = family.experts(index)
    _check_components(folder)
    steps = read_config(folder / "scheduler" / "scheduler_config.json", "num_train_timesteps")["num_train_timesteps"]
    configs = [_denoiser_config(folder / found.subfolder) for found in ranges]
    with located(folder):
        family.check(index, configs)
    return ModelManifest(
        source=source,
        revision=revision,
        pipeline=index["_class_name"],
        num_train_timesteps=steps,
        compression=_compression(folder / "vae" / "config.json"),
        images=family.images(index, configs[0]),
        experts={found.name: _describe_expert(folder, found, config, steps) for found, config in zip(ranges, configs)},
    )


def _denoiser_config(folder: Path) -> dict[str, Any]:
    """An expert's config.json. Raises InvalidInput if it is not that of a denoiser class that is known."""
    config = read_config(folder / "config.json", *INPUT_KEYS)
    with located(folder):
        count_key = find_denoiser(config.get("_class_name")).stack.count_key
    if count_key not in config:
        raise InvalidInput(f"{folder / 'config.json'}: no '{count_key}' in it; expected that of a diffusers pipeline")
    return config


def _compression(file: Path) -> Compression:
    """The compression factors of the VAE; those of the Wan VAE if the config has none."""
    config = read_config(file) if file.is_file() else {}
    return Compression.model_validate({key: config.get(key, factor) for key, factor in COMPRESSION.items()})


def _check_components(folder: Path) -> None:
    """Refuse a pipeline with a missing or broken component, because the errors of diffusers are cryptic."""
    for name, value in read_config(folder / "model_index.json", "_class_name").items():
        if not isinstance(value, list) or not any(value):
            continue
        if not (folder / name).is_dir():
            raise MissingFile(
                f"{folder / name}: no such folder, but {folder / 'model_index.json'} names this component"
            )
        # Only models have a config.json. Schedulers, tokenizers and image processors have configs with other names.
        if (folder / name / "config.json").is_file():
            open_weights(folder / name)


def _describe_expert(folder: Path, found: ExpertRange, config: dict[str, Any], steps: int) -> ExpertManifest:
    weights = open_weights(folder / found.subfolder)
    denoiser = find_denoiser(config["_class_name"])
    prefix = f"{denoiser.stack.attribute}.0"
    sites = {
        site.name: SiteManifest(
            depends_on_timestep=site.depends_on_timestep,
            text_alone=site.text_alone,
            linears={path: _matrix(weights.shape(f"{prefix}.{path}.weight")) for path in site.linears},
        )
        for site in denoiser.sites(config)
    }
    return ExpertManifest(
        subfolder=found.subfolder,
        t_range=(found.low * steps, found.high * steps),
        blocks=config[denoiser.stack.count_key],
        sites=sites,
        inputs=DenoiserInputs.model_validate({key: config[key] for key in INPUT_KEYS}),
        bf16_bytes=sum(2 * prod(weights.shape(key)) for key in weights),
    )


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    rows, columns = shape
    return rows, columns


def load_source_pipeline(folder: Path, experts: Sequence[ExpertManifest], compute: Compute, scratch: Path) -> Any:
    """Load the unquantized pipeline with its LoRAs, and put it where `compute.offload` says.

    Args:
        folder: the local folder of the model.
        experts: its experts.
        compute: device, dtype and offload. The VAE is float32 in any case: 16 bits are visible in a video.
        scratch: an empty folder, as in `load_mapped`. It may be deleted afterwards.

    Raises:
        UserError: as `check_source` and `open_expert_weights`, because files may have changed since the model was
            described.
    """
    check_source(folder)
    family = find_family(read_config(folder / "model_index.json", "_class_name")["_class_name"])
    dtype, mapped = torch_dtype(compute.dtype), {}
    if compute.offload == "disk":
        for described in experts:
            place, copy = folder / described.subfolder, scratch / described.subfolder
            copy.mkdir()
            weights = open_expert_weights(folder, described)
            mapped[described.subfolder] = load_mapped(family.denoiser, place, weights, dtype, copy)
    dtypes = {"default": dtype, "vae": torch.float32}
    pipe = family.load().from_pretrained(folder, dtype=dtypes, local_files_only=True, **mapped)
    if not mapped:
        fuse_into_pipeline(pipe, folder, experts)
    return place_pipeline(pipe, compute.device, compute.offload)

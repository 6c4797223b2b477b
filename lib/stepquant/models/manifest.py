"""The model manifest: the parts of a source pipeline, as stored in `artifacts/model/manifest.json`."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stepquant.errors import UserError
from stepquant.models.families.description import PromptImages
from stepquant.models.sites import Site
from stepquant.storage.atomic import write_text
from stepquant.storage.digests import content_key
from stepquant.storage.json_files import read_json


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteManifest(_Part):
    """One site of a block.

    Attributes:
        depends_on_timestep: False for a site whose input is the same at every step.
        text_alone: whether its input holds the text tokens and nothing else.
        linears: weight shape (N, K) by module path inside the block, in the order in which rows are stacked.
    """

    depends_on_timestep: bool
    text_alone: bool
    linears: dict[str, tuple[int, int]]

    @property
    def rows(self) -> int:
        """Number of rows N of the stacked weight."""
        return sum(rows for rows, _ in self.linears.values())

    @property
    def columns(self) -> int:
        """Number of channels K of the site's input."""
        return next(iter(self.linears.values()))[1]


class DenoiserInputs(_Part):
    """Keys of a denoiser's config.json that determine the size of its inputs."""

    in_channels: int
    out_channels: int
    patch_size: tuple[int, int, int]
    text_dim: int


class LoraManifest(_Part):
    """A LoRA that is fused into an expert.

    Attributes:
        file: safetensors file, as in the params.
        weight: factor of what it adds.
        digest: SHA-256 (hex) of the file.
        config_digest: the same of PEFT's adapter_config.json beside it; None without one.
    """

    file: str
    weight: float
    digest: str
    config_digest: str | None


class ExpertManifest(_Part):
    """One denoiser.

    Attributes:
        subfolder: its folder in the pipeline.
        t_range: (lowest, highest) timestep.
        blocks: number of transformer blocks.
        sites: sites of a block by name, in the order in which every stage goes through them.
        inputs: sizes of its inputs.
        bf16_bytes: size of all its weights in BF16.
        loras: what is added to its weights, in this order.
    """

    subfolder: str
    t_range: tuple[float, float]
    blocks: int
    sites: dict[str, SiteManifest]
    inputs: DenoiserInputs
    bf16_bytes: int
    loras: tuple[LoraManifest, ...] = ()

    @property
    def ordered_sites(self) -> tuple[Site, ...]:
        """The sites of a block, in order."""
        return tuple(
            Site(name, tuple(found.linears), found.depends_on_timestep, found.text_alone)
            for name, found in self.sites.items()
        )


class Compression(_Part):
    """Downsampling factors of the VAE: pixels per latent, and frames per latent frame after the first."""

    scale_factor_spatial: int
    scale_factor_temporal: int


class ModelManifest(_Part):
    """A source pipeline.

    Attributes:
        source: local folder or hub id.
        revision: hub revision; None for a local folder.
        pipeline: name of the diffusers class.
        num_train_timesteps: largest timestep.
        compression: downsampling of the VAE.
        images: the images of a prompt.
        experts: denoisers by name, in the order in which a sampler reaches them.
        files: SHA-256 (hex) of every file of the components by path; empty where nothing was hashed.
    """

    source: str
    revision: str | None
    pipeline: str
    num_train_timesteps: int
    compression: Compression
    images: PromptImages
    experts: dict[str, ExpertManifest]
    files: dict[str, str] = {}

    def expert(self, name: str) -> ExpertManifest:
        """The expert of this name. Raises UserError if the model has none."""
        if name not in self.experts:
            raise UserError(f"--expert {name}: this model has {', '.join(self.experts)}")
        return self.experts[name]

    def expert_digest(self, name: str) -> str:
        """SHA-256 (hex) of one expert: of its files' digests and its LoRAs. Raises UserError if there is none."""
        described = self.expert(name)
        prefix = described.subfolder + "/"
        files = {path: digest for path, digest in self.files.items() if path.startswith(prefix)}
        return content_key(files=files, loras=_contents(described.loras))

    def digest(self) -> str:
        """SHA-256 (hex) of the whole model: of all files' digests and all LoRAs."""
        return content_key(files=self.files, loras={name: _contents(e.loras) for name, e in self.experts.items()})


def _contents(loras: tuple[LoraManifest, ...]) -> list[Any]:
    """What decides the values of LoRAs: not where they lie."""
    return [[lora.digest, lora.config_digest, lora.weight] for lora in loras]


def write_manifest(path: Path, manifest: ModelManifest) -> None:
    """Write the manifest. Keys stay in their order, which for experts, sites and linears has a meaning."""
    write_text(path, json.dumps(manifest.model_dump(mode="json"), indent=2) + "\n")


def read_manifest(path: Path) -> ModelManifest:
    """Read the manifest that stage model wrote. Raises UserError if it is missing or invalid."""
    values: Any = read_json(path)
    try:
        return ModelManifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}: {field}: {first['msg']}; not a manifest of this version, run stage model again"
        ) from None

"""The model manifest: what a source pipeline consists of, as `artifacts/model/manifest.json` records it."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from stepquant.errors import UserError
from stepquant.storage.digests import content_key
from stepquant.storage.json_files import read_json


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteManifest(_Part):
    """One site of a block.

    linears: weight shape (N, K) by module path inside the block, in any order
    (`Site.linears` has the order in which rows are stacked).
    """

    depends_on_timestep: bool
    linears: dict[str, tuple[int, int]]

    @property
    def rows(self) -> int:
        """N of the stacked weight."""
        return sum(rows for rows, _ in self.linears.values())

    @property
    def columns(self) -> int:
        """K, the channels of the site's input."""
        return next(iter(self.linears.values()))[1]


class DenoiserInputs(_Part):
    """What decides the size of a denoiser's inputs: keys of its config.json."""

    in_channels: int
    out_channels: int
    patch_size: tuple[int, int, int]
    text_dim: int


class ExpertManifest(_Part):
    """One denoiser. subfolder: of the pipeline. t_range: (lowest, highest) t. bf16_bytes: all its weights in BF16."""

    subfolder: str
    t_range: tuple[float, float]
    blocks: int
    sites: dict[str, SiteManifest]
    inputs: DenoiserInputs
    bf16_bytes: int


class Compression(_Part):
    """By what the VAE shrinks a video: pixels per latent, and frames per latent frame after the first."""

    scale_factor_spatial: int
    scale_factor_temporal: int


class ModelManifest(_Part):
    """A source pipeline. files: SHA-256 of every file of its components by path; empty where nothing was hashed."""

    source: str
    revision: str | None
    pipeline: str
    num_train_timesteps: int
    compression: Compression
    experts: dict[str, ExpertManifest]
    files: dict[str, str] = {}

    def expert(self, name: str) -> ExpertManifest:
        """Raises UserError unless the model has this expert."""
        if name not in self.experts:
            raise UserError(f"--expert {name}: this model has {', '.join(self.experts)}")
        return self.experts[name]

    def expert_digest(self, name: str) -> str:
        """Digest of one expert's files."""
        prefix = self.expert(name).subfolder + "/"
        return content_key(files={path: digest for path, digest in self.files.items() if path.startswith(prefix)})


def read_manifest(path: Path) -> ModelManifest:
    """The manifest that stage model wrote. Raises UserError if it is missing or is no such manifest."""
    values: Any = read_json(path)
    try:
        return ModelManifest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{path}: {field}: {first['msg']}; not a manifest of this version, run stage model again"
        ) from None

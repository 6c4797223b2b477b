"""What a plan needs to know of a source model, from the configs and headers of its folder."""

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from stepquant.models.families import find_denoiser
from stepquant.models.manifest import ModelManifest
from stepquant.models.source import describe_experts
from stepquant.models.weights import open_weights

FLOAT32 = ("vae",)  # components that are loaded in float32 whatever `compute.dtype` is
IMAGE_TOKENS = 257  # of the CLIP ViT-H/14 that every published model with image cross-attention has


@dataclass(frozen=True)
class SourceModel:
    """A source pipeline.

    Attributes:
        manifest: Its experts and shapes.
        stored: Bytes on disk of each component's folder, experts included; empty if they are not known.
        values: Number of weights of each component that is no expert.
        float32: Number of an expert's weights that stay float32 when it is loaded, by expert.
        scheduler: Its scheduler_config.json.
        image_tokens: Image tokens that cross-attention reads; 0 for none.
        image_dim: Channels of an image token.
        token_timesteps: Whether t is given per token.
        download: Whether it has to be downloaded.
    """

    manifest: ModelManifest
    stored: dict[str, int]
    values: dict[str, int]
    float32: dict[str, int]
    scheduler: dict[str, Any]
    image_tokens: int
    image_dim: int
    token_timesteps: bool
    download: bool

    @property
    def stored_bytes(self) -> int:
        """Bytes on disk."""
        return sum(self.stored.values())

    @property
    def other_stored_bytes(self) -> int:
        """Bytes on disk of all but the experts, which every checkpoint has a copy of."""
        experts = {described.subfolder for described in self.manifest.experts.values()}
        return sum(size for name, size in self.stored.items() if name not in experts)

    def loaded(self, component: str, itemsize: int) -> int:
        """Bytes of a component in memory, if a value of the others has so many bytes."""
        return self.values.get(component, 0) * (4 if component in FLOAT32 else itemsize)

    def others_loaded(self, itemsize: int) -> int:
        """The same of all components but the experts."""
        return sum(self.loaded(name, itemsize) for name in self.values)

    def stored_itemsize(self, expert: str) -> float:
        """Bytes of one of an expert's weights on disk; 2 if they are not known."""
        described = self.manifest.experts[expert]
        return 2 * self.stored.get(described.subfolder, described.bf16_bytes) / described.bf16_bytes


def read_source(folder: Path, source: str, revision: str | None) -> SourceModel:
    """Describe a pipeline folder. Loads no weights.

    Args:
        folder: Of the pipeline.
        source: `model.source` of the params.
        revision: `model.revision` of the params.

    Raises:
        UserError: As `describe_experts`.
    """
    manifest = describe_experts(folder, source, revision)
    index = _read(folder / "model_index.json")
    experts = {name: described.subfolder for name, described in manifest.experts.items()}
    places = [path for path in folder.iterdir() if path.is_dir() and isinstance(index.get(path.name), list)]
    config = _read(folder / next(iter(experts.values())) / "config.json")
    return SourceModel(
        manifest=manifest,
        stored={path.name: _size(path) for path in places},
        values={path.name: _values(path) for path in places if path.name not in experts.values()},
        float32={name: _kept(folder / subfolder) for name, subfolder in experts.items()},
        scheduler=_read(folder / "scheduler" / "scheduler_config.json"),
        image_tokens=image_tokens(config),
        image_dim=config.get("image_dim") or 0,
        token_timesteps=bool(index.get("expand_timesteps")),
        download=False,
    )


def image_tokens(config: dict[str, Any]) -> int:
    """Image tokens of a denoiser's cross-attention, by its config: of one image, or of the two that have positions."""
    if config.get("image_dim") is None:
        return 0
    return config.get("pos_embed_seq_len") or IMAGE_TOKENS


def _read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _values(folder: Path) -> int:
    """Number of weights of a component; 0 for a scheduler or a tokenizer."""
    if not (folder / "config.json").is_file():
        return 0
    weights = open_weights(folder)
    return sum(prod(weights.shape(key)) for key in weights)


def _kept(folder: Path) -> int:
    """Number of an expert's weights that diffusers keeps in float32."""
    denoiser, weights = find_denoiser(_read(folder / "config.json").get("_class_name")), open_weights(folder)
    return sum(prod(weights.shape(key)) for key in weights if denoiser.keeps_float32(key))

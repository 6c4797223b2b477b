"""The shapes of a source model: known, recorded, or read from the headers of a local folder."""

from pathlib import Path

from stepquant.errors import UserError
from stepquant.models.families import find_family
from stepquant.models.families.description import PromptImages
from stepquant.models.manifest import (
    Compression,
    DenoiserInputs,
    ExpertManifest,
    ModelManifest,
    SiteManifest,
    read_manifest,
)
from stepquant.models.source import COMPRESSION, describe_experts


def find_model(source: str, revision: str | None, recorded: Path) -> tuple[ModelManifest, int]:
    """Describe a source model without loading or downloading anything.

    Args:
        source: A local diffusers folder, whose headers are read, or a hub id.
        revision: Revision of the hub id.
        recorded: The manifest that stage model wrote. It is used for a hub id whose shapes are not known here.

    Returns:
        Experts and shapes, and the bytes of the other components.

    Raises:
        UserError: The source is neither a folder, nor known, nor described by `recorded`.
    """
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        found = describe_experts(folder, source, revision)
    elif source in KNOWN:
        found = KNOWN[source]
    elif recorded.is_file() and read_manifest(recorded).source == source:
        found = read_manifest(recorded)
    else:
        raise UserError(
            f"model.source: {source} is neither a local folder nor known here; "
            "run `stepquant model`, which downloads and describes it"
        )
    return found, OTHER_BYTES.get(source, 0) or _other_bytes(folder, found)


def _other_bytes(folder: Path, manifest: ModelManifest) -> int:
    """Bytes of a local pipeline's components other than the experts."""
    experts = {described.subfolder for described in manifest.experts.values()}
    files = (
        path for path in folder.glob("*/**/*") if path.is_file() and path.relative_to(folder).parts[0] not in experts
    )
    return sum(path.stat().st_size for path in files)


def wan_expert(
    subfolder: str, t_range: tuple[float, float], *, blocks: int, width: int, ffn: int, text_dim: int, bf16_bytes: int
) -> ExpertManifest:
    """One expert of a WanTransformer3DModel as the model manifest describes it."""
    shapes = {"ffn.net.0.proj": (ffn, width), "ffn.net.2": (width, ffn)}
    sites = {
        site.name: SiteManifest(
            depends_on_timestep=site.depends_on_timestep,
            linears={path: shapes.get(path, (width, width)) for path in site.linears},
        )
        for site in find_family("WanImageToVideoPipeline").denoiser.sites({})
    }
    inputs = DenoiserInputs(in_channels=36, out_channels=16, patch_size=(1, 2, 2), text_dim=text_dim)
    return ExpertManifest(
        subfolder=subfolder, t_range=t_range, blocks=blocks, sites=sites, inputs=inputs, bf16_bytes=bf16_bytes
    )


# 14,288,901,184 parameters per expert, as in the files of the hub; text encoder 11.36 GB in BF16, VAE 0.51 GB in
# float32.
_A14B = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
_A14B_EXPERT = {"blocks": 40, "width": 5120, "ffn": 13824, "text_dim": 4096, "bf16_bytes": 2 * 14_288_901_184}
_A14B_RANGES = {"high_noise": (900.0, 1000.0), "low_noise": (0.0, 900.0)}
KNOWN = {
    _A14B: ModelManifest(
        source=_A14B,
        revision=None,
        pipeline="WanImageToVideoPipeline",
        num_train_timesteps=1000,
        compression=Compression.model_validate(COMPRESSION),
        images=PromptImages(("image",), ("last_image",)),
        experts={
            name: wan_expert(subfolder, _A14B_RANGES[name], **_A14B_EXPERT)
            for name, subfolder in (("high_noise", "transformer"), ("low_noise", "transformer_2"))
        },
    )
}
OTHER_BYTES = {_A14B: 11_870_000_000}

"""The source model of a plan: read from its folder, published, or recorded by stage model."""

from pathlib import Path

from stepquant.errors import UserError
from stepquant.models.hub import cached_snapshot
from stepquant.models.manifest import read_manifest
from stepquant.plan.published import PUBLISHED, describe_published
from stepquant.plan.source_model import SourceModel, read_source


def find_model(source: str, revision: str | None, recorded: Path) -> SourceModel:
    """Describe a source model without loading or downloading anything.

    Args:
        source: A local diffusers folder, whose headers are read, or a hub id.
        revision: Revision of the hub id.
        recorded: The manifest that stage model wrote, which has the commit of a hub id that was downloaded.

    Raises:
        UserError: The source is neither a folder, nor published, nor downloaded.
    """
    if (Path(source) / "model_index.json").is_file():
        return read_source(Path(source), source, revision)
    if source in PUBLISHED:
        return describe_published(source)
    if not recorded.is_file() or read_manifest(recorded).source != source:
        raise UserError(
            f"model.source: {source} is neither a local folder nor known here; "
            "run `stepquant model`, which downloads and describes it"
        )
    manifest = read_manifest(recorded)
    folder = cached_snapshot(source, manifest.revision)
    if folder is not None:
        return read_source(folder, source, manifest.revision)
    raise UserError(
        f"model.source: {source} is described in {recorded}, but its files are not here; run `stepquant model`"
    )

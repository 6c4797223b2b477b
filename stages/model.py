"""model: find the source pipeline and describe it, without loading weights."""

from pathlib import Path

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, open_stage
from stepquant.command_runner import command, main
from stepquant.models.manifest import write_manifest
from stepquant.models.source import describe_source, resolve_source

READS = ("model",)


@command
def model(params: ParamsFile = Path("params.yaml")) -> None:
    """Describe the source model: its experts, blocks, sites, shapes, LoRAs and the digest of every file.

    Reads the params section model. Writes artifacts/model/manifest.json.
    """
    with open_stage(__file__, READS, params) as stage:
        source = stage["model"]
        folder = resolve_source(source.source, source.revision)
        manifest = describe_source(folder, source.source, source.revision, source.loras)
        write_manifest(artifacts.MODEL, manifest)


if __name__ == "__main__":
    main(model)

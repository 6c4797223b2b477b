"""model: find the source pipeline and describe it, without loading weights."""

from pathlib import Path

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, open_stage
from stepquant.command_runner import command, main
from stepquant.models.loras import record_loras
from stepquant.models.source import describe_source, resolve_source
from stepquant.storage.atomic import write_text
from stepquant.storage.json_files import to_json

READS = ("model",)


@command
def model(params: ParamsFile = Path("params.yaml")) -> None:
    """Describe the source model: its experts, blocks, sites, shapes, LoRAs and the digest of every file.

    Reads the params section model. Writes artifacts/model/manifest.json.
    """
    with open_stage(__file__, READS, params) as stage:
        source = stage["model"]
        folder = resolve_source(source.source, source.revision)
        manifest = record_loras(describe_source(folder, source.source, source.revision), folder, source.loras)
        write_text(artifacts.MODEL, to_json(manifest.model_dump(mode="json")))


if __name__ == "__main__":
    main(model)

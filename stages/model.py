"""model: find the source pipeline and describe it. Loads no weights."""

from pathlib import Path

from stages import artifacts
from stages.common import ParamsFile, open_stage, to_json
from stepquant.commands import command, main
from stepquant.files import write_text
from stepquant.models.source import describe_source, resolve_source

READS = ("model",)


@command
def model(params: ParamsFile = Path("params.yaml")) -> None:
    """Describe the source model: its experts, blocks, sites, shapes and the digest of every file.

    Reads the params section model. Writes artifacts/model/manifest.json.
    """
    with open_stage(__file__, READS, params) as stage:
        source = stage["model"]
        folder = resolve_source(source.source, source.revision)
        write_text(artifacts.MODEL, to_json(describe_source(folder, source.source, source.revision)))


if __name__ == "__main__":
    main(model)

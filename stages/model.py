"""model: find the source pipeline and describe it, without loading weights."""

import sys
from pathlib import Path

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, open_stage
from stepquant import params as parameters
from stepquant.command_runner import command, main
from stepquant.models.checks import check_run, check_source
from stepquant.models.checks.reach import check_experts
from stepquant.models.loras import check_files, check_loras
from stepquant.models.manifest import write_manifest
from stepquant.models.source import describe_experts, describe_source, resolve_source
from stepquant.preflight import unwatched

READS = ("model",)


@command
def model(params: ParamsFile = Path("params.yaml")) -> None:
    """Describe the source model: its experts, blocks, sites, shapes, LoRAs and the digest of every file.

    Refuses a model that is not supported or not whole, and LoRAs, sampling, bins and experts that do not fit it. Reads
    the params section model. Writes artifacts/model/manifest.json.
    """
    with open_stage(__file__, READS, params) as stage:
        source = stage["model"]
        check_files(source.loras)  # before a download
        folder = resolve_source(source.source, source.revision)
        check_source(folder)
        described = describe_experts(folder, source.source, source.revision)
        check_experts(parameters.expert_names(params), "experts", list(described.experts))
        check_loras(described, folder, source.loras)
        sampling, bins = (parameters.glance(params, section) for section in ("sampling", "bins"))
        if sampling is not None:
            check_run(folder, described, sampling, bins and bins.by_expert)
        if warning := unwatched(folder, source.loras):
            print(f"warning: {warning}", file=sys.stderr)
        # Reading every byte of the model takes longest, and comes last.
        write_manifest(artifacts.MODEL, describe_source(folder, source.source, source.revision, source.loras))


if __name__ == "__main__":
    main(model)

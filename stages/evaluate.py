"""evaluate@V: fidelity to BF16, temporal metrics, memory, and the held-out error of every quantized layer."""

from functools import partial
from pathlib import Path

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, VariantName, described_model, open_stage
from stepquant.command_runner import command, main
from stepquant.evaluate.measure import format_pair, measure_memory, measure_videos
from stepquant.evaluate.metrics_file import Record, summarize_layers, summarize_videos, write_record
from stepquant.evaluate.packed_layers import layer_errors
from stepquant.evaluate.summary import Bootstrap
from stepquant.models.prompts import evaluation_prompts
from stepquant.recipe.variants import REFERENCE

READS = ("compute", "generate", "evaluate")


@command
def evaluate(variant: VariantName, params: ParamsFile = Path("params.yaml")) -> None:
    """Measure one variant: its videos against BF16's, its packed layers on held-out tokens, its bytes.

    Reads the params sections compute, generate and evaluate, artifacts/model, artifacts/activations,
    artifacts/checkpoints/VARIANT/, and artifacts/videos of VARIANT and bf16. Writes artifacts/metrics/VARIANT.json.
    """
    with open_stage(__file__, READS, params, variant=variant) as stage:
        manifest, settings = described_model(), stage["evaluate"]
        bootstrap = Bootstrap(settings.bootstrap_samples, settings.confidence, settings.seed)
        prompts, bf16 = evaluation_prompts(stage["generate"]), partial(artifacts.video, REFERENCE)
        reference = measure_videos(prompts, bf16, None)
        if variant == REFERENCE:
            own, pair, layers, packed = summarize_videos(reference, None, bootstrap), None, {}, None
        else:
            packed = artifacts.checkpoint(variant)
            measured = measure_videos(prompts, partial(artifacts.video, variant), bf16)
            own, pair = summarize_videos(measured, reference, bootstrap), format_pair(manifest, packed)
            layers = summarize_layers(layer_errors(manifest, stage["compute"], packed, artifacts.activations))
        memory = measure_memory(manifest, packed)
        write_record(
            artifacts.metrics(variant), Record(variant=variant, format=pair, videos=own, layers=layers, memory=memory)
        )


if __name__ == "__main__":
    main(evaluate)

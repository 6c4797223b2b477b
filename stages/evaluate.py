"""evaluate@V: fidelity to BF16, behaviour in time, memory, and the error of every quantized layer on held-out tokens.

Layer errors are those of the packed linears, read back from the checkpoint: ||Y_q - Y|| / ||Y|| of the output without
bias, on tokens of prompts that calibration did not use.
"""

from pathlib import Path
from typing import Any

import numpy as np

from stages import _artifacts as artifacts
from stages._stage import ParamsFile, VariantName, open_stage
from stepquant.checkpoint.linears import read_settings
from stepquant.command_runner import command, main
from stepquant.evaluate.metrics_file import (
    FormatPair,
    Record,
    VideoMetrics,
    measure_video,
    memory,
    summarize_layers,
    summarize_videos,
    write_record,
)
from stepquant.evaluate.packed_layers import layer_errors
from stepquant.evaluate.summary import Bootstrap
from stepquant.evaluate.video import read_video
from stepquant.models.manifest import ModelManifest, read_manifest
from stepquant.models.prompts import Prompt, evaluation_prompts
from stepquant.models.weights import open_weights
from stepquant.recipe.variants import REFERENCE

READS = ("compute", "generate", "evaluate")


@command
def evaluate(variant: VariantName, params: ParamsFile = Path("params.yaml")) -> None:
    """Measure one variant: its videos against BF16's, its packed layers on held-out tokens, its bytes.

    Reads the params sections compute, generate and evaluate, artifacts/model, artifacts/activations,
    artifacts/checkpoints/VARIANT/, and artifacts/videos of VARIANT and bf16. Writes artifacts/metrics/VARIANT.json.
    """
    with open_stage(__file__, READS, params, variant=variant) as stage:
        manifest = read_manifest(artifacts.MODEL)
        settings = stage["evaluate"]
        bootstrap = Bootstrap(settings.bootstrap_samples, settings.confidence, settings.seed)
        prompts = evaluation_prompts(stage["generate"])
        reference = measure_videos(prompts, REFERENCE, None)
        own = reference if variant == REFERENCE else measure_videos(prompts, variant, REFERENCE)
        errors = (
            []
            if variant == REFERENCE
            else list(layer_errors(manifest, stage["compute"], artifacts.checkpoint(variant), artifacts.activations))
        )
        record = Record(
            variant=variant,
            format=None if variant == REFERENCE else format_pair(manifest, variant),
            videos=summarize_videos(own, None if variant == REFERENCE else reference, bootstrap),
            layers=summarize_layers(errors),
            memory=measure_memory(manifest, variant),
        )
        write_record(artifacts.metrics(variant), record)


def measure_videos(prompts: list[Prompt], variant: str, reference: str | None) -> dict[str, VideoMetrics]:
    """The metrics of every video of a variant, by prompt id."""
    measured = {}
    for prompt in prompts:
        video = read_video(artifacts.video(variant, prompt.id))
        image = prompt.load_image().resize((video.shape[2], video.shape[1]))
        other = None if reference is None else read_video(artifacts.video(reference, prompt.id))
        measured[prompt.id] = measure_video(video, other, np.asarray(image))
    return measured


def format_pair(manifest: ModelManifest, variant: str) -> FormatPair:
    """The formats the checkpoint was packed in; experts that differ are both named."""
    found = [
        read_settings(artifacts.checkpoint(variant) / described.subfolder) for described in manifest.experts.values()
    ]
    weights = dict.fromkeys(s.weight_format for s in found)
    activations = dict.fromkeys(s.activation_format for s in found if s.activation_format)
    return FormatPair(weight="+".join(weights), activation="+".join(activations) or None)


def measure_memory(manifest: ModelManifest, variant: str) -> Any:
    """Bytes of all tensors of the experts, packed and in BF16."""
    experts = manifest.experts.values()
    source = sum(described.bf16_bytes for described in experts)
    if variant == REFERENCE:
        return memory(source, source)
    weights = [open_weights(artifacts.checkpoint(variant) / described.subfolder) for described in experts]
    return memory(sum(w.info(key).nbytes for w in weights for key in w), source)


if __name__ == "__main__":
    main(evaluate)

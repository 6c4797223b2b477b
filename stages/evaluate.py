"""evaluate@V: fidelity to BF16, behaviour in time, memory, and the error of every quantized layer on held-out tokens.

Layer errors are those of the packed linears, read back from the checkpoint: ||Y_q - Y|| / ||Y|| of the output without
bias, on tokens of prompts that calibration did not use.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stages import artifacts
from stages.common import ParamsFile, Stage, Variant, open_stage, read_json
from stages.expert import open_expert
from stepquant.calibration.activations import read_activations, site_folder
from stepquant.calibration.prompts import Prompt, evaluation_prompts
from stepquant.checkpoint.linears import read_linear, read_settings
from stepquant.commands import command, main
from stepquant.compute.progress import track
from stepquant.evaluate.layers import LayerError
from stepquant.evaluate.records import FormatPair, Record, VideoMetrics, measure_video, memory, summarize_layers, summarize_videos, write_record
from stepquant.evaluate.summary import Bootstrap
from stepquant.evaluate.video import read_video
from stepquant.models.sites import WAN_SITES, Site
from stepquant.models.weights import open_weights
from stepquant.quantize.layer import relative_error

READS = ("compute", "generate", "evaluate")
REFERENCE = "bf16"


@command
def evaluate(variant: Variant, params: ParamsFile = Path("params.yaml")) -> None:
    """Measure one variant: its videos against BF16's, its packed layers on held-out tokens, its bytes.

    Reads the params sections compute, generate and evaluate, artifacts/model, artifacts/activations,
    artifacts/checkpoints/VARIANT/, and artifacts/videos of VARIANT and bf16. Writes artifacts/metrics/VARIANT.json.
    """
    with open_stage(__file__, READS, params, variant=variant) as stage:
        manifest = read_json(artifacts.MODEL)
        settings = stage["evaluate"]
        bootstrap = Bootstrap(settings.bootstrap_samples, settings.confidence, settings.seed)
        prompts = evaluation_prompts(stage["generate"])
        reference = measure_videos(prompts, REFERENCE, None)
        own = reference if variant == REFERENCE else measure_videos(prompts, variant, REFERENCE)
        errors = [] if variant == REFERENCE else list(layer_errors(stage, manifest, variant))
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


def layer_errors(stage: Stage, manifest: dict[str, Any], variant: str) -> Iterator[LayerError]:
    """The held-out error of every site of every block, per bin."""
    compute = stage["compute"]
    for expert, described in manifest["experts"].items():
        model = open_expert(manifest, expert, compute)
        packed = PackedExpert(artifacts.checkpoint(variant) / described["subfolder"], compute.device)
        for index in track(range(described["blocks"]), f"evaluate@{variant} {expert}"):
            for site in WAN_SITES:
                heldout = read_activations(site_folder(artifacts.activations(expert), index, site.name), compute.device).heldout
                W = torch.cat([model.linear_weight(index, linear) for linear in site.linears])
                bias = torch.cat([model.linear_bias(index, linear) for linear in site.linears]).float()
                for b, x in enumerate(heldout):
                    error = relative_error(packed.output(index, site, x, b) - bias, x @ W.T).item()
                    yield LayerError(expert, index, site.name, b if site.depends_on_timestep else None, error)


class PackedExpert:
    """One expert's packed linears, read when asked for."""

    def __init__(self, folder: Path, device: str):
        self.weights, self.settings, self.device = open_weights(folder), read_settings(folder), device

    def output(self, index: int, site: Site, x: torch.Tensor, timestep_bin: int) -> torch.Tensor:
        """Stacked output [T, N] of a site's linears for x [T, K] under the clip of a bin."""
        outputs = []
        for path in site.linears:
            target = f"blocks.{index}.{path}"
            N, K = self.weights.shape(f"{target}.qweight")[0], x.shape[1]
            linear = read_linear(self.weights, self.settings, target, N, K, self.device)
            # A variant without a clip search was packed with one bin over the whole range.
            linear.bin.fill_(min(timestep_bin, self.settings.bins - 1))
            outputs.append(linear(x))
        return torch.cat(outputs, dim=1)


def format_pair(manifest: dict[str, Any], variant: str) -> FormatPair:
    """The formats the checkpoint was packed in; experts that differ are both named."""
    found = [read_settings(artifacts.checkpoint(variant) / described["subfolder"]) for described in manifest["experts"].values()]
    weights = dict.fromkeys(s.weight_format for s in found)
    activations = dict.fromkeys(s.activation_format for s in found if s.activation_format)
    return FormatPair(weight="+".join(weights), activation="+".join(activations) or None)


def measure_memory(manifest: dict[str, Any], variant: str) -> Any:
    """Bytes of all tensors of the experts, packed and in BF16."""
    experts = manifest["experts"].values()
    source = sum(described["bf16_bytes"] for described in experts)
    if variant == REFERENCE:
        return memory(source, source)
    weights = [open_weights(artifacts.checkpoint(variant) / described["subfolder"]) for described in experts]
    return memory(sum(w.info(key).nbytes for w in weights for key in w), source)


if __name__ == "__main__":
    main(evaluate)

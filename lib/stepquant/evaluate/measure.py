"""Measures one variant from its files: videos, number formats and bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from stepquant.checkpoint.linears import read_settings
from stepquant.evaluate.metrics_file import FormatPair, Memory, VideoMetrics, measure_video, memory
from stepquant.evaluate.video import model_image, read_video
from stepquant.models.manifest import ModelManifest
from stepquant.models.prompts import Prompt
from stepquant.models.weights import open_weights


def measure_videos(
    prompts: Sequence[Prompt], video: Callable[[str], Path], bf16: Callable[[str], Path] | None
) -> dict[str, VideoMetrics]:
    """The metrics of every video of a variant.

    Args:
        prompts: The evaluation prompts.
        video: The variant's file of a prompt id.
        bf16: The same for BF16 with the same noise; None if the variant is BF16.

    Returns:
        Prompt id -> metrics.

    Raises:
        UserError: A video is missing, cannot be decoded, or differs from BF16's in size.
    """
    measured = {}
    for prompt in prompts:
        frames = read_video(video(prompt.id))
        image = model_image(prompt.load_image(), *frames.shape[1:3]) if "image" in prompt.images else None
        measured[prompt.id] = measure_video(frames, bf16 and read_video(bf16(prompt.id)), image)
    return measured


def format_pair(manifest: ModelManifest, checkpoint: Path) -> FormatPair:
    """The formats of a checkpoint. Where experts, or the timestep bins of a layer, differ, all formats are named."""
    found = [read_settings(checkpoint / described.subfolder) for described in manifest.experts.values()]
    weights = dict.fromkeys(s.weight_format for s in found)
    activations = dict.fromkeys(name for s in found for name in (s.activation_format, s.eight_bit_format) if name)
    return FormatPair(weight="+".join(weights), activation="+".join(activations) or None)


def measure_memory(manifest: ModelManifest, checkpoint: Path | None) -> Memory:
    """Bytes of all tensors of the experts in a checkpoint (None: BF16), and in BF16."""
    experts = manifest.experts.values()
    source = sum(described.bf16_bytes for described in experts)
    if checkpoint is None:
        return memory(source, source)
    weights = [open_weights(checkpoint / described.subfolder) for described in experts]
    return memory(sum(w.info(key).nbytes for w in weights for key in w), source)

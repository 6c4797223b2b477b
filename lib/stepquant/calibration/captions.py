"""Captions in the calibration: text embeddings without a video, and the statistics of the sites that read text alone.

A prompt gives each text site the same few hundred tokens at every step, and a real model has thousands of channels. A
caption costs the text encoder alone, and no sampling (docs/calibration.md has what it is worth).

One Zarr group beside those of the prompts, named `text-captions`:

    embeddings  [captions, L, text_dim]     as the pipeline gives them to its denoiser
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepquant.calibration.trajectories import Call, Trajectories
from stepquant.errors import UserError
from stepquant.models.block_inputs import BlockInputs, Glue
from stepquant.models.families import find_family
from stepquant.models.manifest import ModelManifest
from stepquant.params import Sampling
from stepquant.storage import object_store
from stepquant.storage.zarr_groups import write_group

CAPTIONS_PER_BATCH = 8  # 512 tokens of 5,120 channels each: 84 MB in float32


def record_captions(
    pipe: Any, manifest: ModelManifest, sampling: Sampling, captions: Sequence[str], folder: Path, url: str | None
) -> None:
    """Encode captions and write their group.

    Args:
        pipe: the source pipeline.
        manifest: its description.
        sampling: says how many tokens a text has.
        captions: the texts.
        folder: where the group is written.
        url: the object store into which it is moved; None leaves it on disk.

    Raises:
        UserError: NaN or Inf, or an error of the object store.
    """
    encode = find_family(manifest.pipeline).encode_text
    batches = (captions[start : start + CAPTIONS_PER_BATCH] for start in range(0, len(captions), CAPTIONS_PER_BATCH))
    with torch.no_grad():
        embeddings = torch.cat([encode(pipe, batch, sampling).cpu() for batch in batches])
    finite = embeddings.isfinite().flatten(1).all(1)
    if not finite.all():
        raise UserError(
            f"caption {captions[int(finite.int().argmin())]!r}: the text encoder computed NaN or Inf; "
            "check the model, or use another compute.dtype"
        )
    write_group(folder, {"embeddings": embeddings}, {})
    if url is not None:
        object_store.move(folder, url)


def caption_calls(trajectories: Trajectories) -> list[Call]:
    """One calibration call per caption, for the sampling plan. Step, branch and t mean nothing."""
    return [Call(f"caption-{i}", "calibration", 0, 0, 0.0) for i in range(trajectories.caption_count)]


@dataclass(frozen=True)
class CaptionInputs:
    """Block inputs that carry captions.

    The model's own layers embed the text, and its blocks decide which linears read it. For that, each caption gets a
    video of one patch of zeros; everything else is taken from a recorded call.

    Attributes:
        trajectories: with captions.
        glue: the layers before the blocks.
        arguments: of a recorded call of the expert, batch 1.
        names: of the arguments of latents, t and text.
        video: shape [C, F, H, W] of one patch.
    """

    trajectories: Trajectories
    glue: Glue
    arguments: dict[str, Tensor]
    names: tuple[str, str, str]
    video: tuple[int, int, int, int]

    @classmethod
    def of(cls, trajectories: Trajectories, manifest: ModelManifest, expert: str, glue: Glue) -> "CaptionInputs":
        """Inputs for the captions of some trajectories. Raises UserError if nothing was recorded of the expert."""
        calls = trajectories.calls(expert)
        if not calls:
            raise UserError(f"trajectories: no recorded call of {expert}")
        denoiser, inputs = find_family(manifest.pipeline).denoiser, manifest.expert(expert).inputs
        names = (denoiser.latents, denoiser.timestep, denoiser.text)
        return cls(trajectories, glue, trajectories.inputs(calls[:1]), names, (inputs.in_channels, *inputs.patch_size))

    def __call__(self, positions: range) -> BlockInputs:
        """The first block's inputs for some captions. Later blocks differ in the hidden states alone."""
        latents, timestep, text = self.names
        count = len(positions)
        t = self.arguments[timestep]
        replaced = {
            latents: self.arguments[latents].new_zeros(count, *self.video),
            timestep: t.expand(count) if t.ndim == 1 else t[:, :1].expand(count, 1),  # one token per caption
            text: self.trajectories.caption_embeddings(positions),
        }
        # Repeated, not expanded: the image tokens of two images are two rows of the batch (Wan2.1-FLF2V).
        others = {name: torch.cat([value] * count) for name, value in self.arguments.items() if name not in replaced}
        return self.glue.inputs(others | replaced)

"""Gradients of random probes of a step's guided output, from the last block to the first.

The calls of the step run forward once, and the inputs of all blocks are kept on the scratch disk: 0.34 GB per block and
call at the size of Wan2.2-I2V-A14B. Going back, each block runs again and is differentiated, so one block is in memory.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepquant.calibration.block_gradients import block_gradients
from stepquant.models.block_inputs import Glue, KeptInputs
from stepquant.models.denoiser import Denoiser
from stepquant.models.manifest import ExpertManifest
from stepquant.quantize.error_products import LayerPass


@dataclass(frozen=True)
class Probes:
    """Random probes of the guided output.

    Attributes:
        count: number of probes.
        seed: what they are drawn from, such as a seed and the id of a prompt.
        guidance: scale of classifier-free guidance.
    """

    count: int
    seed: str
    guidance: float

    def draw(self, shape: Sequence[int]) -> list[Tensor]:
        """The probes: independent entries of -1 and 1, float32 on the CPU."""
        digests = (hashlib.sha256(f"{self.seed}/{n}".encode()).digest() for n in range(self.count))
        generators = (torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1) for digest in digests)
        return [torch.randint(0, 2, tuple(shape), generator=g).float() * 2 - 1 for g in generators]

    def factors(self, branches: int) -> tuple[float, ...]:
        """What the output of each branch is multiplied with: unguided + guidance * (guided - unguided)."""
        return (1.0,) if branches == 1 else (self.guidance, 1.0 - self.guidance)


class StepGradients:
    """The gradients of the probes of one step.

    Args:
        model: the expert's weights.
        glue: the layers around its blocks.
        expert: description of the expert.
        arguments: of the denoiser's forward by name, batch 1, for each guidance branch.
        probes: what is differentiated.
        scratch: an empty folder for the inputs of all blocks.
    """

    def __init__(
        self,
        model: Denoiser,
        glue: Glue,
        expert: ExpertManifest,
        arguments: Sequence[Mapping[str, Tensor]],
        probes: Probes,
        scratch: Path,
    ):
        self._model, self._expert, self._scratch = model, expert, scratch
        found = [glue.inputs(given) for given in arguments]
        self._inputs = [KeptInputs.of(inputs, None) for inputs in found]
        hidden = self._forward([inputs.hidden_states for inputs in found])
        self._gradients = [
            _by_hidden_states(glue, expert.inputs.patch_size, given, states, probes, factor)
            for given, states, factor in zip(arguments, hidden, probes.factors(len(arguments)))
        ]

    def block(self, index: int) -> Iterator[tuple[int, int, dict[str, LayerPass]]]:
        """Go back through one block; to be called for the last one first.

        Args:
            index: of the block.

        Yields:
            Guidance branch, probe, and what the block's sites read and gave, with the gradients, by site name.
        """
        block, sites = self._model.block(index), self._expert.ordered_sites
        for branch, inputs in enumerate(self._inputs):
            given = inputs.with_hidden_states(self._stored(index, branch))
            below = []
            for probe, found in enumerate(block_gradients(block, sites, given, self._gradients[branch])):
                below.append(found.hidden_states)
                yield branch, probe, found.sites
            self._gradients[branch] = below

    def _forward(self, hidden: list[Tensor]) -> list[Tensor]:
        """The last block's output of every branch; the inputs of all blocks go to the disk."""
        for index in range(self._expert.blocks):
            block = self._model.block(index)
            for branch, inputs in enumerate(self._inputs):
                save_file({"hidden_states": hidden[branch].contiguous()}, self._file(index, branch))
                hidden[branch] = inputs.with_hidden_states(hidden[branch]).run(block)
        return hidden

    def _stored(self, index: int, branch: int) -> Tensor:
        return load_file(self._file(index, branch))["hidden_states"].to(self._model.device)

    def _file(self, index: int, branch: int) -> Path:
        return self._scratch / f"{index:05d}.{branch}.safetensors"


def _by_hidden_states(
    glue: Glue,
    patch: Sequence[int],
    arguments: Mapping[str, Tensor],
    hidden: Tensor,
    probes: Probes,
    factor: float,
) -> list[Tensor]:
    """Gradient of every probe by the last block's output [1, T, D], times a factor."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        output = glue.output(arguments, hidden)
    kept = denoised(arguments[glue.timestep], output.shape, patch)
    found = []
    for n, probe in enumerate(probes.draw(output.shape)):
        weighted = (probe * kept * factor).to(output.device, output.dtype)
        found.append(torch.autograd.grad(output, hidden, weighted, retain_graph=n + 1 < probes.count)[0])
    return found


def denoised(t: Tensor, shape: Sequence[int], patch: Sequence[int]) -> Tensor:
    """Which latents the sampler changes: 1, or 0 where they are a condition.

    A pipeline with t per token (Wan2.2-TI2V-5B) gives the tokens of the first frame t = 0 and puts that frame back
    after every step, so errors there do not reach the video.

    Args:
        t: timestep of the call, [1] or [1, tokens].
        shape: of the denoiser's output, [1, C, F, H, W].
        patch: frames, rows and columns of latents in a token.

    Returns:
        float32 on the CPU, broadcastable to the shape.
    """
    if t.ndim == 1:
        return torch.ones(1)
    grid = [size // part for size, part in zip(shape[2:], patch)]
    kept = (t[0] == t.max()).float().cpu().view(1, 1, *grid)
    for axis, part in enumerate(patch, start=2):
        kept = kept.repeat_interleave(part, axis)
    return kept

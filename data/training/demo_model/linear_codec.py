"""Sets the encoder of an AutoencoderKLWan to a linear transform fitted to clips, instead of training it, and makes the
decoder linear to start with.

Space goes to channels at each 2 x 2 downsampling, pairs of frames become mean and difference, and principal components
choose what the 16 latent channels keep. This takes seconds where gradient descent takes an hour on a CPU, and the
latents have unit variance from the start, so experts can be trained at once.

The network itself is not linear. Three devices make it so: the second convolution of every residual block is zero; one
channel carries the large constant LOUD, so that RMS normalisation divides by almost the same number everywhere; and
signals reach SiLU as x and -x, because silu(x) - silu(-x) = x.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from torch import nn

LATENT_CHANNELS = 16
BASE_DIM = 16  # the arithmetic below counts on these widths: 16, 32 and 64 channels
LOUD = 20.0
# The decoder's is no louder than its signals are, or its residual branches would hear nothing else.
DECODER_LOUD = 4.0
# Log-variance of the posterior: what the decoder sees in training is the latent plus noise of deviation 0.05.
LOG_VARIANCE = -6.0


@dataclass(frozen=True)
class LinearCodec:
    """The fitted transforms. `differences` (3, 12): of 2 x 2 patch differences between two frames; `space` (31, 60): of
    2 x 2 patches of those 15 channels; `time` (16, 62): of two such vectors in a row; `mean` and `deviation` (16,): of
    the result."""

    differences: np.ndarray
    space: np.ndarray
    time: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray


def principal_components(rows: np.ndarray, count: int) -> np.ndarray:
    """The first principal components of (N, D) rows, as (count, D), largest first."""
    _, vectors = np.linalg.eigh(np.cov(rows.T))
    return vectors[:, ::-1][:, :count].T


def patches(frames: np.ndarray) -> np.ndarray:
    """(N, H, W, C) to (N, H/2, W/2, 4 C): the four pixels of each 2 x 2 patch, position by position."""
    n, height, width, channels = frames.shape
    split = frames.reshape(n, height // 2, 2, width // 2, 2, channels)
    return split.transpose(0, 1, 3, 2, 4, 5).reshape(n, height // 2, width // 2, 4 * channels)


def halves(first: np.ndarray, second: np.ndarray, differences: np.ndarray) -> np.ndarray:
    """What the first temporal downsampling makes of two frames of patches: mean, then components of the difference."""
    return np.concatenate([(first + second) / 2, (second - first) / 2 @ differences.T], axis=-1)


def fit_codec(clips: np.ndarray) -> LinearCodec:
    """Fits all transforms to (N, T, H, W, 3) uint8 clips with T >= 5."""
    pixels = clips.astype(np.float64) / 127.5 - 1
    fine = [patches(pixels[:, index]) for index in range(5)]
    differences = principal_components(((fine[2] - fine[1]) / 2).reshape(-1, 12), 3)
    pairs = [patches(halves(fine[i], fine[i + 1], differences)).reshape(-1, 60) for i in (1, 3)]
    still = patches(np.concatenate([fine[0], np.zeros_like(fine[0][..., :3])], axis=-1)).reshape(-1, 60)
    # A single frame has only these 16 components; two frames use 15 more, of what those leave over.
    frame = principal_components(still, LATENT_CHANNELS)
    rest = pairs[0] - pairs[0] @ frame.T @ frame
    space = np.concatenate([frame, principal_components(rest, 15)])
    coarse = [pair @ space.T for pair in pairs]
    time = principal_components(np.concatenate(coarse, axis=-1), LATENT_CHANNELS)
    time = align(time, np.concatenate(coarse, axis=-1), (coarse[0] + coarse[1])[:, :LATENT_CHANNELS] / 2)
    latents = np.concatenate([still @ frame.T, np.concatenate(coarse, axis=-1) @ time.T])
    return LinearCodec(differences, space, time, latents.mean(axis=0), latents.std(axis=0))


def align(components: np.ndarray, rows: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Rotates components among themselves until rows @ components.T is as close as can be to `wanted`, so that a
    channel means the same in the first frame and in later ones (orthogonal Procrustes)."""
    left, _, right = np.linalg.svd((rows @ components.T).T @ wanted)
    # Whatever scale the sums of two frames have, a still scene must give what a single frame gives.
    rotated = (left @ right).T @ components
    scores = rows @ rotated.T
    return rotated * (scores * wanted).sum() / (scores * scores).sum()


def silence_branches(part: nn.Module) -> None:
    """Turns every residual and attention block into its shortcut."""
    for name, module in part.named_modules():
        if name.endswith(("conv2", "proj")):
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)


def put(layer: nn.Module, entries: list[tuple[tuple[int, ...], np.ndarray]], biases: dict[int, float]) -> None:
    """Zeroes a convolution, then writes (out, in) blocks at given kernel positions, starting at channel (0, 0)."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    for position, block in entries:
        index = (slice(0, block.shape[0]), slice(0, block.shape[1]), *position)
        layer.weight[index] = torch.from_numpy(np.ascontiguousarray(block)).float()
    for channel, value in biases.items():
        layer.bias[channel] = value


@torch.no_grad()
def install_codec(vae: AutoencoderKLWan, codec: LinearCodec) -> None:
    """Writes the codec into the encoder's weights. Kernel position (2, 1, 1) is the current frame and pixel."""
    encoder = vae.encoder
    silence_branches(encoder)
    first, down_fine, second, down_coarse, third = encoder.down_blocks
    put(encoder.conv_in, [((2, 1, 1), np.eye(3))], {BASE_DIM - 1: LOUD})
    shifts = [np.zeros((12, 3)) for _ in range(4)]
    for place, block in enumerate(shifts):
        block[3 * place : 3 * place + 3] = np.eye(3)
    corners = [(0, 0), (0, 1), (1, 0), (1, 1)]
    put(down_fine.resample[1], list(zip(corners, shifts, strict=True)), {BASE_DIM - 1: LOUD})
    halve = [np.concatenate([np.eye(12) / 2, sign * codec.differences / 2]) for sign in (-1, 1)]
    put(down_fine.time_conv, [((1, 0, 0), halve[0]), ((2, 0, 0), halve[1])], {15: LOUD})
    put(second.conv_shortcut, [((0, 0, 0), np.eye(15))], {31: LOUD})
    quarters = [codec.space[:, 15 * place : 15 * place + 15] for place in range(4)]
    put(down_coarse.resample[1], list(zip(corners, quarters, strict=True)), {31: LOUD})
    put(down_coarse.time_conv, [((1, 0, 0), codec.time[:, :31]), ((2, 0, 0), codec.time[:, 31:])], {31: LOUD})
    put(third.conv_shortcut, [((0, 0, 0), np.concatenate([np.eye(32), -np.eye(31, 32)]))], {63: LOUD})
    encoder.norm_out.gamma.fill_(LOUD * 2**0.5 / 64**0.5)
    gain = np.zeros((LATENT_CHANNELS, 64))
    for channel in range(LATENT_CHANNELS):
        gain[channel, [channel, 32 + channel]] = np.array([1, -1]) / codec.deviation[channel]
    offsets = dict(enumerate(-codec.mean / codec.deviation))
    put(encoder.conv_out, [((2, 1, 1), gain)], offsets)
    variances = dict.fromkeys(range(LATENT_CHANNELS, 2 * LATENT_CHANNELS), LOG_VARIANCE)
    put(vae.quant_conv, [((0, 0, 0), np.eye(LATENT_CHANNELS))], variances)


@torch.no_grad()
def make_decoder_linear(vae: AutoencoderKLWan) -> None:
    """Makes a freshly built decoder a chain of random, but linear, convolutions.

    The last upsampling gives the loud channel and signals as x and -x, as in the encoder.
    """
    decoder = vae.decoder
    silence_branches(decoder)
    last = decoder.up_blocks[-2].upsamplers[0].resample[1]
    width = last.weight.shape[0]
    pairs = (width - 1) // 2
    nn.init.zeros_(last.bias)
    last.weight[pairs : 2 * pairs] = -last.weight[:pairs]
    last.weight[2 * pairs :] = 0
    last.bias[width - 1] = DECODER_LOUD
    decoder.norm_out.gamma.fill_(DECODER_LOUD / width**0.5)
    decoder.conv_out.weight[:, pairs : 2 * pairs] = -decoder.conv_out.weight[:, :pairs]
    decoder.conv_out.weight[:, 2 * pairs :] = 0

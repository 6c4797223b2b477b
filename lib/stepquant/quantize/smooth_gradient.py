"""Gradient-refined smoothing factors: minimizes the expected rounding noise, from the result of the search on.

For a group of transformed inputs z_g and the weights R_g that multiply it (rows of all outputs), rounding with scales
proportional to the group's largest magnitude adds noise to the output whose variance is proportional to

    max_j |z_gj|^2 ||R_g||^2     for the rounding of activations, averaged over tokens
    E z_g^2 ||R_g||^2            for the rounding of weights, whose largest magnitude is proportional to their norm

Both depend on s alone: z is x / s, rotated, and R is (W - branch) * s, rotated. The norms of R come from the Gram
matrix of the columns of each Hadamard block, so an iteration does not read the weight. An 8-norm replaces the maximum,
which has a gradient for one channel alone.
"""

from dataclasses import replace

import torch
from torch import Tensor

from stepquant.quantize.lowrank import low_rank_factors, stored_branch
from stepquant.quantize.quantized_layer import LayerSpec
from stepquant.quantize.rotate import hadamard, rotate_by
from stepquant.quantize.smooth import TransformSearch, search_score
from stepquant.quantize.transform import InputTransform

TOKENS = 256  # a random subset of the search tokens; more change nothing
LEARNING_RATE = 0.05  # of log s


def refine_smoothing(
    W: Tensor, x: Tensor, validation: Tensor, found: TransformSearch, spec: LayerSpec, *, steps: int
) -> TransformSearch:
    """Refines the smoothing of a search by gradient on x, if that lowers the output error on `validation`.

    Args:
        W: Weight [N, K].
        x: Raw inputs [T, K] for the gradient.
        validation: Raw inputs [T, K] of other prompts. A site whose tokens are alike (text) would be overfitted if it
            were scored on x.
        found: Result of `search_transform`.
        spec: Rank, seed and formats, as in the search.
        steps: Iterations of Adam; 0 returns `found`.

    Returns:
        `found` with refined smoothing and its branch, or `found` itself if the error does not fall.

    Raises:
        UserError: Activations stay unquantized.
    """
    if steps == 0:
        return found
    W, validation = W.float(), validation.float()
    rest = W - found.proj_up.float() @ found.proj_down.float().T
    smooth = descend_smoothing(rest, x, found.transform, spec.scheme.activation_format.group, steps=steps)
    transform = replace(found.transform, smooth=smooth)
    branch = stored_branch(*low_rank_factors(W * smooth.float(), spec.rank, seed=spec.seed), smooth)
    reference = validation @ W.T
    before = search_score(W, validation, reference, found.transform, (found.proj_down, found.proj_up), spec.scheme)
    if not search_score(W, validation, reference, transform, branch, spec.scheme) < before:
        return found
    return replace(found, transform=transform, proj_down=branch[0], proj_up=branch[1], learned=True)


def descend_smoothing(rest: Tensor, x: Tensor, transform: InputTransform, group: int, *, steps: int) -> Tensor:
    """s after some iterations of Adam on log s.

    Args:
        rest: W without the branch, not smoothed, [N, K].
        x: Raw inputs [T, K].
        transform: The transform whose smoothing is the starting point.
        group: Group size of the activation format; 0 is all of a row.
        steps: Iterations of Adam.

    Returns:
        bfloat16 [K].
    """
    # Drawn on the CPU, so that every device uses the same tokens.
    subset = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:TOKENS].to(x.device)
    tokens = x[subset].float() - transform.mean.float()
    size = max(transform.rotation, 1)
    matrix = hadamard(size, transform.hadamard, device=x.device)
    columns = torch.unflatten(rest.float(), 1, (-1, size)).permute(1, 2, 0)
    gram = columns @ columns.mT
    with torch.enable_grad():
        start = transform.smooth.float().log()
        move = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([move], lr=LEARNING_RATE)
        for _ in range(steps):
            loss = _log_noise((start + move).exp(), tokens, gram, matrix, group or x.shape[1])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (start + move.detach()).exp().to(torch.bfloat16)


def _log_noise(s: Tensor, tokens: Tensor, gram: Tensor, matrix: Tensor, group: int) -> Tensor:
    """Log of the expected output noise, up to a constant, for the smoothing s [K] and centered tokens [T, K].

    gram [K/size, size, size]: of the columns of each Hadamard block. matrix [size, size]: the rotation; [[1]] for none.
    """
    size = len(matrix)
    z = tokens / s
    z = torch.unflatten(rotate_by(z, matrix) if size > 1 else z, -1, (-1, group))
    blocks: Tensor = torch.unflatten(s, 0, (-1, size))
    rotated = (matrix @ (blocks[:, :, None] * gram * blocks[:, None])) * matrix
    norms = torch.unflatten(rotated.sum(-1).flatten(), 0, (-1, group)).sum(-1)
    return (norms * (_largest_squared(z).mean(0) + z.square().mean((0, 2)))).sum().log()


def _largest_squared(z: Tensor) -> Tensor:
    """The squared 8-norm of each group [..., G].

    Computed relative to the largest magnitude, so that nothing overflows and an all-zero group has a finite gradient.
    """
    unit = z.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    power = (z / unit).square().square().square().sum(-1).clamp(min=1)
    return power.sqrt().sqrt() * unit.squeeze(-1).square()

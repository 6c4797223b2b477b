"""Smoothing moved by gradient, from the one that the search found, to where the expected rounding noise is smallest.

Of a group of transformed inputs z_g with the weights R_g behind it (rows of all outputs), rounding with steps in proportion to the
group's largest magnitude puts noise on the output whose variance is in proportion to

    max_j |z_gj|^2 ||R_g||^2     from the activations, in the mean over tokens
    E z_g^2 ||R_g||^2            from the weights, whose largest magnitude goes with their norm

Both depend on s alone: z is x / s, rotated, and R is (W - branch) * s, rotated. The norms of R come from the Gram matrix of the
columns of each rotation block, so that a step costs no pass over the weight. An 8-norm stands for the maximum, which has a gradient
for one channel alone.
"""

from dataclasses import replace

import torch
from torch import Tensor

from stepquant.quantize.lowrank import low_rank_factors, stored_branch
from stepquant.quantize.quantized_layer import QuantScheme
from stepquant.quantize.rotate import hadamard, rotate
from stepquant.quantize.smooth import TransformSearch, search_score
from stepquant.quantize.transform import InputTransform

TOKENS = 256  # more change nothing; drawn once
LEARNING_RATE = 0.05  # of log s


def refine_smoothing(
    W: Tensor,
    x: Tensor,
    validation: Tensor,
    found: TransformSearch,
    *,
    steps: int,
    rank: int,
    seed: int,
    scheme: QuantScheme,
) -> TransformSearch:
    """What the search found with its smoothing moved by gradient on x, if that lowers the output error on `validation`; else as it was.

    W [N, K]; x and validation [T, K]: tokens of different prompts, because a site that sees few different tokens (text) is soon fitted to
    them alone. rank, seed and scheme as in `search_transform`. steps: 0 leaves everything as it is.
    """
    if steps == 0:
        return found
    W, validation = W.float(), validation.float()
    rest = W - found.proj_up.float() @ found.proj_down.float().T
    smooth = descend_smoothing(rest, x, found.transform, scheme.activation.group, steps=steps)
    transform = replace(found.transform, smooth=smooth)
    branch, reference = stored_branch(*low_rank_factors(W * smooth.float(), rank, seed=seed), smooth), validation @ W.T
    before = search_score(W, validation, reference, found.transform, (found.proj_down, found.proj_up), scheme)
    if not search_score(W, validation, reference, transform, branch, scheme) < before:
        return found
    return replace(found, transform=transform, proj_down=branch[0], proj_up=branch[1], learned=True)


def descend_smoothing(rest: Tensor, x: Tensor, transform: InputTransform, group: int, *, steps: int) -> Tensor:
    """s after some steps of Adam on log s, from that of `transform`; bfloat16 [K].

    rest [N, K]: W without the branch, not smoothed. x [T, K]: raw inputs. group: channels that share a scale, of the activation format.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = x[torch.randperm(len(x), generator=generator)[:TOKENS].to(x.device)].float() - transform.mean.float()
    block = max(transform.rotation, 1)
    columns = rest.float().unflatten(1, (-1, block)).permute(1, 2, 0)
    gram, turn = columns @ columns.mT, hadamard(block).to(tokens)
    with torch.enable_grad():
        start = transform.smooth.float().log()
        move = torch.zeros_like(start, requires_grad=True)
        optimizer = torch.optim.Adam([move], lr=LEARNING_RATE)
        for _ in range(steps):
            s = (start + move).exp()
            z = rotate(tokens / s, transform.rotation).unflatten(-1, (-1, group))
            largest = _largest_squared(z).mean(0)
            blocks = s.unflatten(0, (-1, block))
            norms = (
                ((turn @ (blocks[:, :, None] * gram * blocks[:, None])) * turn)
                .sum(-1)
                .flatten()
                .unflatten(0, (-1, group))
                .sum(-1)
            )
            loss = (norms * (largest + z.square().mean((0, 2)))).sum().log()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (start + move.detach()).exp().to(torch.bfloat16)


def _largest_squared(z: Tensor) -> Tensor:
    """The squared 8-norm of each group [..., G]; in units of its largest magnitude, so that nothing overflows and silence has a gradient."""
    unit = z.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)
    power = (z / unit).square().square().square().sum(-1).clamp(min=1)
    return power.sqrt().sqrt() * unit.squeeze(-1).square()

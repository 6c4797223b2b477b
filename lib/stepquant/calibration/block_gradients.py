"""Gradients of a scalar by the outputs of a block's linears and by the block's hidden states."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepquant.models.block_inputs import BlockInputs
from stepquant.models.sites import Site
from stepquant.quantize.error_products import LayerPass


@dataclass(frozen=True)
class BlockPass:
    """The gradients of one call of a block.

    Attributes:
        hidden_states: By the block's input, [1, T, D].
        sites: What each site's linears read and gave, bias included, and the gradient, by name of the site.
    """

    hidden_states: Tensor
    sites: dict[str, LayerPass]


def block_gradients(
    block: nn.Module, sites: Sequence[Site], inputs: BlockInputs, gradients: Sequence[Tensor]
) -> Iterator[BlockPass]:
    """Run a block on one call, and differentiate some scalars.

    Args:
        block: whose parameters take no gradients.
        sites: the sites of the block.
        inputs: of one call.
        gradients: of each scalar by the block's output, [1, T, D].

    Yields:
        The gradients of each scalar.
    """
    hidden = inputs.hidden_states.detach().requires_grad_()
    with torch.enable_grad(), _linears(block, sites) as (read, given):
        output = BlockInputs(hidden, inputs.carried, inputs.others).run(block)
    names = [linear for site in sites for linear in site.linears]
    for n, gradient in enumerate(gradients):
        by_hidden, *by_linear = torch.autograd.grad(
            output, [hidden, *(given[name] for name in names)], gradient, retain_graph=n + 1 < len(gradients)
        )
        found = dict(zip(names, by_linear))
        yield BlockPass(by_hidden, {site.name: _site_pass(site, read, given, found) for site in sites})


def _site_pass(site: Site, read: dict[str, Tensor], given: dict[str, Tensor], found: dict[str, Tensor]) -> LayerPass:
    y, G = (_stacked([part[name][0].detach() for name in site.linears]) for part in (given, found))
    return LayerPass(read[site.linears[0]][0].detach(), y, G)


def _stacked(outputs: list[Tensor]) -> Tensor:
    """The outputs of a site's linears side by side; that of a single one is not copied."""
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)


@contextmanager
def _linears(block: nn.Module, sites: Sequence[Site]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Keeps inputs and outputs of all linears of the sites, by module path, while a block runs."""
    read: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}

    def keep(name: str, linear: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # What is computed from the text alone does not depend on the hidden states, so it is no part of the graph.
            read[name], given[name] = args[0], output if output.requires_grad else output.requires_grad_()

        return linear.register_forward_hook(hook)

    handles = [keep(name, block.get_submodule(name)) for site in sites for name in site.linears]
    try:
        yield read, given
    finally:
        for handle in handles:
            handle.remove()

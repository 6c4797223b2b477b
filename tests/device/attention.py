"""Attention of the pretend device in one piece, as on the CPU: it would be taken apart otherwise, into other sums."""

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


class _Attention(torch.autograd.Function):
    """What the CPU computes where gradients are wanted."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output, sums = aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v)
        ctx.save_for_backward(q, k, v, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
        return backward(gradient, *ctx.saved_tensors, 0.0, False)


def attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, *options: Any, **more: Any
) -> Tensor:
    """torch's scaled_dot_product_attention, above autograd."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v)):
        if attn_mask is not None or dropout_p or any(options) or any(more.values()):
            raise NotImplementedError("gradients of attention with a mask, dropout or options")
        return _Attention.apply(q, k, v)
    with torch._C._AutoDispatchBelowAutograd():
        return aten.scaled_dot_product_attention.default(q, k, v, attn_mask, dropout_p, *options, **more)

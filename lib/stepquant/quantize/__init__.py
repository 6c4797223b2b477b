"""Smoothing, low-rank branch, GPTQ and clipping search: pure functions of tensors, on any device."""

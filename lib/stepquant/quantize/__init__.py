"""Smoothing, low-rank branch, GPTQ and clip search: pure functions of tensors, on any device."""

"""Noise schedule and samplers, in float64 numpy: no tensors, no devices."""

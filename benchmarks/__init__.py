"""Measurements against sequential PyTorch and torchrun; run with ``python -m benchmarks``."""

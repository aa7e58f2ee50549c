"""Handwritten digits: sequential PyTorch against dask-nn, the same network and the same math."""

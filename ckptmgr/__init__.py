"""Checkpoints for PyTorch training loops that are never half-written, lost, or silently wrong."""

__version__ = "0.1.0"

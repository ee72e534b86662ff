"""Sparse masked pre-training of convolutional networks on volumes and images."""

__version__ = "0.1.0"

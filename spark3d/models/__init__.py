"""Backbones, densify, decoders and segmentation networks."""

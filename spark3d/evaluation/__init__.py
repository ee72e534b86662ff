"""Sliding windows, metrics and tables."""

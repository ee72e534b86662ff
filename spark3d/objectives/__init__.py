"""Pre-training objectives: siblings on one interface."""

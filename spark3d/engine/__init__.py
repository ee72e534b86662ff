"""Training engine: step, log, checkpoint, resume."""

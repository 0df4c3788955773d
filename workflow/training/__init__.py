"""Training: the trainer, one step, checkpoint and exact resume, metrics, processes, hardware."""

"""Training: objectives, trainer, data."""

"""Measured and predicted memory of a training step on a whole volume."""

"""Whole runs of private fine-tuning."""

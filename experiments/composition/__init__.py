"""Stored, checkpoint and reversible, side by side."""

"""Whole, uncropped volumes: what a step takes on the machine at hand, and what was predicted of it."""

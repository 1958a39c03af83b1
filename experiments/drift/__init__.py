"""Rounding errors of the recomputed stream, and two methods that bound them."""

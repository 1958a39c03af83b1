"""Rounding errors of the rebuilt stream, and what keeps them small."""

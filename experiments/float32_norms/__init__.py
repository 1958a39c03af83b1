"""Digits of a float32 norm, by the way in which it is summed."""

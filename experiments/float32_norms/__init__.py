"""Accuracy of float32 norms by the method of summation."""

"""Segmentation of lesions in volumes."""

"""Synthetic heads with tumours, generated once and cached as NIfTI files in the BraTS 2021 layout."""

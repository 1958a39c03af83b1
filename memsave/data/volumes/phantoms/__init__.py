"""Synthetic heads with tumours, generated once and cached as NIfTI files in the layout of BraTS 2021."""

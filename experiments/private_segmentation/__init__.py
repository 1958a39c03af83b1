"""Private segmentation by the number of patients."""

"""Speed, always as a ratio of two variants that are measured in turn in one run."""

"""Live bytes and time of a step in several processes."""

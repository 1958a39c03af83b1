"""Memory of ghost clipping in every memory mode."""

"""The first paper's claim as one table: what fits into a budget, by how activations are kept."""

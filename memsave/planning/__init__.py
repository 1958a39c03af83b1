"""Planning on fake tensors: the sizes and memory modes that fit into a budget."""

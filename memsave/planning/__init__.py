"""Planning on fake tensors: which sizes and memory modes fit into a budget, before anything is trained."""

"""What memsave does on one GPU: exactness, memory and time."""

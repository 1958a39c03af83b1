"""The largest sizes in a memory budget for each memory mode, as claimed by Pendse et al. (2020)."""

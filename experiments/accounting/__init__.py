"""Epsilons beside those of other libraries, and what samplers and correlated noise change."""

"""Accuracy of plans, and the sweeps over budgets."""

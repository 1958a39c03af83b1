"""Differential privacy: Poisson sampling, noise and accounting, with the clipped gradients of `memsave.ghost`."""

from memsave.privacy.accounting import PrivacyError, default_delta, epsilon_of, epsilon_of_runs, noise_multiplier_for
from memsave.privacy.gradients import Mechanism, PrivateGradients

__all__ = [
    "Mechanism",
    "PrivacyError",
    "PrivateGradients",
    "default_delta",
    "epsilon_of",
    "epsilon_of_runs",
    "noise_multiplier_for",
]

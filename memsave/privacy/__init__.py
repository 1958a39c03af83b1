"""Differential privacy: sampling, noise and accounting, with the clipped gradients of `memsave.ghost`."""

from memsave.privacy.accounting import (
    default_delta,
    epsilon_curve,
    epsilon_of,
    epsilon_of_events,
    epsilon_of_runs,
    noise_multiplier_for,
)
from memsave.privacy.errors import PrivacyError
from memsave.privacy.events import Event
from memsave.privacy.gradients import PrivateGradients
from memsave.privacy.mechanism import Mechanism

__all__ = [
    "Event",
    "Mechanism",
    "PrivacyError",
    "PrivateGradients",
    "default_delta",
    "epsilon_curve",
    "epsilon_of",
    "epsilon_of_events",
    "epsilon_of_runs",
    "noise_multiplier_for",
]

"""Empirical audits: canaries in a private training, and lower bounds of the epsilon that it spends.

    from memsave.privacy import Mechanism, PrivateGradients
    from memsave.privacy.audit import CanaryAudit, audit_report

A lower bound above the promised epsilon refutes the promise. One below it proves nothing.
"""

from memsave.privacy.audit.canaries import CanaryAudit
from memsave.privacy.audit.one_run import epsilon_of_guesses, p_value, refutes
from memsave.privacy.audit.repeated import ErrorRates, error_rates
from memsave.privacy.audit.report import AuditReport, CanaryGroup, audit_report, epsilon_of_refuted_noise
from memsave.privacy.audit.trade_off import TradeOff, gaussian_trade_off, mechanism_trade_off

__all__ = [
    "AuditReport",
    "CanaryAudit",
    "CanaryGroup",
    "ErrorRates",
    "TradeOff",
    "audit_report",
    "epsilon_of_guesses",
    "epsilon_of_refuted_noise",
    "error_rates",
    "gaussian_trade_off",
    "mechanism_trade_off",
    "p_value",
    "refutes",
]

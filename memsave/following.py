"""What the processes other than rank 0 do in a run of several: take part in it, and tell rank 0 of an error."""

import sys

from memsave.failures import Failures, Interrupted
from memsave.leading import Run, receive_order
from memsave.training.signals import interrupt_at_signals


def follow() -> int:
    """Take part in the run of rank 0, which alone writes and reports; returns the exit code."""
    interrupt_at_signals()
    failures = Failures()
    try:
        order = receive_order()
    except (Exception, KeyboardInterrupt):  # rank 0 has ended
        return 1
    if order.run is None:
        return order.code
    return _take_part(order.run, failures)


def _take_part(run: Run, failures: Failures) -> int:
    from memsave.experiment import run_experiment
    from memsave.progress import Progress

    try:
        run_experiment(run.config, run.folder, strategies=run.strategies, progress=Progress())
        return 0
    except KeyboardInterrupt:
        failures.leave(Interrupted())
        return 130
    except Exception as error:
        cause = failures.cause(error)
        if failures.leave(cause):
            print(f"memsave: {cause}", file=sys.stderr)
        return 1

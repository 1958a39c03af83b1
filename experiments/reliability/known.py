"""What the mutants need to know: the tests of each file, and why some mutants are not noticed by any test of these."""

import json
from pathlib import Path

REVERSIBLE = ["sequence", "replay", "survival", "couplings", "fused"]
GHOST = [
    "attach", "broken_rules", "clipper", "computed_weights", "conv", "coverage", "documents", "empty", "example_rows",
    "followed_layers", "followed_state", "groups", "hidden_uses", "independence", "later_forwards", "layers",
    "nested_backward", "norm_forwards", "operators", "own_parameters", "parameter_source", "partial_sums",
    "recomputation", "row_follower", "rows", "sharding", "side_outputs", "state_snapshot", "torch_internals",
    "trainability",
]  # fmt: skip
"""Tests of `memsave.ghost` that run for many of its files; those that take long are named with one file below."""
TESTS: dict[str, tuple[str, ...]] = {
    "ghost/": tuple(f"ghost/test_{name}.py" for name in GHOST),
    "ghost/gradient_products.py": ("ghost/test_gradient_forms.py", "ghost/test_head.py"),
    "ghost/gradients.py": ("ghost/test_gradient_forms.py",),
    "ghost/independence.py": ("ghost/test_independence_schedule.py",),
    "ghost/ledger.py": ("ghost/test_gradient_forms.py",),
    "ghost/logits.py": ("ghost/test_head.py",),
    "ghost/operators/recurrent.py": ("ghost/test_recurrent.py",),
    "ghost/verify.py": ("ghost/test_verify_padding.py",),
    "privacy/acc": ("privacy/test_accounting.py", "privacy/test_mechanism.py", "privacy/test_allocation.py"),
    "privacy/events.py": ("privacy/test_accounting.py", "privacy/test_mechanism.py"),
    "privacy/gradients.py": ("privacy/test_gradients.py", "privacy/test_guard.py", "privacy/audit/test_canaries.py"),
    "privacy/guard.py": ("privacy/test_gradients.py",),
    "privacy/monitor.py": ("privacy/test_epsilon_monitor.py",),
    "privacy/noise": ("privacy/test_noise.py", "privacy/test_correlated.py", "privacy/test_gradients.py"),
    "privacy/randomness.py": ("privacy/test_randomness.py", "privacy/test_noise.py", "privacy/test_sampling.py"),
    "privacy/audit/": ("privacy/audit/test_canaries.py", "privacy/audit/test_one_run.py", "test_audit.py"),
    "privacy/audit/trade_off.py": ("privacy/audit/test_repeated.py",),
    "privacy/audit/trials.py": ("privacy/audit/test_repeated.py",),
    "reversible/": tuple(f"reversible/test_{name}.py" for name in REVERSIBLE),
    "reversible/_torch_internals.py": ("reversible/test_torch_internals.py",),
    "reversible/saved_copies.py": ("models/test_recast.py",),
    "reversible/steps.py": ("reversible/test_residual.py",),
}
"""Tests below `tests/` by the start of a path below `memsave/`. Only the tests that execute a mutant run on it."""
EXPLAINED: dict[str, str] = json.loads(Path(__file__).with_name("explained.json").read_text())
"""By the name of a mutant, why the tests of its file do not notice it: it is equivalent, or other tests do."""

"""What the mutants need to know: the tests of each file, and the mutants that do not change what the code does."""

TESTS: dict[str, tuple[str, ...]] = {
    "ghost/gradient_products.py": ("ghost/test_gradient_forms.py", "ghost/test_head.py"),
    "ghost/gradients.py": ("ghost/test_gradient_forms.py",),
    "ghost/rules/linear.py": ("ghost/test_layers.py",),
    "ghost/rules/embedding.py": ("ghost/test_layers.py",),
    "ghost/rules/norm.py": ("ghost/test_layers.py", "ghost/test_norm_forwards.py"),
    "ghost/rules/norm_forwards.py": ("ghost/test_norm_forwards.py",),
    "reversible/coupling.py": ("reversible/test_couplings.py",),
    "reversible/steps.py": ("reversible/test_sequence.py",),
    "reversible/recompute_context.py": ("reversible/test_sequence.py",),
    "reversible/stream_nodes.py": ("reversible/test_sequence.py",),
}
"""Tests by source file below `memsave/`, beside the test file of the same path."""
LATER = tuple(
    f"memsave/privacy/{name}.py" for name in ("accounting", "sampling", "noise", "randomness", "gradients", "monitor")
)
"""Files that are not mutated yet."""
EXPLAINED: dict[str, str] = {
    "memsave/ghost/rules/norm.py: COMPARED = 8 -> COMPARED = 9": (
        "equivalent: one more position is compared with autograd, and finds the same"
    ),
    "memsave/ghost/attach.py: self.sharding.find(model) -> deleted": (
        "noticed by tests/distributed/test_sharded_clipper.py, which runs in processes of its own"
    ),
}
"""By the name of a mutant, why the tests of its file do not notice it: it is equivalent, or other tests do."""

"""A clipper of a model that FSDP2 shards over several processes: exact, as that of one process with the whole batch."""

from functools import partial

import pytest

from tests.distributed.sharded_cases import (
    Case,
    SequenceFirst,
    checkpointed_gpt2,
    errors,
    gpt2,
    llama_lora,
    lm_losses,
    lm_losses_of_logits,
    mlp,
    rev_gpt2,
    shard_blocks,
    shard_branches,
    shard_layers,
    shard_linears,
    squares,
    texts,
    unet,
    vectors,
    volumes,
    voxel_losses,
)
from tests.support.processes import run_processes

BY_LAYER = {"clipping": "per_layer"}
LINEAR = Case(mlp, shard_linears, squares, vectors)
GPT2 = Case(gpt2, shard_blocks, lm_losses, texts, (3, 2))
REVERSIBLE = GPT2._replace(build=partial(rev_gpt2, "reversible"), shard=shard_branches)
UNET = Case(partial(unet, "reversible"), shard_branches, voxel_losses, volumes, (3,))
CASES = {
    "mlp": LINEAR,
    "mlp, layer by layer": LINEAR._replace(options=BY_LAYER),
    "mlp, automatic": LINEAR._replace(options={"clipping": "automatic"}),
    "mlp, a process has padding alone": LINEAR._replace(counts=(5, 1)),
    "mlp, layer by layer, padding alone": LINEAR._replace(counts=(1, 5), options=BY_LAYER),
    "examples in dimension 1": LINEAR._replace(build=SequenceFirst, shard=shard_layers),
    "examples in dimension 1, layer by layer": LINEAR._replace(
        build=SequenceFirst, shard=shard_layers, options=BY_LAYER
    ),
    "gpt2": GPT2,
    "gpt2, layer by layer": GPT2._replace(options=BY_LAYER),
    "gpt2, logits": GPT2._replace(losses=lm_losses_of_logits),
    "gpt2, checkpoints": GPT2._replace(build=checkpointed_gpt2),
    "gpt2, checkpoints, layer by layer": GPT2._replace(build=checkpointed_gpt2, options=BY_LAYER),
    "llama, adapters": GPT2._replace(build=llama_lora),
    "reversible gpt2": REVERSIBLE,
    "reversible gpt2, stored": REVERSIBLE._replace(build=partial(rev_gpt2, "stored")),
    "reversible gpt2, checkpoint": REVERSIBLE._replace(build=partial(rev_gpt2, "checkpoint")),
    "reversible gpt2, layer by layer": REVERSIBLE._replace(options=BY_LAYER),
    "unet": UNET,
    "unet, stored": UNET._replace(build=partial(unet, "stored")),
    "unet, checkpoint": UNET._replace(build=partial(unet, "checkpoint")),
    "unet, layer by layer": UNET._replace(options=BY_LAYER),
}


OF_THREE = [
    *(name for name in CASES if name.startswith("mlp")),
    "gpt2",
    "gpt2, checkpoints, layer by layer",
    "llama, adapters",
    "reversible gpt2",
    "unet, layer by layer",
]
"""The cases that also run in three processes, of which some have empty shards or no examples."""
OF_TWO = [*OF_THREE, "examples in dimension 1", "unet"]


def all_errors(names):
    found = {}
    for name in names:
        try:
            found[name] = errors(CASES[name])
        except Exception as error:
            raise AssertionError(name) from error
    return found


REST = pytest.param(2, [name for name in CASES if name not in OF_TWO], marks=pytest.mark.slow)
THREE = pytest.param(3, OF_THREE, marks=pytest.mark.slow)


@pytest.mark.parametrize(("count", "names"), [(2, OF_TWO), REST, THREE], ids=["two", "two, rest", "three"])
def test_norms_and_sums_are_those_of_one_process(count, names):
    for found in run_processes(count, all_errors, names):
        assert max(map(max, found.values())) < 1e-10, found

"""Continuing a private run of a version whose noise came from other random generators."""

import json

import pytest
import torch

pytest.importorskip("opacus")
pytest.importorskip("transformers")

from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from memsave.config.compose import compose
from memsave.files import checksum
from memsave.resume import resumed_run
from memsave.run import continue_run, execute
from tests.support.tiny_configs import TINY_GPT2_DP

QUICK = ["privacy.accountant=rdp", "privacy.verify=false", "privacy.noise_multiplier=1.0", "profiler.compare=[]"]
QUICK += ["task.generate=1", "task.beams=1", "trainer.evaluate_first=false", "trainer.steps=2"]
QUICK += ["trainer.checkpoint_every=1"]
NEWER = {
    "mechanism": ("sampler", "largest_batch", "noise", "bands"),
    "tensors": ("noise_past", "noise_check", "noise_check_past"),
}
"""What the earlier version did not write."""


def age(folder):
    """Make the last but one checkpoint of a run the last one, in the format of the earlier version."""
    checkpoint = folder / "checkpoint"
    for path in checkpoint.iterdir():
        path.unlink()
    checkpoint.rmdir()
    (folder / "checkpoint.previous").rename(checkpoint)
    (folder / "result.json").unlink()
    tensors = load_file(checkpoint / "optimizer.safetensors")
    for name in NEWER["tensors"]:
        del tensors[f"private/{name}"]
    generator = torch.Generator().get_state()
    save_file(
        {**tensors, "private/noise": generator, "private/sampling": generator.clone()},
        checkpoint / "optimizer.safetensors",
    )
    state = json.loads((checkpoint / "state.json").read_text())
    for name in NEWER["mechanism"]:
        del state["private"]["mechanism"][name]
    state["checksums"] = {name: checksum(checkpoint / name) for name in state["checksums"]}
    (checkpoint / "state.json").write_text(json.dumps(state))
    config = OmegaConf.load(folder / "config.yaml")
    for name in NEWER["mechanism"]:
        del config.privacy[name]
    OmegaConf.save(config, folder / "config.yaml")


@pytest.mark.slow
def test_a_checkpoint_with_other_generators_is_refused_by_its_reason(tmp_path, capfd):
    folder = tmp_path / "run"
    folder.mkdir()
    assert execute(compose([*TINY_GPT2_DP, *QUICK]), folder, experiment="gpt2_dp") == 0
    age(folder)
    before = {path: path.read_bytes() for path in (folder / "checkpoint").iterdir()}
    capfd.readouterr()
    assert continue_run(resumed_run([f"trainer.resume={folder}"])) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("memsave: ")]
    assert said == [
        "memsave: the checkpoint was made by a version of memsave with other random generators, whose noise cannot be "
        "continued; start a new run, or continue with that version"
    ]
    assert {path: path.read_bytes() for path in (folder / "checkpoint").iterdir()} == before

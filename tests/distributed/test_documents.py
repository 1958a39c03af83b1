"""The scripts of docs/distributed.md run in two processes, and what it says about sweeps is what is submitted."""

import re
from pathlib import Path

import pytest
import torch

from memsave.launch import Nodes, nodes_of_job
from tests.support.distributed_models import EXAMPLES, ids_of, make_model
from tests.support.processes import run_processes

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def scripts(sharded, autocast):
    """The parameters after the page's scripts; `init_process_group` finds a group of the test."""
    whole, shard, clipper = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    model = make_model("gpt2").float()
    ids = ids_of(29)
    names = {"model": model, "ids": ids, "labels": ids, "noise": 0.0, "torch": torch}
    names["optimizer"] = torch.optim.AdamW(model.parameters(), lr=1e-3)
    whole = (
        whole.replace("distributed.init_process_group()\n", "")
        .replace("range(50)", "range(2)")
        .replace(", 64,", ", 9,")
    )
    if sharded:
        exec(compile(shard, PAGE, "exec"), names)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        exec(compile(whole, PAGE, "exec"), names)
        names["private"].close()
        exec(compile(clipper, PAGE, "exec"), names)
    names["clipper"].close()
    return torch.cat([(p.full_tensor() if sharded else p).detach().flatten() for p in model.parameters()])


def all_scripts():
    return {(sharded, autocast): scripts(sharded, autocast) for sharded in (False, True) for autocast in (False, True)}


@pytest.mark.slow
def test_the_scripts_of_the_page_train_as_one_process():
    ranks = run_processes(2, all_scripts)
    assert all(torch.equal(ranks[0][key], ranks[1][key]) for key in ranks[0])
    for autocast in (False, True):
        tolerance = 1e-2 if autocast else 1e-5
        torch.testing.assert_close(ranks[0][True, autocast], ranks[0][False, autocast], rtol=0, atol=tolerance)
    start = torch.cat([p.detach().flatten() for p in make_model("gpt2").float().parameters()])
    assert (ranks[0][True, False] - start).abs().max() > 1e-3
    assert EXAMPLES == 9


def test_a_job_of_slurm_finds_its_nodes(monkeypatch):
    pytest.importorskip("submitit")
    assert nodes_of_job() == Nodes()
    slurm = {"SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "1234", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    slurm |= {"SLURM_JOB_NODELIST": "node[07-08]", "SLURM_NODEID": "1", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    nodes = nodes_of_job()
    assert nodes == Nodes(2, "node07", "1234") and nodes.endpoint == "node07:29734"


def test_a_sweep_submits_one_task_per_node(tmp_path):
    """What would be submitted to Slurm; the processes of a node are started by the agent, and not by Slurm."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir
    from submitit.slurm.slurm import SlurmExecutor, _make_sbatch_string

    from memsave.config.compose import load_schemas
    from memsave.config.registry import conf_dir

    command = re.search(r"hydra/launcher=submitit_slurm \\\n(.*)\n", PAGE.read_text())
    overrides = ["experiment=brats_rev", "hydra/launcher=submitit_slurm", *command[1].split()]
    load_schemas()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=overrides, return_hydra_config=True)
    launcher = config.hydra.launcher
    assert launcher._target_ == "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
    asked = {key: launcher[key] for key in ("nodes", "tasks_per_node", "gpus_per_node")}
    given = object.__new__(SlurmExecutor)._convert_parameters(asked)
    text = _make_sbatch_string(command="run", folder=tmp_path, **given)
    assert "#SBATCH --nodes=2" in text and "#SBATCH --ntasks-per-node=1" in text and "--gpus-per-node=8" in text
    assert config.trainer.processes == 16


@pytest.mark.slow
def test_a_run_starts_its_processes_itself(tmp_path):
    from tests.support.commands import TWO_STEPS, run_command

    done = run_command(tmp_path, *TWO_STEPS, "trainer.processes=2", "profiler.compare=[]", "hydra.run.dir=there")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ok after") == 1 and "Traceback" not in done.stderr and "W1" not in done.stderr
    assert '"processes": 2' in (tmp_path / "there" / "result.json").read_text()
    done = run_command(tmp_path, *TWO_STEPS, "trainer.processes=2", "data.cases=0", "hydra.run.dir=other")
    assert done.returncode == 2 and done.stderr.count("memsave: ") == 1, done.stderr

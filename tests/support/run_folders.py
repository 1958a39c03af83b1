"""Folders of runs with the files that accounting reads."""

import json

PRIVACY = {
    "epsilon": 1.5, "no_guarantee": None, "size": 100, "noise_multiplier": 1.0, "max_grad_norm": 0.1, "delta": 1e-4,
    "accountant": "rdp", "expected_batch_size": 10, "sample_rate": 0.1, "steps": 20, "planned_steps": 20,
}  # fmt: skip
SEED = "noise and batches came from a fixed seed (privacy.seed)"


def write_run(folder, *, privacy=None, data="data", status="ok", mode="train", kind="ghost", unit=None):
    """A run that ended; `privacy` changes entries of PRIVACY, and kind="none" is a run without privacy."""
    folder.mkdir(parents=True)
    data_keys = "" if unit is None else f"data:\n  unit: {unit}\n"
    text = f"# request {folder.name}\nmode: {mode}\n{data_keys}privacy:\n  kind: {kind}\n"
    (folder / "config.yaml").write_text(text)
    spent = None if kind == "none" or status == "refused" else {**PRIVACY, "run": str(folder), **(privacy or {})}
    found = {} if status == "refused" else {"examples": 100, "fingerprint": data}
    result = {"status": "failed" if status == "refused" else status, "data": found, "privacy": spent}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_killed_run(folder, *, steps=12, logged=15, data="data", seeded=False, kind="ghost"):
    """A run that was killed after a checkpoint."""
    write_run(folder, kind=kind)
    (folder / "result.json").unlink()
    (folder / "checkpoint").mkdir()
    mechanism = {"size": 100, "batch_size": 10, "noise_multiplier": 1.0, "max_grad_norm": 0.1, "delta": 1e-4}
    private = {"mechanism": {**mechanism, "accountant": "rdp"}, "steps": steps, "seeded": seeded}
    content = {"run": str(folder), "data": data, "private": None if kind == "none" else private}
    (folder / "checkpoint" / "state.json").write_text(json.dumps(content))
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, logged + 1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 99']))
    return folder

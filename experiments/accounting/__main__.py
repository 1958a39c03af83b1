"""Epsilons beside those of other libraries and papers, of the samplers, and when correlated noise helps.

    python -m experiments.accounting

takes about five minutes on one core. `--quick` leaves out the slow rows.
"""

import argparse
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.record import insert, keep, machine
from memsave.privacy import Mechanism, epsilon_of
from memsave.privacy.mechanism import SAMPLERS_OF

HERE = Path(__file__).parent
MNIST = 256 / 60000
PUBLISHED = {  # (noise multiplier, sample rate, steps, delta): (epsilon, by which method, where)
    (0.8, 5e-3, 1000, 1e-6): None,
    (4.0, 0.01, 10_000, 1e-5): (1.26, "moments", "Abadi et al., 2016"),
    (1.12, MNIST, 14_063, 1e-5): (2.92, "RDP", "TensorFlow Privacy, tutorial"),
    (0.6, MNIST, 7_032, 1e-5): (9.74, "RDP", "TensorFlow Privacy, tutorial"),
    (1.2, MNIST, 2_344, 1e-5): (1.20, "RDP", "TensorFlow Privacy, tutorial"),
    (0.6828, 1024 / 42061, 410, 8e-6): None,
    (1.0, 1.0, 1, 1e-5): None,
    (30.0, 1e-3, 100_000, 1e-6): None,
}
SLOW = {(30.0, 1e-3, 100_000, 1e-6), (4.0, 0.01, 10_000, 1e-5)}
SIZE, BATCH, DELTA = 50_000, 500, 1e-6
EPOCHS = (1, 10, 100)
TARGETS = (1.0, 8.0)


def epsilons(*, quick: bool) -> list[dict[str, Any]]:
    """One row per setting: memsave's bounds, those of the libraries called directly, and what was published."""
    rows = []
    for setting, published in PUBLISHED.items():
        if quick and setting in SLOW:
            continue
        noise, rate, steps, delta = setting
        how: dict[str, Any] = {"noise_multiplier": noise, "sample_rate": rate, "steps": steps, "delta": delta}
        rows.append(
            {
                **how,
                **{name: epsilon_of(**how, accountant=name) for name in ("pld", "prv", "rdp")},
                "dp_accounting": _by_dp_accounting(**how),
                "opacus_prv": _by_opacus("prv", **how),
                "opacus_rdp": _by_opacus("rdp", **how),
                "rdp_of_2017": _by_first_conversion(**how),
                "published": published,
            }
        )
        print({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()})
    return rows


def _by_dp_accounting(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """dp-accounting's PLDAccountant with its own grid of 1e-4."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    event = PoissonSampledDpEvent(sample_rate, GaussianDpEvent(noise_multiplier))
    return float(PLDAccountant().compose(event, steps).get_epsilon(delta))


def _by_opacus(name: str, *, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    from opacus.accountants import create_accountant

    accountant = create_accountant(name)
    accountant.history = [(noise_multiplier, sample_rate, steps)]
    return float(accountant.get_epsilon(delta=delta))


def _by_first_conversion(*, noise_multiplier: float, sample_rate: float, steps: int, delta: float) -> float:
    """RDP with the conversion to epsilon that was usual before 2020 (Mironov, 2017, proposition 3)."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = RDPAccountant.DEFAULT_ALPHAS
    rdp = compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=steps, orders=orders)
    return float(min(each - math.log(delta) / (order - 1) for each, order in zip(rdp, orders, strict=True)))


def samplers() -> list[dict[str, Any]]:
    """The noise multiplier of each sampler for the same epsilon."""
    rows = []
    for epochs in EPOCHS:
        steps = epochs * SIZE // BATCH
        for target in TARGETS:
            row: dict[str, Any] = {"epochs": epochs, "epsilon": target}
            for sampler in SAMPLERS_OF["independent"]:
                limit = int(1.2 * BATCH) if sampler == "truncated_poisson" else None
                mechanism = Mechanism(SIZE, BATCH, 1.0, 1.0, delta=DELTA, sampler=sampler, largest_batch=limit)
                row[sampler] = mechanism.calibrated(target, steps=steps).noise_multiplier
            rows.append(row)
            print(row)
    return rows


def errors() -> list[dict[str, Any]]:
    """The error of sums of correlated noise, relative to that of DP-SGD (Poisson) at the same epsilon and steps."""
    rows = []
    for epochs in EPOCHS:
        for steps_of_epoch in (10, 100, 1000):
            steps = epochs * steps_of_epoch
            for target in TARGETS:
                usual = Mechanism(SIZE, SIZE // steps_of_epoch, 1.0, 1.0, delta=DELTA)
                base = usual.calibrated(target, steps=steps).error_of_sums(steps)
                row: dict[str, Any] = {"epochs": epochs, "steps": steps, "epsilon": target}
                for name, change in NOISES.items():
                    if change.get("bands", 1) > steps_of_epoch and change["sampler"] == "cyclic_poisson":
                        row[name] = None
                        continue
                    mechanism = replace(usual, **change)
                    row[name] = mechanism.calibrated(target, steps=steps).error_of_sums(steps) / base
                rows.append(row)
                print(row)
    return rows


NOISES: dict[str, dict[str, Any]] = {
    "independent, cyclic": {"sampler": "cyclic"},
    "regenerated, 4 bands": {"noise": "regenerated", "sampler": "cyclic", "bands": 4},
    "banded, 4 bands": {"noise": "banded", "sampler": "cyclic", "bands": 4},
    "banded, 16 bands": {"noise": "banded", "sampler": "cyclic", "bands": 16},
    "banded, 4 bands, cyclic_poisson": {"noise": "banded", "sampler": "cyclic_poisson", "bands": 4},
    "banded, 16 bands, cyclic_poisson": {"noise": "banded", "sampler": "cyclic_poisson", "bands": 16},
}


def _table_of_epsilons(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| noise | sample rate | steps | delta | memsave pld | dp-accounting | memsave prv | Opacus PRV | "
        "memsave rdp | Opacus RDP | RDP, 2017 | published |",
        f"|{'---|' * 12}",
    ]
    for row in rows:
        epsilon, how, where = row["published"] or ("", "", "")
        published = f"{epsilon} ({how}; {where})" if epsilon else ""
        lines.append(
            f"| {row['noise_multiplier']:g} | {row['sample_rate']:.4g} | {row['steps']} | {row['delta']:g} | "
            f"{_up(row['pld'])} | {row['dp_accounting']:.3f} | {_up(row['prv'])} | "
            f"{row['opacus_prv']:.3f} | {_up(row['rdp'])} | {row['opacus_rdp']:.3f} | "
            f"{row['rdp_of_2017']:.3f} | {published} |"
        )
    return "\n".join(lines)


def _up(value: float) -> str:
    return f"{math.ceil(value * 1000) / 1000:.3f}"


def _table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0])
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for row in rows:
        cells = ("" if each is None else f"{each:.3g}" if isinstance(each, float) else each for each in row.values())
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the fast rows of the first table; nothing is kept")
    quick = parser.parse_args().quick
    results: dict[str, Any] = {"epsilons": epsilons(quick=quick)}
    if quick:
        print(_table_of_epsilons(results["epsilons"]))
        return
    results |= {"samplers": samplers(), "errors": errors()}
    for name, text in (
        ("epsilons", _table_of_epsilons(results["epsilons"])),
        ("samplers", _table(results["samplers"])),
        ("errors", _table(results["errors"])),
    ):
        insert(HERE / "README.md", name=name, text=f"{machine()}:\n\n{text}")
    keep(HERE / "results.json", command="python -m experiments.accounting", results=results)


if __name__ == "__main__":
    main()

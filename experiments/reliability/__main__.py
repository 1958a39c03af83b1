"""Attacks on memsave, and what they found.

    python -m experiments.reliability                                  # all parts
    python -m experiments.reliability --parts kills fuzz               # some of kills, fuzz and mutants
    python -m experiments.reliability --quick                          # a few trials of each part
    python -m experiments.reliability --parts mutants --minutes 30     # at most so long for each part
    python -m experiments.reliability --parts mutants --more           # go on after the mutants of results.json

Every part draws its trials from `--seed`. The exit code is 1 if a trial found a fault or a mutant survived that
`explained.json` does not explain.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from experiments.record import earlier, insert, keep, machine
from experiments.reliability import forks, fuzz, kills, mutants

HERE = Path(__file__).parent
PARTS: dict[str, Any] = {"kills": kills, "fuzz": fuzz, "mutants": mutants}
TRIALS = {"kills": 60, "fuzz": 220, "mutants": 320}
QUICK = {"kills": 6, "fuzz": 24, "mutants": 4}


def main() -> int:
    parser = argparse.ArgumentParser(description="attacks on memsave")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="a few trials of each part; nothing is written")
    parser.add_argument("--minutes", type=float, default=60.0, help="the longest time for each part")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--more", action="store_true", help="more mutants, of unchanged files after the earlier ones")
    options = parser.parse_args()
    if {"kills", "fuzz"} & set(options.parts):
        forks.preload()
    wrong = 0
    for name in options.parts:
        trials = (QUICK if options.quick else TRIALS)[name]
        print(f"{name}: up to {trials} trials with seed {options.seed}", flush=True)
        known = earlier(HERE / "results.json")
        more = {"before": known.get(name, {})} if options.more and name == "mutants" else {}
        with tempfile.TemporaryDirectory(prefix="memsave-") as folder:
            until = time.monotonic() + 60 * options.minutes
            found = PARTS[name].part(Path(folder), seed=options.seed, trials=trials, until=until, **more)
        found |= {"seed": options.seed}
        text = PARTS[name].table(found)
        print(text)
        wrong += len(found["wrong"])
        if not options.quick:
            results = earlier(HERE / "results.json") | {name: found}
            keep(HERE / "results.json", command="python -m experiments.reliability", results=results)
            insert(HERE / "README.md", name=name, text=f"{machine()}, seed {options.seed}:\n\n{text}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

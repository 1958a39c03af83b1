"""Attacks on runs: kills, full disks, power cuts, damaged inputs, strangers' models, and mutants of the code."""

"""Planted breaches of privacy, and what finds each of them."""

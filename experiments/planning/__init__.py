"""How true plans are, and what fits into which budget."""

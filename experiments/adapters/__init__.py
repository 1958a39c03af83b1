"""GhostClipper with the adapters of PEFT over tiny models of transformers."""

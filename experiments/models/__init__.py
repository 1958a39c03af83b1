"""GhostClipper with the model families of transformers, one tiny model per class."""

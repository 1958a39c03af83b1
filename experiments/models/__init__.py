"""GhostClipper on the model families of transformers, one tiny model of each class."""

"""Tasks: what is trained, on which data, with which loss and which scores."""

from memsave.tasks.definition import TaskDefinition, Variation

__all__ = ["TaskDefinition", "Variation"]

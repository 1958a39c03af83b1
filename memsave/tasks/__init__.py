"""Tasks: a definition for each task, and the tasks with their data, losses and scores."""

from memsave.tasks.definition import TaskDefinition, Variation

__all__ = ["TaskDefinition", "Variation"]

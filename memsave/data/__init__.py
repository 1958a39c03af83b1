"""Training data: `volumes` for segmentation, `text` for language models.

Importing this package imports neither MONAI nor nibabel; only the submodules that need them do.
"""

from memsave.data.errors import DataError

__all__ = ["DataError"]

"""Memory, time and losses of stored, checkpoint and reversible."""

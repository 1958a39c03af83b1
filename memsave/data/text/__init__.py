"""Text as training data: records of tables and sentences, token batches, and metrics."""

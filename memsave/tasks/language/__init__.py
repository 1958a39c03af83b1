"""Language tasks and the language models that they fine-tune."""

"""Private fine-tuning of language models."""

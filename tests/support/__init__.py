"""Models, configs and reference implementations that several test files use."""

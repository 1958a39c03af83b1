"""Live bytes, host bytes and time of a step with offloading."""

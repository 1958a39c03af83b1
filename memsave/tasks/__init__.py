"""Tasks: what is trained, on which data, with which loss and which scores."""

"""One folder per claim: its command, its table, its picture, and the JSON that holds the numbers."""

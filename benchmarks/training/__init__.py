"""Training speed and memory beside what else a user could run: `compare` and `headline`, with their results."""

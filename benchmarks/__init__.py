"""One script per claim; each starts a server of its own on a temporary home and prints a table and one JSON line."""

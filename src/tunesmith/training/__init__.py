"""The trainer: reads a run folder and fills it. Knows no HTTP and no database."""

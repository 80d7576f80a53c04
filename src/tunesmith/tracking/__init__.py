"""Trackers: a job's numbers on their way to where people compare runs. Knows no HTTP of ours and no database."""

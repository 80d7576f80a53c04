"""Serving, measured: every number of the page beside this."""

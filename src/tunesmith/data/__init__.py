"""Training data as text: pure functions, no torch, no printing."""

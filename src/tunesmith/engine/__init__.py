"""The engine: token ids in, sampled tokens out. Knows no text."""

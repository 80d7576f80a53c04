"""The forward pass, one for trainer and engine, so that their numbers cannot differ."""

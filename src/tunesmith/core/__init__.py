"""The nouns: each module owns its dataclass, its rules and its SQL. No HTTP, no torch."""

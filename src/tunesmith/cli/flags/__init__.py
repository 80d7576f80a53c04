"""The flags of every command, a module a group. The standard library alone: help must not wait for imports."""

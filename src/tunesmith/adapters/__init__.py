"""Low-rank adapters: their arithmetic and their files."""

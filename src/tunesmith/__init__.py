"""tunesmith: the self-hosted home for fine-tuning."""

__version__ = "0.1.0"

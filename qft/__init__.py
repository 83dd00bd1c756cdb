"""qft: from a laptop fine-tune to a verified model inside an app."""

__version__ = "0.1.0"

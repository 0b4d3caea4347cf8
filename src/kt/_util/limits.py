"""Bounds that the command line and the library share; they need no torch."""

MOST_NOISE = 1e6
"""Standard deviations of the embeddings. Beside more, float32 keeps next to nothing of an embedding."""

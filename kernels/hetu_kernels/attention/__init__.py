"""Attention over packed sequences and over a paged cache of keys and values."""

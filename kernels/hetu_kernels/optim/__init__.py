"""Optimizers: one launch for many tensors."""

"""Mixture-of-experts operators: gating, moving tokens to their experts and back, products per expert."""

"""Row operators: normalization, activations, padding removal, rotary embedding."""

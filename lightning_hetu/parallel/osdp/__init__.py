"""Runs OSDP plans on FSDP2: every operator, or slice of one, replicated or sharded as planned (arXiv 2209.13258).

``split`` cuts an operator into slices that are gathered one after another, ``merged`` lets checkpoints know the whole
tensors only.
"""

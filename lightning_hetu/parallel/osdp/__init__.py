"""Runs OSDP plans on FSDP2: every operator, or slice of one, replicated or sharded as planned (arXiv 2209.13258).

Reading order: ``discover`` finds the operators, ``apply`` wraps each in its mode, ``split`` with ``slices`` cuts one
into slices that are gathered one after another, ``merged`` lets checkpoints know whole tensors only, ``engine`` runs
steps.
"""

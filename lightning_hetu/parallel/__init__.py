"""Runs a plan on torch.distributed's own engines: DeviceMesh, FSDP2, DTensor, pipelining and DCP."""

"""Losses: linear layer and cross entropy in one."""

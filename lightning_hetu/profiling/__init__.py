"""Measures a model and the devices it runs on: the profiles that :mod:`lightning_hetu.planning` plans with."""

from lightning_hetu.profiling.cache import CorruptProfileError, ProfileCache, cluster_key, model_key
from lightning_hetu.profiling.cluster import profile_cluster
from lightning_hetu.profiling.estimate import estimate_model
from lightning_hetu.profiling.memory import MemoryMeter
from lightning_hetu.profiling.model import optimizer_state_bytes, profile_model
from lightning_hetu.profiling.progress import ProgressBar, ProgressCallback
from lightning_hetu.profiling.step import profile_step

__all__ = [
    "CorruptProfileError",
    "MemoryMeter",
    "ProfileCache",
    "ProgressBar",
    "ProgressCallback",
    "cluster_key",
    "estimate_model",
    "model_key",
    "profile_cluster",
    "optimizer_state_bytes",
    "profile_model",
    "profile_step",
]

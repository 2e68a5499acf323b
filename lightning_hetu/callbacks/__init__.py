"""Lightning callbacks."""

from lightning_hetu.callbacks.dts_gate_schedule import DTSGateSchedule
from lightning_hetu.callbacks.loss_curve import LossCurve
from lightning_hetu.callbacks.plan_monitor import PlanMonitor

__all__ = ["DTSGateSchedule", "LossCurve", "PlanMonitor"]

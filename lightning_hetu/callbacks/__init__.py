"""Lightning callbacks."""

from lightning_hetu.callbacks.dts_gate_schedule import DTSGateSchedule
from lightning_hetu.callbacks.flexmoe_placement import FlexMoEPlacement
from lightning_hetu.callbacks.loss_curve import LossCurve
from lightning_hetu.callbacks.plan_monitor import PlanMonitor
from lightning_hetu.callbacks.routing_trace import RoutingTrace

__all__ = ["DTSGateSchedule", "FlexMoEPlacement", "LossCurve", "PlanMonitor", "RoutingTrace"]

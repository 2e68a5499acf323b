"""Gates: which experts a token goes to.

Reading order: ``_output`` is what every gate says, ``_gate`` what all share, ``switch`` the simplest one; then any.
"""

from lightning_hetu.moe.gates._build import build_gate
from lightning_hetu.moe.gates._gate import Gate, RouterGate
from lightning_hetu.moe.gates._output import GateOutput
from lightning_hetu.moe.gates.base import BASEGate
from lightning_hetu.moe.gates.dts import DTSGate
from lightning_hetu.moe.gates.gshard import GShardGate
from lightning_hetu.moe.gates.hash import HashGate
from lightning_hetu.moe.gates.ktop1 import KTop1Gate
from lightning_hetu.moe.gates.sam import SAMGate
from lightning_hetu.moe.gates.switch import SwitchGate
from lightning_hetu.moe.gates.topk import TopKGate

__all__ = [
    "BASEGate",
    "DTSGate",
    "GShardGate",
    "Gate",
    "GateOutput",
    "HashGate",
    "KTop1Gate",
    "RouterGate",
    "SAMGate",
    "SwitchGate",
    "TopKGate",
    "build_gate",
]

"""Which operators of a block can be sharded on their own, and how large they are."""

from __future__ import annotations

import logging
from dataclasses import replace

import torch

from lightning_hetu.parallel.operator_groups import operator_groups
from lightning_hetu.profiling._case import LayerCase

_log = logging.getLogger(__name__)


def with_operators(case: LayerCase) -> LayerCase:
    """The case of a block with its operators; with none where that cannot be found, or it shares parameters."""
    own = {id(parameter) for parameter in case.owned().values()}
    if any(id(parameter) not in own for parameter in case.module.parameters()):
        return case

    def run() -> None:
        with torch.no_grad(), case.autocast():
            case.call(case.prepare(case.batch))

    try:
        found = operator_groups(case.module, run)
    except (ValueError, RuntimeError, TypeError) as error:
        _log.info("%s: its operators are not known: %s", case.name, error)
        return case
    return replace(case, operators=found)

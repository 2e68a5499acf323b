"""Puts an OSDP plan into effect on FSDP2: every unit of a model in its own mode, in place.

``dp`` is torch's ``replicate``, which shares FSDP2's runtime and keeps parameters on the same one-dimensional mesh;
``z2``, ``zdp`` and ``zdp-k`` are ``fully_shard`` with different ``reshard_after_forward``; ``off`` offloads the shard.
The operators of a bucket are one group of several modules.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from lightning_hetu.parallel.build import ModuleRoot
from lightning_hetu.parallel.materialize import materialize, on_meta
from lightning_hetu.parallel.osdp.discover import ROOT, Unit
from lightning_hetu.parallel.osdp.split import split_modules
from lightning_hetu.parallel.shard import sum_gradients
from lightning_hetu.planning.osdp import OSDPPlan
from lightning_hetu.planning.osdp.operator import Cut


def apply_osdp(
    module: nn.Module,
    units: Sequence[Unit],
    plan: OSDPPlan,
    mesh: DeviceMesh,
) -> ModuleRoot:
    """Parallelizes a model in place.

    Gradients are summed over the ranks, so the loss is to be divided by their number.

    Args:
        module: The model, with its parameters on the device of the mesh, or on the meta device: then they are
            initialized by ``reset_parameters``, the same on every rank.
        units: Its units; the plan has an operator of the name of each.
        plan: The plan.
        mesh: One-dimensional mesh of all data-parallel ranks.

    Returns:
        The root of all, through which forward is to be called.

    Raises:
        ValueError: If plan and model do not belong together.
    """
    check_plan(units, plan)
    device = torch.device(mesh.device_type)  # of several GPUs, the current one
    decided = {operator.name: operator for operator in plan.operators}
    members = {unit.name: _parameters_of(module, unit) for unit in units}
    plain: set[nn.Parameter] = set()
    wrapper = ModuleRoot(module)
    buckets: dict[str, list[str]] = {}
    for operator in plan.operators:
        buckets.setdefault(operator.bucket, []).append(operator.name)
    reached: defaultdict[str, set[str]] = defaultdict(set)
    # From the inside out: what is wrapped already is left out by the next one. Units on the meta device get memory only
    # now, one after another, so that never more than one of them is whole.
    for unit in sorted(units, key=lambda unit: -_depth(unit.name)):
        operator, policy = decided[unit.name], precision_policy(unit)
        meta = {parameter for parameter in members[unit.name] if parameter.is_meta}
        if meta:
            new = materialize(module, meta, device)
            # A shared one belongs to another unit too.
            members = {name: {new.get(p, p) for p in whole} for name, whole in members.items()}
            del new
        plain |= {parameter for parameter in members[unit.name] if _is_plain(parameter)}
        together = [unit.name]
        if operator.bucket:
            reached[operator.bucket].add(unit.name)
            together = buckets[operator.bucket]
            if len(reached[operator.bucket]) < len(together):
                continue
        for name in together:
            del members[name]
        ignored = plain.union(*members.values())
        del meta  # what holds on to whole parameters keeps their memory
        if unit.name == ROOT:
            _wrap([wrapper], operator.mode, mesh, policy, ignored)
        elif operator.slices > 1:
            split_modules(module, {unit.name: (operator.slices, cast(Cut, operator.cut))})
            modes = [mode for mode, count in operator.parts for _ in range(count)]
            for part, mode in zip(cast(nn.ModuleList, module.get_submodule(unit.name).slices), modes, strict=True):
                _wrap([part], mode, mesh, policy, ignored)
        else:
            parts = [module.get_submodule(name) for name in together]
            _wrap(parts, operator.mode, mesh, policy, ignored)
            if len(parts) > 1:
                wrapper.register_forward_pre_hook(partial(_forget_unfinished, parts[0]))
    if on_meta(module):
        materialize(module, (), device, rest=True)
    if ROOT not in decided:
        # It has no parameters, but ties the units into one context of FSDP2.
        _wrap([wrapper], "z2", mesh, MixedPrecisionPolicy(), {p for _, p in plain_parameters(module)})
    return wrapper


def check_plan(units: Sequence[Unit], plan: OSDPPlan) -> None:
    """Refuses a plan for another model.

    Raises:
        ValueError: One line that says what does not belong together.
    """
    ours, theirs = {unit.name for unit in units}, {operator.name for operator in plan.operators}
    if ours != theirs:
        name = min(ours ^ theirs)
        where = "the model has it, the plan has not" if name in ours else "the plan has it, the model has not"
        raise ValueError(f"plan.operators: {name!r}: {where}. Plan again for this model.")
    for operator in plan.operators:
        unit = next(unit for unit in units if unit.name == operator.name)
        if unit.name == ROOT and "dp" in operator.mode.split():
            raise ValueError(
                f"plan.operators: mode 'dp' of {ROOT!r}: the unit of the whole model cannot be replicated."
            )
        first = next((other for other in units if other.name == operator.bucket), unit)
        if operator.bucket and (operator.bucket not in ours or first.half != unit.half):
            raise ValueError(
                f"plan.operators: bucket {operator.bucket!r} of {unit.name!r}: they cannot be reduced together."
            )
        if operator.slices > 1 and not unit.leaf:
            raise ValueError(f"plan.operators: {operator.slices} slices of {unit.name!r}: it cannot be cut.")


def check_parameters(module: nn.Module) -> None:
    """Refuses what would be lost when parameters are replaced by their shards.

    Raises:
        ValueError: It names the parameter.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for name, parameter in module.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(
                f"parameter {name!r} has a gradient hook, which its shards would not have: change gradients in"
                " on_before_optimizer_step."
            )
    for name, part in module.named_modules():
        if isinstance(part, nn.RNNBase):  # they keep a list of their own, and renew it
            continue
        for attribute, value in vars(part).items():
            if attribute in ("_parameters", "_modules", "_buffers"):
                continue
            values = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            found = next((item for item in (value, *values) if id(item) in names), None)
            if found is not None:
                raise ValueError(
                    f"attribute {attribute!r} of {name or 'the module'} holds parameter {names[id(found)]!r}, and would"
                    " hold on to it when it is sharded: look it up when it is needed, or use nn.ParameterList."
                )


def reshard(root: nn.Module) -> None:
    """Frees what an evaluation has gathered, so that the parameters of the module are the real ones again."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def plain_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Parameters that FSDP2 refuses, those without a dimension or without an element; every rank keeps them whole."""
    return [(name, parameter) for name, parameter in module.named_parameters() if _is_plain(parameter)]


def _is_plain(parameter: nn.Parameter) -> bool:
    return parameter.ndim == 0 or parameter.numel() == 0


def precision_policy(unit: Unit) -> MixedPrecisionPolicy:
    """In which dtypes a unit is gathered and reduced.

    What autocast converts at every use is gathered converted: the same numbers, and half the bytes. Gradients are
    reduced in the dtype of the parameters.
    """
    if unit.half is None:
        return MixedPrecisionPolicy(cast_forward_inputs=False)
    return MixedPrecisionPolicy(param_dtype=unit.half, reduce_dtype=torch.float32, cast_forward_inputs=False)


def _parameters_of(module: nn.Module, unit: Unit) -> set[nn.Parameter]:
    return {module.get_parameter(name) for name in unit.parameters}


def _depth(name: str) -> int:
    return 0 if name == ROOT else name.count(".") + 1


def _wrap(
    modules: list[nn.Module],
    mode: str,
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    ignored: Collection[nn.Parameter],
) -> None:
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    own = {parameter for module in modules for parameter in module.parameters()}
    options["ignored_params"] = {parameter for parameter in ignored if parameter in own}
    if mode == "dp":
        _replicate(modules, **options)
    else:
        offload: OffloadPolicy = OffloadPolicy()
        if mode == "off":
            offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
        reshard: bool | int = mode != "z2"
        if mode.startswith("zdp-"):
            reshard = int(mode.removeprefix("zdp-"))
        fully_shard(modules, reshard_after_forward=reshard, offload_policy=offload, **options)
    sum_gradients(modules[0])
    modules[0]._hetu_mode = mode  # type: ignore[assignment]


def _replicate(modules: list[nn.Module], **options: Any) -> None:
    # Not public yet; the same in torch 2.11 to 2.13.
    from torch.distributed._composable.replicate_with_fsdp import replicate

    replicate(modules, **options)


def _forget_unfinished(module: nn.Module, *_: Any) -> None:
    """Modules of a bucket that a step without backward left out are not waited for in the next one."""
    # Not public; torch does the same when a backward ends.
    cast(Any, module)._get_fsdp_state()._modules_to_run_forward.clear()


def set_last_micro_step(root: nn.Module, plan: OSDPPlan, *, last: bool) -> None:
    """Sets what the coming backward of an accumulation window does.

    Args:
        root: What :func:`apply_osdp` returned.
        plan: The plan; its ``accumulation`` decides.
        last: Whether the optimizer steps after it.
    """
    if plan.accumulation == "every":
        return
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(last, recurse=False)
            if plan.accumulation == "hold" and getattr(module, "_hetu_mode", "") == "z2":
                # After the last one they must go: the optimizer changes the shards.
                module.set_reshard_after_backward(last, recurse=False)

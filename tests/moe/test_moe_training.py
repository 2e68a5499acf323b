"""Under a Trainer and plain DDP, experts that are spread over ranks train as in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_hetu.moe.gates import Gate
from tests.moe._training import DIM, EXPERTS, Small, data, fit

RANKS = 4
GLOBAL = {"gate": "topk", "gate_options": {"k": 2, "balance_scope": "global", "z_loss": True}}
"""A loss over the tokens of all ranks, so that one process with all tokens has the same."""


def close(found: dict[str, Any], wanted: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert found["losses"] == pytest.approx(wanted["losses"], rel=tolerance)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        torch.testing.assert_close(
            found["weights"][name], weight, rtol=1e-3, atol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def run(rank: int, folder: str, *cases: dict[str, Any]) -> list[Any]:
    return [fit(rank, folder, ranks=RANKS, **case) for case in cases]


def test_ddp_trains_what_one_process_trains(ranks: Any, tmp_path: Path) -> None:
    """Losses of model and gates, two micro-batches per step, clipping; experts over 4 ranks, over 2 x 2, on each."""
    trainer = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1, "max_epochs": 3}
    wanted = fit(0, str(tmp_path), module=GLOBAL, trainer=trainer)
    cases = [{"module": {**GLOBAL, "expert_parallel": size}, "trainer": trainer} for size in (None, 2, 1)]
    for answers in ranks(RANKS).run(run, str(tmp_path), *cases):
        for found in answers:
            close(found, wanted)
            assert found["step"] == wanted["step"] == 6
            assert found["logged"]["moe/active"] == 2.0
            assert found["logged"]["moe/drop_rate"] == 0.0
            assert found["logged"]["moe/load_max_over_mean"] == pytest.approx(
                wanted["logged"]["moe/load_max_over_mean"]
            )
            assert 1.0 <= found["logged"]["moe/balance_ratio"] <= RANKS


def test_checkpoints_go_from_any_number_of_ranks_to_any(ranks: Any, tmp_path: Path) -> None:
    """Written by 4 ranks with experts over 4, read by 2 x 2, by one process, and back; moments included."""
    folder = str(tmp_path)
    whole = fit(0, folder, module=GLOBAL, trainer={"max_epochs": 2})
    half = {"trainer": {"max_epochs": 1}}
    ranks(RANKS).run(run, folder, {"module": GLOBAL, "save": "four.ckpt", **half})
    saved = torch.load(tmp_path / "four.ckpt", weights_only=False)
    assert saved["state_dict"]["layers.0.experts.w1"].shape == (EXPERTS, DIM, 8)
    four = str(tmp_path / "four.ckpt")
    rest = {"trainer": {"max_epochs": 2}, "checkpoint": four}
    close({**fit(0, folder, module=GLOBAL, **rest), "losses": []}, {**whole, "losses": []})
    cases = [{"module": {**GLOBAL, "expert_parallel": size}, **rest} for size in (2, None)]
    for answers in ranks(RANKS).run(run, folder, *cases):
        for found in answers:
            close({**found, "losses": []}, {**whole, "losses": []})
    fit(0, folder, module=GLOBAL, save="one.ckpt", **half)
    back = {"module": GLOBAL, "trainer": {"max_epochs": 2}, "checkpoint": str(tmp_path / "one.ckpt")}
    for answers in ranks(RANKS).run(run, folder, back):
        close({**answers[0], "losses": []}, {**whole, "losses": []})


def test_biases_move_once_per_optimizer_step(ranks: Any, tmp_path: Path) -> None:
    """By the loads of all ranks and micro-batches of the step, and so by the same on every rank as in one process."""
    module = {"gate": "topk", "gate_options": {"bias_balancing": 0.01, "score": "sigmoid"}}
    trainer = {"accumulate_grad_batches": 2, "max_epochs": 2}
    wanted = fit(0, str(tmp_path), module=module, trainer=trainer)
    bias = wanted["weights"]["layers.0.gate.expert_bias"]
    assert bias.abs().max() > 0.005 and bias.sum().abs() < 1e-6
    for answers in ranks(RANKS).run(run, str(tmp_path), {"module": module, "trainer": trainer}):
        assert torch.equal(answers[0]["weights"]["layers.0.gate.expert_bias"], bias)


def planned(rank: int, folder: str) -> list[dict[str, Any]]:
    from lightning_hetu import AutoHybridParallelStrategy, OSDPStrategy

    strategies = [
        OSDPStrategy(memory_limit="1GiB", profile_cache=False),
        AutoHybridParallelStrategy(memory_budget="1GiB", profile_cache=False),
    ]
    trainer = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}
    return [fit(rank, folder, ranks=2, module=GLOBAL, trainer={**trainer, "strategy": s}) for s in strategies]


def test_planned_strategies_train_experts(ranks: Any, tmp_path: Path) -> None:
    """Both look at the model on one rank, where no layer may wait for another; hetu_auto then shares experts out."""
    wanted = fit(0, str(tmp_path), module=GLOBAL, trainer={"accumulate_grad_batches": 2, "gradient_clip_val": 0.1})
    for answers in ranks(2).run(planned, str(tmp_path)):
        for found in answers:
            assert found["losses"] == pytest.approx(wanted["losses"], rel=1e-5) and found["step"] == 2
        assert [found["share"] for found in answers] == [EXPERTS, EXPERTS // 2]


def refused(rank: int, folder: str, strategy: str, size: int) -> str:
    from lightning_hetu import AutoHybridParallelStrategy, OSDPStrategy

    chosen = OSDPStrategy() if strategy == "osdp" else AutoHybridParallelStrategy()
    try:
        fit(rank, folder, ranks=2, module={"expert_parallel": size}, trainer={"strategy": chosen})
    except ValueError as error:
        return str(error)
    return ""


def test_numbers_of_ranks_that_cannot_be_are_refused(ranks: Any, tmp_path: Path) -> None:
    wanted = "expert_parallel=2: OSDPStrategy shards experts as it shards all other parameters; leave it out, or use"
    wanted += " DDPStrategy or hetu_auto."
    assert ranks(2).run(refused, str(tmp_path), "osdp", 2) == [wanted] * 2
    wanted = "expert_parallel=3: expected a divisor of the 2 ranks."
    assert ranks(2).run(refused, str(tmp_path), "auto", 3) == [wanted] * 2


class Skipping(Small):
    """Leaves its second layer out of every other batch."""

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        x, y = batch
        x = torch.tanh(self.into(x))
        for layer in self.layers[: 1 + batch_idx % 2]:
            x = x + layer(x)
        loss = self.moe_loss()
        assert sum(bool(layer.losses) for layer in self.layers) == 1 + batch_idx % 2
        return (self.out(x).squeeze(-1) - y).square().mean() + loss


def test_a_layer_may_be_left_out_of_a_batch(tmp_path: Path) -> None:
    """It has no losses then, and its bias moves by the batches that it saw."""
    torch.manual_seed(0)
    model = Skipping(gate="topk", gate_options={"bias_balancing": 0.01})
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=1, accumulate_grad_batches=2, logger=False, log_every_n_steps=1,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(model, data(0, 1))
    assert trainer.global_step == 2
    assert all(layer.gate.expert_bias.any() for layer in model.layers)


def test_losses_without_a_coefficient_are_named() -> None:
    model = Small(gate="topk", gate_options={"z_loss": True})
    model.moe_coefficients = {"balance": 1.0}
    model(torch.randn(3, DIM))
    with pytest.raises(ValueError, match="moe_coefficients: expected one for 'z'; there are balance"):
        model.moe_loss()
    assert isinstance(model.layers[0].gate, Gate)


class TwoOptimizers(Small):
    """Steps dense parameters and experts by themselves, by hand, and clips."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        dense, experts = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        dense.zero_grad()
        experts.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(dense, 0.1, "norm")
        dense.step()
        experts.step()
        return loss

    def configure_optimizers(self) -> Any:
        inside = {id(parameter) for layer in self.layers for parameter in layer.experts.parameters()}
        both = [[p for p in self.parameters() if (id(p) in inside) is there] for there in (False, True)]
        return [torch.optim.SGD(parameters, lr=0.05) for parameters in both]


def by_hand(rank: int, folder: str, ranks: int) -> list[float]:
    return [float(value) for value in fit(rank, folder, ranks=ranks, module=GLOBAL, kind=TwoOptimizers)["losses"]]


def test_several_optimizers_complete_their_gradients_once(ranks: Any, tmp_path: Path) -> None:
    wanted = by_hand(0, str(tmp_path), 1)
    for found in ranks(2).run(by_hand, str(tmp_path), 2):
        assert found == pytest.approx(wanted, rel=1e-5)


class Forgetful(Small):
    """Overrides a hook of the mixin and leaves out what it does."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        pass


def forgets(rank: int, folder: str) -> str:
    try:
        fit(rank, folder, ranks=2, module=GLOBAL, kind=Forgetful)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_hook_without_super_is_noticed(ranks: Any, tmp_path: Path) -> None:
    for message in ranks(2).run(forgets, str(tmp_path)):
        assert message.startswith("Forgetful.on_before_optimizer_step does not call super()")


def other_strategy(rank: int, folder: str) -> str:
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    try:
        fit(rank, folder, ranks=2, module=GLOBAL, trainer={"strategy": strategy})
    except ValueError as error:
        return str(error)
    return ""


def test_strategies_that_know_nothing_of_experts_are_refused(ranks: Any, tmp_path: Path) -> None:
    for message in ranks(2).run(other_strategy, str(tmp_path)):
        assert message.startswith("expert_parallel=None: experts cannot be shared out under ModelParallelStrategy;")

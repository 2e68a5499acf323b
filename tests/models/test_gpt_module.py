"""The GPT LightningModule trains, logs what it promises, and steps its learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lightning_hetu.data import TextDataModule
from lightning_hetu.models import GPTLightningModule
from lightning_hetu.models.optimization import learning_rate_factor

SIZES: dict[str, Any] = {"max_seq_len": 16, "num_layers": 1, "num_heads": 2, "dim": 16}


def make_trainer(folder: Path, **options: Any) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture
def datamodule(tmp_path: Path) -> TextDataModule:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 200)
    return TextDataModule(
        path=str(text), seq_len=16, batch_size=8, val_batches=2, val_fraction=0.2, cache_dir=str(tmp_path / "cache")
    )


def test_fit_learns_and_logs_the_losses_per_character(tmp_path: Path, datamodule: TextDataModule) -> None:
    module = GPTLightningModule(vocab_size=datamodule.vocab_size, learning_rate=1e-2, warmup_steps=5, **SIZES)
    trainer = make_trainer(tmp_path, max_steps=150, val_check_interval=50, check_val_every_n_epoch=None)
    trainer.fit(module, datamodule=datamodule)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert metrics["val_loss_per_character"] == pytest.approx(metrics["val_loss"])
    assert metrics["bigram_loss_per_character"] == pytest.approx(datamodule.bigram_loss_per_character, rel=1e-5)
    assert metrics["val_loss_per_character"] < metrics["bigram_loss_per_character"]
    assert metrics["train_loss"] < 2.0

    (test_metrics,) = trainer.test(module, datamodule=datamodule, verbose=False)
    assert test_metrics["test_loss"] == pytest.approx(metrics["val_loss"], rel=0.2)
    predictions = torch.cat(trainer.predict(module, datamodule=datamodule))
    assert predictions.shape == (len(datamodule.test_dataset), 16)
    assert -predictions.mean().item() == pytest.approx(test_metrics["test_loss"], rel=0.05)


def test_pipeline_loss_is_float32_mean_cross_entropy() -> None:
    module = GPTLightningModule(vocab_size=8, **SIZES)
    logits, target = torch.randn(2, 3, 8), torch.randint(8, (2, 3))
    expected = -logits.log_softmax(-1).gather(-1, target[..., None]).mean()
    torch.testing.assert_close(module.pipeline_loss(logits, target), expected)
    assert module.pipeline_loss(logits.bfloat16(), target).dtype == torch.float32


def test_forward_and_pipeline_parts_are_the_model() -> None:
    module = GPTLightningModule(vocab_size=8, **SIZES)
    tokens, _ = module.example_batch(2)
    torch.testing.assert_close(module(tokens), module.model(tokens))
    embedding, blocks, head = module.pipeline_modules()
    assert (embedding, blocks, head) == (module.model.embedding, list(module.model.blocks), module.model.head)


def test_example_batch_is_a_full_context_and_repeatable() -> None:
    module = GPTLightningModule(vocab_size=8, **SIZES)
    (tokens, targets), (again, _) = module.example_batch(3), module.example_batch(3)
    assert tokens.shape == targets.shape == (3, 16)
    assert tokens.dtype == targets.dtype == torch.int64
    assert torch.equal(tokens, again)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])


def test_norm_gains_are_not_decayed_and_every_stage_has_the_same_groups() -> None:
    module = GPTLightningModule(vocab_size=8, weight_decay=0.3, **SIZES)
    groups = module.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert {parameter.ndim for parameter in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(module.parameters()))
    del module.model.blocks, module.model.head  # a stage that holds the embedding alone has no norm
    assert [len(group["params"]) for group in module.configure_optimizers()["optimizer"].param_groups] == [2, 0]


def test_the_cosine_ends_with_the_trainer(tmp_path: Path, datamodule: TextDataModule) -> None:
    module = GPTLightningModule(vocab_size=datamodule.vocab_size, warmup_steps=2, min_lr_ratio=0.25, **SIZES)
    trainer = make_trainer(tmp_path, max_steps=6, limit_val_batches=0)
    trainer.fit(module, datamodule=datamodule)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.25 * module.learning_rate)


def test_learning_rate_factor() -> None:
    shape = {"warmup_steps": 3, "total_steps": 13, "min_ratio": 0.1}
    assert [learning_rate_factor(step, **shape) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert learning_rate_factor(8, **shape) == pytest.approx(0.55)
    assert learning_rate_factor(13, **shape) == learning_rate_factor(99, **shape) == pytest.approx(0.1)
    assert learning_rate_factor(99, warmup_steps=3, total_steps=None, min_ratio=0.1) == 1.0


@pytest.mark.parametrize(("schedule", "total"), [("constant", 10), ("cosine", None)])
def test_the_rate_is_held_without_a_known_end(schedule: Any, total: int | None) -> None:
    module = GPTLightningModule(vocab_size=8, lr_schedule=schedule, total_steps=total, warmup_steps=0, **SIZES)
    scheduler = module.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert scheduler.lr_lambdas[0](10_000) == 1.0


def test_hyperparameters_are_plain_values() -> None:
    module = GPTLightningModule(vocab_size=8, **SIZES)
    assert module.hparams["dim"] == 16
    assert all(isinstance(value, int | float | str | tuple | None) for value in module.hparams.values())
    assert math.isclose(GPTLightningModule(**module.hparams).learning_rate, module.learning_rate)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"lr_schedule": "linear"}, "lr_schedule='linear'"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"total_steps": 0}, "total_steps=0"),
        ({"num_heads": 3}, "num_heads=3"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        GPTLightningModule(vocab_size=8, **{**SIZES, **change})


@pytest.mark.parametrize(
    ("change", "words"),
    [({"vocab_size": 8}, "vocab_size=8 of the model: the datamodule has"), ({"max_seq_len": 15}, "max_seq_len=15")],
)
def test_data_that_does_not_fit_the_model_is_refused(
    tmp_path: Path, datamodule: TextDataModule, change: dict[str, int], words: str
) -> None:
    module = GPTLightningModule(**{"vocab_size": 32, **SIZES, **change})
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, max_steps=1).fit(module, datamodule=datamodule)

"""The text datamodule: deterministic batches from the user's files, cached, with errors that name the argument."""

from __future__ import annotations

import logging
import os
import string
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lightning_hetu.data import TextDataModule, bigram_loss
from lightning_hetu.data.corpus import find_files, read_corpus
from lightning_hetu.data.tokenizer import CharTokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two text files in a folder, one of them below it."""
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    (folder / "b.txt").write_text(string.ascii_lowercase * 20)
    (folder / "below" / "a.txt").write_text("naïve café\n" * 40)
    (folder / ".hidden").write_bytes(b"\0\0")
    return folder


def make(folder: Path, **options: Any) -> TextDataModule:
    defaults: dict[str, Any] = {"seq_len": 8, "batch_size": 4, "val_batches": 2, "val_fraction": 0.25}
    return TextDataModule(path=str(folder), cache_dir=str(folder.parent / "cache"), **{**defaults, **options})


def attach(datamodule: TextDataModule, num_replicas: int, rank: int) -> TextDataModule:
    kwargs = {"num_replicas": num_replicas, "rank": rank}
    datamodule.trainer = SimpleNamespace(distributed_sampler_kwargs=kwargs)  # type: ignore[assignment]
    return datamodule


def test_default_corpus_is_the_standard_library_without_its_tests() -> None:
    files = find_files(None)
    assert any(file.name == "argparse.py" for file in files)
    assert not any(set(file.parts) & {"site-packages", "encodings"} for file in files)
    texts = read_corpus(None, 100_000)
    assert texts == read_corpus(None, 100_000)
    assert 99_990 < sum(len(text.encode()) for text in texts) <= 100_000


def test_file_folder_and_glob(folder: Path) -> None:
    assert len(read_corpus(str(folder / "b.txt"), None)) == 1
    assert read_corpus(str(folder), None) == [string.ascii_lowercase * 20, "naïve café\n" * 40]
    assert len(read_corpus(str(folder / "**" / "a.*"), None)) == 1


def test_max_bytes_cuts_between_characters(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("é" * 10)
    assert read_corpus(str(tmp_path), 5) == ["éé"]


def test_batches_are_windows_with_shifted_targets(folder: Path) -> None:
    datamodule = make(folder)
    for tokens, targets in (*datamodule.train_dataloader(), *datamodule.val_dataloader()):
        assert tokens.shape == targets.shape == (4, 8)
        assert tokens.dtype == targets.dtype == torch.int64
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        assert int(tokens.max()) < datamodule.vocab_size


def test_the_end_of_each_file_is_held_out(folder: Path) -> None:
    datamodule = make(folder)
    decode = datamodule.tokenizer.decode
    first, second = read_corpus(str(folder), None)
    assert decode(datamodule.text.train_tokens.tolist()) == first[:390] + second[:330]
    assert decode(datamodule.text.val_tokens.tolist()) == first[390:] + second[330:]


def test_vocabulary_is_rounded_up_and_characters_are_counted(folder: Path) -> None:
    datamodule = make(folder)
    assert datamodule.text.num_tokens == len(set(string.ascii_lowercase + "naïve café\n")) + 1
    assert datamodule.vocab_size == 32
    assert datamodule.characters_per_token == 1.0


def test_validation_has_a_fixed_number_of_batches(folder: Path) -> None:
    assert len(make(folder, val_batches=50).val_dataloader()) == 50


def test_bigram_baseline_is_computed_on_the_validation_windows(folder: Path) -> None:
    datamodule = make(folder)
    pairs = [(x, y) for tokens, targets in datamodule.val_dataloader() for x, y in zip(tokens, targets, strict=True)]
    rows = np.stack([np.append(x.numpy(), y[-1].item()) for x, y in pairs])
    expected = bigram_loss(datamodule.text.train_tokens, rows, datamodule.text.num_tokens)
    assert datamodule.bigram_loss_per_character == pytest.approx(expected)


def test_order_depends_on_seed_and_epoch_only(folder: Path) -> None:
    def epoch(number: int, **options: Any) -> torch.Tensor:
        loader = make(folder, **options).train_dataloader()
        loader.sampler.set_epoch(number)  # type: ignore[attr-defined]
        return torch.cat([tokens for tokens, _ in loader])

    torch.manual_seed(1)
    first = epoch(0)
    torch.manual_seed(2)
    assert torch.equal(first, epoch(0))
    assert not torch.equal(first, epoch(1))
    assert not torch.equal(first, epoch(0, seed=5))


@pytest.mark.parametrize("split", ["train", "val"])
def test_global_batches_do_not_depend_on_the_number_of_devices(folder: Path, split: str) -> None:
    def batches(datamodule: TextDataModule) -> list[torch.Tensor]:
        loader = datamodule.train_dataloader() if split == "train" else datamodule.val_dataloader()
        return [tokens for tokens, _ in loader]

    whole = batches(make(folder))
    shares = [batches(attach(make(folder), 2, rank)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(whole) > 1
    for batch, left, right in zip(whole, *shares, strict=True):
        assert torch.equal(batch, torch.stack([left, right], dim=1).flatten(0, 1))


def test_a_batch_that_devices_cannot_share_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="batch_size=4 is the global batch size, and 3 data-parallel"):
        attach(make(folder), 3, 0).train_dataloader()


def test_tokens_are_cached_by_content_and_options(folder: Path) -> None:
    cache = folder.parent / "cache"
    make(folder).prepare_data()
    (file,) = cache.iterdir()
    written = file.stat().st_mtime_ns
    make(folder, batch_size=2, seed=3).prepare_data()
    assert file.stat().st_mtime_ns == written
    make(folder, val_fraction=0.5).prepare_data()
    assert len(list(cache.iterdir())) == 2
    (folder / "b.txt").write_text("other" * 100)
    make(folder).prepare_data()
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped"])
def test_a_damaged_cache_is_rebuilt_with_a_warning(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = make(folder).text
    (file,) = (folder.parent / "cache").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[len(content) // 3] ^= 0xFF
    file.write_bytes({"truncated": content[:100], "garbage": b"not a cache", "flipped": content}[damage])
    with caplog.at_level(logging.WARNING):
        rebuilt = make(folder).text
    assert "built again" in caplog.text
    assert np.array_equal(rebuilt.train_tokens, expected.train_tokens)
    caplog.clear()
    assert np.array_equal(make(folder).text.train_tokens, expected.train_tokens)
    assert not caplog.text


def test_no_temporary_file_stays_when_writing_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make(folder).prepare_data()
    assert list((folder.parent / "cache").iterdir()) == []


def test_char_tokenizer_round_trip_and_unknown_characters() -> None:
    tokenizer = CharTokenizer.train(["aé", "b\U0001f600"], 100)
    tokens = tokenizer.encode("b\U0001f600aé")
    assert tokenizer.decode(tokens.tolist()) == "b\U0001f600aé"
    assert tokenizer.encode("a?\U0001f601").tolist()[1:] == [0, 0]
    assert CharTokenizer(tokenizer.to_text()).encode("éa").tolist() == tokenizer.encode("éa").tolist()
    assert tokenizer.decode([0, 99]) == "\N{REPLACEMENT CHARACTER}" * 2


def test_char_tokenizer_keeps_the_most_frequent_characters(folder: Path) -> None:
    assert CharTokenizer.train(["abbccc", "dddd"], 3).alphabet == "cd"
    datamodule = make(folder, max_vocab_size=16)
    assert datamodule.vocab_size == datamodule.text.num_tokens == 16
    assert int(datamodule.text.val_tokens.max()) == 15
    assert (datamodule.text.val_tokens == 0).any()


def test_bpe_round_trip(folder: Path) -> None:
    pytest.importorskip("tokenizers", reason="extra 'text' is not installed")
    datamodule = make(folder, tokenizer="bpe", max_vocab_size=300)
    assert 256 < datamodule.text.num_tokens <= 300
    assert datamodule.vocab_size % 8 == 0
    first, second = read_corpus(str(folder), None)
    held_out = first[390:] + second[330:]
    assert datamodule.tokenizer.decode(datamodule.text.val_tokens.tolist()) == held_out
    assert datamodule.characters_per_token == pytest.approx(len(held_out) / len(datamodule.text.val_tokens))
    assert datamodule.characters_per_token > 1.5


def test_missing_tokenizers_package_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning-hetu\[text\]"):
        make(folder, tokenizer="bpe").prepare_data()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tokenizer": "word"}, "tokenizer='word': expected 'char' or 'bpe'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seq_len": 0}, "seq_len=0"),
        ({"stride": 0}, "stride=0"),
        ({"max_bytes": 0}, "max_bytes=0"),
        ({"val_batches": 0}, "val_batches=0"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"tokenizer": "bpe", "max_vocab_size": 256}, "max_vocab_size=256: tokenizer='bpe' needs at least 257"),
        ({"max_vocab_size": 1}, "max_vocab_size=1"),
    ],
)
def test_bad_arguments_are_named_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TextDataModule(**options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 400}, "seq_len=400: the held-out text has 240 tokens"),
        ({"batch_size": 500}, "batch_size=500: the training text of 720 tokens has only 89 samples"),
    ],
)
def test_a_text_too_short_is_refused_in_setup(folder: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(folder, **options).setup("validate" if "seq_len" in options else "fit")


def test_paths_that_hold_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").touch()
    (tmp_path / "zeros.bin").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1") + b" text")
    with pytest.raises(FileNotFoundError, match="the folder contains no files"):
        read_corpus(str(tmp_path / "empty"), None)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        read_corpus(str(tmp_path / "nowhere"), None)
    with pytest.raises(ValueError, match="contain no text"):
        read_corpus(str(tmp_path / "blank.txt"), None)
    with pytest.raises(ValueError, match=r"zeros\.bin contains zero bytes"):
        read_corpus(str(tmp_path / "zeros.bin"), None)
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text"):
        read_corpus(str(tmp_path / "latin.txt"), None)

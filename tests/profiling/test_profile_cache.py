"""The cache finds what was measured, never anything else, and refuses damaged files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

from lightning_hetu.models.gpt_module import GPTLightningModule
from lightning_hetu.parallel.structure import find_structure
from lightning_hetu.planning.cluster import ClusterSpec
from lightning_hetu.planning.profile import LayerProfile, ModelProfile
from lightning_hetu.profiling import CorruptProfileError, ProfileCache, cluster_key, model_key
from lightning_hetu.profiling.cache import CACHE_VERSION

PROFILE = ModelProfile(
    layer_types=(LayerProfile("block", 100, forward_time=((1, 0.1), (2, 1 / 3)), activation_bytes={1: 5.0, 2: 3.0}),),
    layers=(0, 0),
    embedding=LayerProfile("embedding", 10),
    head=LayerProfile("head", 10),
)


def never() -> ModelProfile:
    raise AssertionError("measured although it was stored")


def key_of(batch: int = 2, precision: str = "32-true", max_tp: int = 1, repeats: int = 1, **options: int) -> str:
    module = GPTLightningModule(32, **{"max_seq_len": 8, "num_layers": 2, "dim": 16, **options})
    return model_key(
        module,
        find_structure(module),
        module.example_batch(batch),
        precision=precision,
        device="cpu",
        max_tp=max_tp,
        repeats=repeats,
    )


def test_what_was_stored_comes_back(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path / "new" / "folder")
    assert cache.model("a", lambda: PROFILE) == PROFILE
    assert cache.model("a", never) == PROFILE
    other = ClusterSpec.from_bandwidth(4, gigabytes_per_second=1.0)
    assert cache.cluster("a", lambda: other) == cache.cluster("a", lambda: other) == other
    assert sorted(file.name for file in cache.folder.iterdir()) == ["cluster-a.json", "model-a.json"]


def test_key_changes_with_everything_that_was_measured() -> None:
    keys = [
        key_of(),
        key_of(batch=3),
        key_of(precision="bf16-mixed"),
        key_of(max_tp=2),
        key_of(repeats=2),
        key_of(dim=32),
        key_of(num_heads=2),  # same parameters, other computation
        key_of(num_layers=3),
    ]
    assert len(set(keys)) == len(keys)
    assert key_of() == keys[0]
    module = GPTLightningModule(32, max_seq_len=8, num_layers=2, dim=16)
    structure = find_structure(module)
    module.model.embedding.requires_grad_(False)
    options = {"precision": "32-true", "device": "cpu", "max_tp": 1, "repeats": 1}
    frozen = model_key(module, structure, module.example_batch(2), **options)
    module.requires_grad_(True)
    assert model_key(module, structure, module.example_batch(2), **options) == keys[0] != frozen
    module.model.blocks[0].tensor_parallel_plan = {}
    assert model_key(module, structure, module.example_batch(2), **options) != keys[0]


def test_key_changes_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cluster = key_of(), cluster_key("cpu")
    assert cluster != cluster_key("cpu", sizes=[1])
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert key_of() != model and cluster_key("cpu") != cluster


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[:-20], "it is not JSON"),
        (lambda text: "", "it is not JSON"),
        (lambda text: "[]", "it is not of version"),
        (lambda text: text.replace(f'"version": {CACHE_VERSION}', '"version": 0', 1), "it is not of version"),
        (lambda text: text.replace("0.1", "0.2", 1), "checksum"),
        (lambda text: json.dumps({**json.loads(text), "profile": None}), "checksum"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: object, reason: str) -> None:
    cache = ProfileCache(tmp_path)
    cache.model("a", lambda: PROFILE)
    path = cache.path("model", "a")
    path.write_text(damage(path.read_text()))
    with pytest.raises(CorruptProfileError, match=reason) as caught:
        cache.model("a", never)
    message = str(caught.value)
    assert str(path) in message and "Delete it, or set profile_cache" in message and "\n" not in message


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path)
    cache.path("model", "a").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CorruptProfileError, match="it is not text"):
        cache.model("a", never)


def test_where_nothing_can_be_written_the_profile_is_used_anyway(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    with pytest.warns(UserWarning, match="profile_cache: .*the next run will profile again"):
        assert ProfileCache(blocked / "folder").model("a", lambda: PROFILE) == PROFILE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ProfileCache(tmp_path).model("a", lambda: PROFILE) == PROFILE


def test_option_and_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGHTNING_HETU_CACHE", str(tmp_path))
    assert ProfileCache.from_option(None) is None and ProfileCache.from_option(False) is None
    default = ProfileCache.from_option(True)
    assert default is not None and default.folder == tmp_path
    chosen = ProfileCache.from_option(tmp_path / "x")
    assert chosen is not None and chosen.folder == tmp_path / "x"
    assert ProfileCache.from_option(chosen) is chosen
    monkeypatch.delenv("LIGHTNING_HETU_CACHE")
    assert ProfileCache().folder == Path.home() / ".cache" / "lightning_hetu"

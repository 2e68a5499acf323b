"""Checkpoint folders: complete or not there, checked before they are read, independent of the plan."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_hetu.parallel import checkpoint as ckpt
from lightning_hetu.parallel import checkpoint_files as files
from lightning_hetu.parallel.consolidate import consolidate
from lightning_hetu.parallel.optimizers import parameter_groups
from lightning_hetu.planning.plan import HybridPlan
from tests.parallel.test_executor import build, full, plan_of

WIDE = plan_of("dp2-zero3 dp2 tp2 dp2-zero2 dp2-zero3 tp2 dp2 tp2", 4, (3, 3), 2)
FLAT = plan_of("dp4-zero3 dp4 tp4 dp4-zero2 dp2-tp2-zero3 dp4 dp4 dp2-tp2", 4, (6,), 2)


def save(rank: int, plan: HybridPlan, folder: str, seed: int = 0) -> dict[str, Any]:
    model, _ = build(plan, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters())
    state = {"state_dict": ckpt.model_state(model), "optimizer_0": ckpt.optimizer_state(model, optimizer)}
    ckpt.save_folder(state, {"epoch": 3}, plan.to_json(), Path(folder))
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def load(rank: int, plan: HybridPlan, folder: str) -> Any:
    model, _ = build(plan, seed=7)
    try:
        ckpt.load_folder(model, [torch.optim.AdamW(model.parameters())], Path(folder))
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return {name: full(parameter) for name, parameter in model.named_parameters()}


def save_without_space(rank: int, plan: HybridPlan, folder: str) -> str:
    """As on a full disk: the system refuses to write more than 20 kB into a file."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        save(rank, plan, folder, seed=1)
    except OSError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    return "saved"


@pytest.fixture(scope="module")
def saved(ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("saved") / "model.ckpt"
    weights: dict[str, Any] = {}
    for part in ranks(4).run(save, WIDE, str(folder)):
        weights |= part
    return folder, weights


def test_any_plan_reads_it(ranks: Any, saved: tuple[Path, dict[str, Any]]) -> None:
    """Weights come back to the bit under another plan."""
    folder, weights = saved
    for loaded in ranks(4).run(load, FLAT, str(folder)):
        assert set(loaded) == set(weights)
        assert all(torch.equal(loaded[name], weights[name]) for name in loaded)


def test_full_disk_leaves_the_earlier_checkpoint(ranks: Any, saved: tuple[Path, dict[str, Any]]) -> None:
    """A checkpoint that cannot be written is an error on every rank; the one before it stays and can be read."""
    folder, weights = saved
    for message in ranks(4).run(save_without_space, WIDE, str(folder)):
        assert "could not be written" in message and "Earlier checkpoints are untouched" in message
        assert "\n" not in message
    assert not list(folder.parent.glob("*.partial"))
    for loaded in ranks(4).run(load, FLAT, str(folder)):
        assert all(torch.equal(loaded[name], weights[name]) for name in loaded)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: cut(next(folder.glob("__2_*.distcp"))), ["DamagedCheckpointError", "__2_0.distcp", "expected"]),
        (lambda folder: next(folder.glob("__1_*.distcp")).unlink(), ["DamagedCheckpointError", "has 0 bytes"]),
        (lambda folder: cut(folder / ".metadata"), ["DamagedCheckpointError", ".metadata"]),
        (lambda folder: (folder / "meta.pt").unlink(), ["DamagedCheckpointError", "meta.pt"]),
        (shutil.rmtree, ["FileNotFoundError", "does not exist"]),
    ],
    ids=["cut-shard", "missing-shard", "cut-index", "missing-metadata", "no-folder"],
)
def test_damage_is_named(
    ranks: Any, saved: tuple[Path, dict[str, Any]], tmp_path: Path, damage: Any, words: list[str]
) -> None:
    """What is missing or cut short is named in one line, on every rank, before anything is loaded."""
    folder = tmp_path / "damaged.ckpt"
    shutil.copytree(saved[0], folder)
    damage(folder)
    for message in ranks(4).run(load, WIDE, str(folder)):
        assert isinstance(message, str) and "\n" not in message
        assert all(word in message for word in words), message


def test_files_that_are_no_checkpoint(saved: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Garbage, other people's files and objects are each one line that says what to do."""
    folder = tmp_path / "garbage.ckpt"
    shutil.copytree(saved[0], folder)
    (folder / "meta.pt").write_bytes(b"\x80\x02not a checkpoint")
    with pytest.raises(files.DamagedCheckpointError, match=r"meta.pt.*cannot be read"):
        files.load_metadata(folder)
    (folder / "meta.pt").write_bytes((saved[0] / "meta.pt").read_bytes()[:-30])
    with pytest.raises(files.DamagedCheckpointError, match=r"meta.pt.*cannot be read"):
        consolidate(folder, tmp_path / "one.ckpt")
    torch.save([1, 2], folder / "meta.pt")
    with pytest.raises(files.DamagedCheckpointError, match="holds a list"):
        files.load_metadata(folder)
    torch.save({"callback": Path().stat()}, tmp_path / "objects.ckpt")
    with pytest.raises(ValueError, match="weights_only=False") as error:
        files.load_file(tmp_path / "objects.ckpt", weights_only=True)
    assert "\n" not in str(error.value)
    for content, found in (({"weights": 1}, "keys weights"), ([1], "no mapping"), ({"state_dict": 3}, "state_dict")):
        with pytest.raises(ValueError, match=f"has no 'state_dict' .*{found}"):
            files.check_content(content, Path("file.ckpt"))


def load_a_smaller_model(rank: int, plan: HybridPlan, folder: str) -> str:
    model, _ = build(plan, seed=7)
    model.model.head = None  # on the ranks that have it
    try:
        ckpt.load_folder(model, [], Path(folder))
    except ValueError as error:
        return str(error)
    return ""


def test_entries_of_no_rank_are_refused(ranks: Any, saved: tuple[Path, dict[str, Any]]) -> None:
    """A checkpoint with more in it than the model has names the first such entry; other stages' entries are none."""
    for message in ranks(4).run(load_a_smaller_model, WIDE, str(saved[0])):
        assert "'model.head." in message and "not in this model" in message


def load_into_another_model(rank: int, folder: str) -> str:
    class Renamed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.other = torch.nn.Linear(2, 2)

    try:
        ckpt.load_folder(Renamed(), [], Path(folder))
    except ValueError as error:
        return str(error)
    return ""


def test_another_model_is_refused(ranks: Any, saved: tuple[Path, dict[str, Any]]) -> None:
    """A checkpoint of another model names the first entry that is missing."""
    for message in ranks(4).run(load_into_another_model, str(saved[0])):
        assert "'other.bias'" in message and "another model" in message


def test_consolidated_file_has_plain_tensors_under_plain_names(
    saved: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The file holds whole tensors, loads with ``weights_only=True``, and is not written twice."""
    file = consolidate(saved[0], tmp_path / "deep" / "one.ckpt")
    content = torch.load(file, weights_only=True)
    assert content["epoch"] == 3
    assert all(torch.equal(content["state_dict"][name], weight) for name, weight in saved[1].items())
    assert {path.name for path in file.parent.iterdir()} == {"one.ckpt"}
    with pytest.raises(FileExistsError, match="exists already"):
        consolidate(saved[0], file)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        consolidate(tmp_path / "nothing", tmp_path / "two.ckpt")


def name_groups(rank: int, adds: list[bool]) -> Any:
    """Names of the groups of a model with one layer per rank, before and after some ranks add a group."""
    stage = torch.nn.ModuleDict({f"layer{rank}": torch.nn.Linear(2, 2)})
    layer = stage[f"layer{rank}"]
    optimizer = torch.optim.SGD([{"params": [layer.weight]}])
    known = [[["layer1.weight", "layer0.weight"]]]
    names = [f"layer{index}.{kind}" for index in range(2) for kind in ("weight", "bias")]
    before = parameter_groups(stage, [optimizer], names, known)
    if adds[rank]:
        optimizer.add_param_group({"params": [layer.bias]})
    try:
        return before, parameter_groups(stage, [optimizer], names, known)
    except ValueError as error:
        return before, str(error)


def test_a_group_that_is_added_later_leaves_the_others_known(ranks: Any) -> None:
    """Groups that were there keep the order of the optimizer; the new one has that of the model; all stages need it."""
    first, added = ["layer1.weight", "layer0.weight"], ["layer0.bias", "layer1.bias"]
    for before, after in ranks(2).run(name_groups, [True, True]):
        assert before == [[first]] and after == [[first, added]]
    for _, message in ranks(2).run(name_groups, [False, True]):
        assert "(1,) or (2,) parameter groups" in message and "in every stage" in message

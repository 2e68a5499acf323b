"""A worker's cache: event for event as ``replay``, by the slow rules for batches, and exact without staleness."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_hetu.embedding import (
    SGD,
    Adagrad,
    Adam,
    CacheRules,
    Push,
    RowCache,
    RowOptimizer,
    RowOwner,
    RowwiseAdagrad,
    RowwiseAdam,
    TensorRowStore,
    replay,
)
from lightning_hetu.embedding.slot_index import SlotIndex, mix64
from tests.embedding._het_reference import Driver, SlowIndex, random_events

POLICIES = [("lru", None), ("lfu", None), ("lfu", 3), ("lfuopt", None), ("lfuopt", 7)]


def random_batches(seed: int, steps: int, num_rows: int, most: int) -> list[Tensor]:
    """Batches of distinct rows of any size, none included, smaller ids more often."""
    generator = torch.Generator().manual_seed(seed)
    chances = 1 / torch.arange(1, num_rows + 1).double()
    sizes = torch.randint(0, most + 1, (steps,), generator=generator).tolist()
    return [
        torch.multinomial(chances, size, generator=generator).sort()[0] if size else torch.empty(0, dtype=torch.int64)
        for size in sizes
    ]


def read(cache: RowCache, owner: RowOwner, ids: Tensor, **options: Any) -> Tensor:
    """One complete read by the only worker."""
    plan = cache.begin_read(ids, **options)
    stale = owner.stale(ids, plan.versions)
    owner.apply(cache.push_stale(plan, stale))
    return cache.finish_read(plan, stale, *owner.fetch(ids[stale])).values


def setting(
    capacity: int = 4, *, rows: int = 16, dim: int = 2, rules: CacheRules | None = None, **options: Any
) -> tuple[RowCache, RowOwner]:
    rules = rules or CacheRules(10)
    cache = RowCache(capacity, dim, rules, ways=max(1, capacity), **options)
    initial = torch.randn(rows, cache.width).abs()
    store = TensorRowStore(rows, cache.width, initial=lambda ids: initial[ids])
    return cache, RowOwner(store, dim, pull_limit=rules.pull_limit, optimizer=cache.optimizer)


@pytest.mark.parametrize(("policy", "aging"), POLICIES)
@pytest.mark.parametrize("on_stale", ["rebase", "flush"])
@pytest.mark.parametrize("staleness", [0, 1, 3, math.inf])
def test_batches_of_one_row_do_what_replay_says(
    policy: Any, aging: int | None, on_stale: Any, staleness: float
) -> None:
    for capacity in (0, 1, 3):
        events = random_events(capacity, 80)
        options: dict[str, Any] = {"staleness": staleness, "policy": policy, "on_stale": on_stale, "aging": aging}
        expected = replay(events, capacity=capacity, **options)
        found = Driver(CacheRules(**options), capacity, 6).run(events)
        for number, (step, reference) in enumerate(zip(found, expected, strict=True)):
            assert step == reference, f"event {number} with capacity {capacity}"


@pytest.mark.parametrize(("policy", "aging"), POLICIES)
@pytest.mark.parametrize("capacity", [0, 1, 5, 12])
def test_batches_follow_the_rules_for_batches(policy: Any, aging: int | None, capacity: int) -> None:
    rules = CacheRules(policy=policy, aging=aging)
    cache, owner = setting(capacity, rows=20, rules=rules)
    slow = SlowIndex(capacity, rules)
    overflows = 0
    for ids in random_batches(capacity, 60, 20, 8):
        owner.apply(cache.take_evicted())
        plan = cache.begin_read(ids)
        stale = owner.stale(ids, plan.versions)
        result = cache.finish_read(plan, stale, *owner.fetch(ids[stale]))
        overflow, evicted = slow.read(ids.tolist())
        assert ids[result.overflow].tolist() == overflow
        assert result.evicted.tolist() == evicted
        held = {row: slot for slot, row in enumerate(cache.index.keys.tolist()) if row >= 0}
        assert set(held) == set(slow.rows)
        for row, (count, last) in slow.rows.items():
            assert [int(cache.index.counts[held[row]]), int(cache.index.last_read[held[row]])] == [count, last]
        assert torch.equal(result.values, owner.fetch(ids)[0])
        overflows += len(overflow)
    assert overflows > 0 or capacity == 12


def test_each_set_is_a_cache_of_its_own() -> None:
    rules = CacheRules(policy="lfu")
    index = SlotIndex(32, rules, ways=4)
    slow = [SlowIndex(4, rules) for _ in range(index.num_sets)]
    for ids in random_batches(3, 40, 200, 30):
        slots = index.find(ids)
        index.touch(slots[slots >= 0])
        missing = ids[slots < 0]
        places, victims = index.place(missing)
        sets = index.set_of(ids)
        for number, reference in enumerate(slow):
            overflow, evicted = reference.read(ids[sets == number].tolist())
            own = index.set_of(missing) == number if missing.numel() else torch.empty(0, dtype=torch.bool)
            assert missing[own & (places < 0)].tolist() == overflow
            assert victims[own][victims[own] >= 0].tolist() == evicted
            keys = index.keys[number * 4 : number * 4 + 4]
            assert set(keys[keys >= 0].tolist()) == set(reference.rows)


@pytest.mark.parametrize("capacity", [0, 1, 31, 32, 33, 63, 100, 1000])
def test_sets_have_equal_sizes_and_nearly_the_capacity(capacity: int) -> None:
    index = SlotIndex(capacity, CacheRules())
    assert index.capacity == index.num_sets * index.ways
    assert capacity - 32 < index.capacity <= capacity
    assert index.ways >= min(32, capacity)


def test_the_mixing_of_ids_is_splitmix64() -> None:
    def reference(number: int) -> int:
        mask = 2**64 - 1
        number = ((number ^ number >> 30) * 0xBF58476D1CE4E5B9) & mask
        number = ((number ^ number >> 27) * 0x94D049BB133111EB) & mask
        number ^= number >> 31
        return number - 2**64 if number >= 2**63 else number

    ids = [0, 1, 2, 7_800_000_000, 2**63 - 1, -1, -(2**63) + 1]
    assert mix64(torch.tensor(ids)).tolist() == [reference(number & (2**64 - 1)) for number in ids]


def test_ids_above_what_float32_holds_stay_apart() -> None:
    cache, _ = setting(8)
    ids = torch.tensor([2**24, 2**24 + 1, 2**53 + 1, -5])
    plan = cache.begin_read(ids)
    rows = torch.arange(8.0).view(4, 2)
    cache.finish_read(plan, torch.ones(4, dtype=torch.bool), rows, torch.zeros(4, dtype=torch.int32))
    plan = cache.begin_read(ids.flip(0))
    result = cache.finish_read(plan, torch.zeros(4, dtype=torch.bool), rows[:0], torch.empty(0, dtype=torch.int32))
    assert torch.equal(result.values, rows.flip(0))


class LockStep:
    """Workers with a cache each that take every phase of a step together, as a distributed layer does."""

    def __init__(
        self,
        workers: int,
        capacity: int,
        rules: CacheRules,
        *,
        optimizer: RowOptimizer | None = None,
        dtype: torch.dtype = torch.float32,
        num_rows: int = 40,
        dim: int = 3,
    ) -> None:
        options: dict[str, Any] = {"optimizer": optimizer, "dtype": dtype, "ways": 4}
        self.caches = [RowCache(capacity, dim, rules, **options) for _ in range(workers)]
        generator = torch.Generator().manual_seed(1)
        self.initial = torch.randn(num_rows, dim, generator=generator, dtype=dtype)
        store = TensorRowStore(num_rows, self.caches[0].width, initial=self._first, dtype=dtype)
        self.owner = RowOwner(store, dim, pull_limit=rules.pull_limit, optimizer=optimizer)
        self.optimizer, self.dim, self.dtype = optimizer, dim, dtype
        self.unseen = 0

    def _first(self, rows: Tensor) -> Tensor:
        if self.optimizer is None:
            return self.initial[rows]
        state = self.optimizer.initial_state(rows.numel(), self.dim, dtype=self.dtype)
        return torch.cat([self.initial[rows], state], dim=1)

    def read(self, batches: list[Tensor]) -> list[Tensor]:
        plans = [cache.begin_read(ids) for cache, ids in zip(self.caches, batches, strict=True)]
        return self.answer(plans, [plan.versions for plan in plans])

    def answer(self, plans: list[Any], versions: list[Tensor]) -> list[Tensor]:
        stale = [self.owner.stale(plan.ids, version) for plan, version in zip(plans, versions, strict=True)]
        together = list(zip(self.caches, plans, stale, strict=True))
        self.owner.apply(Push.cat([cache.push_stale(plan, mask) for cache, plan, mask in together]))
        values = []
        for cache, plan, mask in together:
            values.append(cache.finish_read(plan, mask, *self.owner.fetch(plan.ids[mask])).values)
            start, _ = cache.clocks(plan.ids)
            lacks = (self.owner.store.clocks(plan.ids) - start)[start >= 0]
            self.unseen = max(self.unseen, int(lacks.max()) if lacks.numel() else 0)
        return values

    def write(self, batches: list[Tensor], gradients: list[Tensor]) -> list[Push]:
        together = zip(self.caches, batches, gradients, strict=True)
        pushes = [cache.write(ids, gradient) for cache, ids, gradient in together]
        self.owner.apply(Push.cat(pushes))
        return pushes

    def flush(self) -> Tensor:
        """The table behind a flush of all."""
        self.owner.apply(Push.cat([cache.flush() for cache in self.caches]))
        return self.owner.fetch(torch.arange(len(self.initial)))[0][:, : self.dim]


def gradients_of(values: list[Tensor], batches: list[Tensor], step: int, lr: float = 1.0) -> list[Tensor]:
    """Depend on the values, so that any difference grows, and on worker, step and row."""
    out = []
    for worker, (value, ids) in enumerate(zip(values, batches, strict=True)):
        target = torch.sin(ids[:, None] * 1.7 + worker + step * 0.3).to(value)
        out.append((value - target) * (lr / len(values)))
    return out


def train(system: LockStep, *, steps: int = 15, lr: float = -0.1) -> list[Tensor]:
    """Reads of all steps, and the table at the end. ``lr`` is negative where gradients are changes."""
    workers = len(system.caches)
    streams = [random_batches(worker, steps, len(system.initial), 12) for worker in range(workers)]
    seen = []
    for step, batches in enumerate(zip(*streams, strict=True)):
        values = system.read(list(batches))
        seen += values
        system.write(list(batches), gradients_of(values, list(batches), step, lr))
    return [*seen, system.flush()]


@pytest.mark.parametrize("policy", ["lru", "lfu", "lfuopt"])
@pytest.mark.parametrize("on_stale", ["rebase", "flush"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("optimizer", [None, Adagrad(0.1)])
def test_without_staleness_training_is_bitwise_that_without_cache(
    policy: Any, on_stale: Any, dtype: torch.dtype, optimizer: RowOptimizer | None
) -> None:
    rules = CacheRules(0, policy=policy, on_stale=on_stale)
    lr = -0.1 if optimizer is None else 1.0
    bypass = train(LockStep(3, 0, rules, optimizer=optimizer, dtype=dtype), lr=lr)
    for capacity in (8, 64):
        cached = train(LockStep(3, capacity, rules, optimizer=optimizer, dtype=dtype), lr=lr)
        assert all(torch.equal(one, other) for one, other in zip(cached, bypass, strict=True))


def dense_training(make: Callable[[list[Tensor]], torch.optim.Optimizer], system: LockStep, steps: int = 15) -> Tensor:
    """One process, all rows, gradients summed in float64; torch's optimizer sees the rows of a step only."""
    rows = [torch.nn.Parameter(row.clone()) for row in system.initial]
    optimizer = make(rows)  # type: ignore[arg-type]
    workers = len(system.caches)
    streams = [random_batches(worker, steps, len(rows), 12) for worker in range(workers)]
    for step, batches in enumerate(zip(*streams, strict=True)):
        empty = torch.empty(0, 3, dtype=torch.float64)
        values = [torch.stack([rows[row].detach() for row in ids]) if len(ids) else empty for ids in batches]
        for ids, gradients in zip(batches, gradients_of(values, list(batches), step), strict=True):
            for row, gradient in zip(ids.tolist(), gradients, strict=True):
                rows[row].grad = gradient if rows[row].grad is None else rows[row].grad + gradient
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return torch.stack([row.detach() for row in rows])


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        (SGD(0.1), lambda rows: torch.optim.SGD(rows, lr=0.1)),
        (Adagrad(0.1), lambda rows: torch.optim.Adagrad(rows, lr=0.1)),
        (Adam(0.01), lambda rows: torch.optim.Adam(rows, lr=0.01)),
    ],
    ids=["sgd", "adagrad", "adam"],
)
def test_without_staleness_owners_take_the_steps_of_one_process_on_the_joint_batch(
    optimizer: RowOptimizer, make: Callable[[list[Tensor]], torch.optim.Optimizer]
) -> None:
    system = LockStep(3, 8, CacheRules(0), optimizer=optimizer, dtype=torch.float64)
    table = train(system, lr=1.0)[-1]
    expected = dense_training(make, system)
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-12)
    assert (table - system.initial).abs().max() > 0.1
    untouched = system.owner.store.clocks(torch.arange(40)) == 0
    assert torch.equal(table[untouched], system.initial[untouched])


@pytest.mark.parametrize(("policy", "aging"), POLICIES)
@pytest.mark.parametrize("on_stale", ["rebase", "flush"])
@pytest.mark.parametrize("staleness", [1, 4, math.inf])
def test_no_update_is_lost_or_counted_twice(policy: Any, aging: int | None, on_stale: Any, staleness: float) -> None:
    rules = CacheRules(staleness, policy=policy, on_stale=on_stale, aging=aging)
    system = LockStep(3, 8, rules, dtype=torch.float64)
    total, updates = system.initial.clone(), torch.zeros(40, dtype=torch.int32)
    streams = [random_batches(worker, 30, 40, 12) for worker in range(3)]
    for step, batches in enumerate(map(list, zip(*streams, strict=True))):
        gradients = gradients_of(system.read(batches), batches, step, -0.1)
        system.write(batches, gradients)
        assert all(cache._updates.max() <= staleness for cache in system.caches)
        for ids, gradient in zip(batches, gradients, strict=True):
            total[ids] += gradient
            updates[ids] += 1
    torch.testing.assert_close(system.flush(), total, rtol=0, atol=1e-12)
    assert torch.equal(system.owner.store.clocks(torch.arange(40)), updates)
    # What other workers flush for a read comes behind the check of that read.
    assert 0 < system.unseen <= (staleness if on_stale == "rebase" else 3 * staleness)


@pytest.mark.parametrize("staleness", [0, 2, math.inf])
@pytest.mark.parametrize("optimizer", [None, RowwiseAdagrad(0.1)])
def test_a_read_begun_before_the_write_of_the_step_before_gives_the_same(
    staleness: float, optimizer: RowOptimizer | None
) -> None:
    rules, lr = CacheRules(staleness), -0.1 if optimizer is None else 1.0
    plain = LockStep(2, 8, rules, optimizer=optimizer)
    ahead = LockStep(2, 8, rules, optimizer=optimizer)
    streams = [random_batches(worker, 15, 40, 12) for worker in range(2)]
    batches = [list(batch) for batch in zip(*streams, strict=True)]
    expected = train(plain, lr=lr)[:-1]
    values, seen = ahead.read(batches[0]), []
    for step, batch in enumerate(batches):
        seen += values
        upcoming = batches[step + 1] if step + 1 < len(batches) else None
        plans = [cache.begin_read(ids) for cache, ids in zip(ahead.caches, upcoming or [], strict=bool(upcoming))]
        ahead.write(batch, gradients_of(values, batch, step, lr))
        versions = [cache.clocks(plan.ids)[0] for cache, plan in zip(ahead.caches, plans, strict=bool(upcoming))]
        if upcoming:
            values = ahead.answer(plans, versions)
    assert all(torch.equal(one, other) for one, other in zip(seen, expected, strict=True))


@pytest.mark.parametrize("optimizer", [SGD(0.1), Adagrad(0.1), RowwiseAdagrad(0.1), Adam(0.1), RowwiseAdam(0.1)])
def test_accumulated_gradients_move_the_copy_step_by_step_and_the_owner_once(optimizer: RowOptimizer) -> None:
    cache, owner = setting(rules=CacheRules(1), optimizer=optimizer)
    ids, gradients = torch.tensor([3, 5]), torch.randn(2, 2, 2)
    contents, _ = owner.fetch(ids)
    read(cache, owner, ids)
    assert len(cache.write(ids, gradients[0])) == 0
    local = optimizer.update_packed(contents, gradients[0])
    assert torch.equal(read(cache, owner, ids), local[:, :2])
    push = cache.write(ids, gradients[1])
    assert push.updates.tolist() == [2, 2]
    owner.apply(push)
    expected = optimizer.update_packed(contents, gradients[0] + gradients[1])
    assert torch.equal(owner.fetch(ids)[0], expected)
    # The copy was an estimate: it is fetched again although no other worker wrote.
    assert cache.begin_read(ids).versions.tolist() == [-1, -1]
    assert torch.equal(read(cache, owner, ids), expected[:, :2])
    assert cache.clocks(ids)[0].tolist() == [2, 2]


def test_a_fetched_row_takes_a_local_step_for_pending_gradients_only() -> None:
    """A step of Adam with a gradient of zero would move the row and its count."""
    optimizer = Adam(0.1)
    cache, owner = setting(rules=CacheRules(5, pull_bound=0), optimizer=optimizer)
    ids = torch.tensor([1, 2])
    read(cache, owner, ids)
    owner.apply(cache.write(ids, torch.ones(2, 2)))
    owner.apply(cache.flush())
    read(cache, owner, ids)
    cache.write(ids[:1], torch.ones(1, 2))
    owner.apply(Push(ids, torch.ones(2, 2), torch.ones(2, dtype=torch.int32)))  # another worker
    contents, _ = owner.fetch(ids)
    values = read(cache, owner, ids)
    assert torch.equal(values[0], optimizer.update_packed(contents[:1], torch.ones(1, 2))[0, :2])
    assert torch.equal(values[1], contents[1, :2])


def test_an_evaluation_changes_nothing() -> None:
    cache, owner = setting(2, rules=CacheRules(5, pull_bound=0))
    cached, other = torch.tensor([1, 2]), torch.tensor([1, 2, 3])
    read(cache, owner, cached)
    cache.write(cached[:1], torch.ones(1, 2))
    owner.apply(Push(cached[:1], torch.ones(1, 2), torch.ones(1, dtype=torch.int32)))
    tensors = [cache.index.keys, cache.index.counts, cache.index.last_read, cache._rows, cache._start, cache._updates]
    before = [tensor.clone() for tensor in tensors]
    expected = owner.fetch(other)[0]
    expected[0] += 1  # stale, with an update of its own
    assert torch.equal(read(cache, owner, other, training=False), expected)
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_rows_that_found_no_place_are_read_and_pushed() -> None:
    cache, owner = setting(2)
    ids = torch.arange(5)
    expected = owner.fetch(ids)[0]
    assert torch.equal(read(cache, owner, ids), expected)
    push = cache.write(ids, torch.ones(5, 2))
    assert push.ids.tolist() == [2, 3, 4] and push.updates.tolist() == [1, 1, 1]


def test_pushes_of_a_row_are_summed_in_the_order_they_come() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 9, (200,), generator=generator)
    pending = torch.randn(200, 3, generator=generator) * 10.0 ** torch.randint(-6, 7, (200, 1), generator=generator)
    sums: dict[int, Tensor] = {}
    for row, values in zip(ids.tolist(), pending, strict=True):
        sums[row] = sums[row] + values if row in sums else values
    merged = Push(ids, pending, torch.ones(200, dtype=torch.int32)).merged()
    assert merged.ids.tolist() == sorted(sums)
    assert torch.equal(merged.pending, torch.stack([sums[row] for row in sorted(sums)]))
    assert merged.updates.tolist() == ids.bincount().tolist()


def test_it_takes_8_bytes_per_value_and_24_per_row() -> None:
    assert RowCache(64, 128, CacheRules()).num_bytes == 64 * (8 * 128 + 24)
    assert RowCache(64, 128, CacheRules(0)).num_bytes == 64 * (4 * 128 + 24)  # nothing is ever pending


def test_invalidate_forgets_copies_and_refuses_to_forget_updates() -> None:
    cache, owner = setting()
    ids = torch.tensor([1, 2])
    read(cache, owner, ids)
    cache.write(ids, torch.ones(2, 2))
    with pytest.raises(RuntimeError, match="updates are pending; flush the cache first"):
        cache.invalidate()
    owner.apply(cache.flush())
    cache.invalidate()
    assert cache.begin_read(ids).slots.tolist() == [-1, -1]


def test_reads_out_of_turn_and_wrong_answers_are_refused() -> None:
    cache, owner = setting(1, dim=2)
    ids = torch.tensor([1, 2])
    stale, rows, clocks = torch.ones(2, dtype=torch.bool), torch.zeros(2, 2), torch.zeros(2, dtype=torch.int32)
    first = cache.begin_read(ids)
    second = cache.begin_read(ids)
    with pytest.raises(RuntimeError, match="not that of the last begin_read"):
        cache.finish_read(first, stale, rows, clocks)
    with pytest.raises(ValueError, match="rows that are not in the cache must be fetched"):
        cache.finish_read(second, ~stale, rows, clocks)
    with pytest.raises(ValueError, match=r"rows of shape \(1, 2\) and clocks of \(1,\): expected \(2, 2\) and \(2,\)"):
        cache.finish_read(cache.begin_read(ids), stale, rows[:1], clocks[:1])
    read(cache, owner, ids[:1])
    cache.write(ids[:1], torch.ones(1, 2))
    read(cache, owner, ids[1:])
    with pytest.raises(RuntimeError, match="1 evicted rows wait to be pushed"):
        read(cache, owner, ids[:1])


@pytest.mark.parametrize(
    ("capacity", "dim", "ways", "message"),
    [
        (-1, 2, 32, "capacity=-1: expected at least 0 rows"),
        (4, 0, 32, "dim=0: expected at least 1"),
        (4, 2, 0, "ways=0: expected at least 1 slot"),
    ],
)
def test_impossible_sizes_are_refused(capacity: int, dim: int, ways: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowCache(capacity, dim, CacheRules(), ways=ways)


def test_an_owner_refuses_rows_that_do_not_fit_its_optimizer() -> None:
    with pytest.raises(ValueError, match=r"store.width=4: rows of dim=4 with Adagrad need 8 numbers"):
        RowOwner(TensorRowStore(3, 4), 4, pull_limit=0, optimizer=Adagrad(0.1))
    with pytest.raises(ValueError, match=r"store.dtype=torch.bfloat16: an optimizer's state needs"):
        RowOwner(TensorRowStore(3, 5, dtype=torch.bfloat16), 4, pull_limit=0, optimizer=RowwiseAdagrad(0.1))

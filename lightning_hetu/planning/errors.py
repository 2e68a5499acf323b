"""The one error of its own that planning raises."""

from __future__ import annotations

from lightning_hetu.planning.units import format_bytes


class NoFeasiblePlanError(ValueError):
    """No plan fits the memory budget.

    Args:
        memory_budget: Bytes per device the search was given.
        smallest_feasible_budget: Fewest bytes per device with which the same search finds a plan.

    Attributes:
        memory_budget: As above.
        smallest_feasible_budget: As above.
    """

    def __init__(self, memory_budget: int, smallest_feasible_budget: int) -> None:
        self.memory_budget = memory_budget
        self.smallest_feasible_budget = smallest_feasible_budget
        super().__init__(
            f"memory_budget={memory_budget} ({format_bytes(memory_budget)} per device): no plan fits; the smallest"
            f" feasible memory_budget is {smallest_feasible_budget} ({format_bytes(smallest_feasible_budget)})."
        )

    def __reduce__(self) -> tuple[type[NoFeasiblePlanError], tuple[int, int]]:
        # The default would call the class with the message alone, which fails when a worker process sends the error.
        return type(self), (self.memory_budget, self.smallest_feasible_budget)

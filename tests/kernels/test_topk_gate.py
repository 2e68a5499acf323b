"""``topk_gate``: the reference against torch's softmax and topk, ties, rows without scores, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hetu_kernels
from hetu_kernels.moe.topk_gate_ref import topk_gate_reference

INF, NAN = float("inf"), float("nan")
OPTIONS = [
    {"score": score, "renormalize": renormalize}
    for score in ("softmax", "sigmoid")
    for renormalize in (False, True)
]  # fmt: skip


def by_hand(logits: Tensor, k: int, score: str, renormalize: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token by token: experts sorted by logit, then by id."""
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    ids = torch.tensor([sorted(range(len(row)), key=lambda e: (-row[e], e))[:k] for row in logits.tolist()])
    weights = torch.stack([scores[t, ids[t]] for t in range(len(ids))])
    if renormalize:
        weights = weights / weights.sum(1, keepdim=True)
    counts = torch.tensor([int((ids == e).sum()) for e in range(logits.shape[1])])
    return weights, ids.int(), counts.int(), scores


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("rounded", [False, True])
def test_reference_is_softmax_and_sort(options: dict[str, Any], rounded: bool) -> None:
    logits = torch.randn(40, 11, dtype=torch.float64)
    logits = logits.round() if rounded else logits  # many ties
    expected = by_hand(logits, 4, **options)
    actual = topk_gate_reference(logits, 4, **options, return_scores=True)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_reference_agrees_with_torch_topk() -> None:
    logits = torch.randn(30, 24)
    weights, ids, _ = topk_gate_reference(logits, 5)
    expected, places = logits.softmax(-1).topk(5)
    torch.testing.assert_close(weights, expected)
    assert torch.equal(ids.long(), places)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("function", [hetu_kernels.topk_gate, topk_gate_reference])
def test_gradients_are_right(function: Any, options: dict[str, Any]) -> None:
    """In float64 the operator runs the reference's own formulas."""
    logits = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)

    def floating(logits: Tensor) -> tuple[Tensor, ...]:
        return function(logits, 3, **options, return_scores=True)[::3]

    assert torch.autograd.gradcheck(floating, (logits,))
    assert torch.autograd.gradcheck(lambda x: function(x, 3, **options)[0], (logits,))


@pytest.mark.interpret
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("through", ["weights", "scores"])
def test_weights_or_scores_alone_have_gradients(options: dict, through: str, device: torch.device) -> None:
    """What is not used has no gradient, and is not taken for zeros somewhere else."""
    place = 0 if through == "weights" else 3
    logits = torch.randn(6, 9, device=device)
    grads = []
    for function in (hetu_kernels.topk_gate, topk_gate_reference):
        leaf = logits.clone().requires_grad_()
        result = function(leaf, 2, **options, return_scores=True)[place]
        (result * torch.arange(result.numel(), device=device).view(result.shape)).sum().backward()
        grads.append(leaf.grad)
    assert grads[1].abs().max() > 0.01
    torch.testing.assert_close(*grads)


@pytest.mark.interpret
def test_balance_loss_has_the_gradient_of_softmax(device: torch.device) -> None:
    """E sum_e f_e mean_t P[t, e], with f from the counts."""
    ours = torch.randn(12, 8, device=device).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    _, _, counts, scores = hetu_kernels.topk_gate(ours, 2, return_scores=True)
    (8 * (counts / 24 * scores.mean(0)).sum()).backward()
    share = torch.nn.functional.one_hot(theirs.topk(2).indices, 8).sum((0, 1)) / 24
    (8 * (share * theirs.softmax(-1).mean(0)).sum()).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    assert ours.grad.abs().max() > 1e-3


@pytest.mark.interpret
def test_ties_go_to_the_lowest_id(device: torch.device) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, -0.0, 0.0, -0.0, 0.0]], device=device)
    _, ids, counts = hetu_kernels.topk_gate(logits, 3)
    assert ids.tolist() == [[1, 2, 4], [0, 1, 2]]
    assert counts.tolist() == [1, 2, 2, 0, 1]


@pytest.mark.interpret
def test_logits_decide_where_scores_are_equal(device: torch.device) -> None:
    """Sigmoids of 60 and 61 are both 1 in float32."""
    logits = torch.tensor([[60.0, 61.0, 62.0, 0.0]], device=device)
    weights, ids, _ = hetu_kernels.topk_gate(logits, 2, score="sigmoid")
    assert ids.tolist() == [[2, 1]]
    assert weights.tolist() == [[1.0, 1.0]]


@pytest.mark.interpret
@pytest.mark.parametrize("options", OPTIONS)
def test_rows_of_nan_have_no_experts(options: dict, device: torch.device) -> None:
    logits = torch.randn(4, 6, device=device)
    logits[1, 2] = NAN
    logits[3] = NAN
    logits.requires_grad_()
    weights, ids, counts, scores = hetu_kernels.topk_gate(logits, 2, **options, return_scores=True)
    assert (ids[[1, 3]] == -1).all() and (ids[[0, 2]] >= 0).all()
    assert (weights[[1, 3]] == 0).all() and (weights[[0, 2]] > 0).all()
    assert scores[[1, 3]].isnan().all() and scores[[0, 2]].isfinite().all()
    assert int(counts.sum()) == 4
    (weights[:, 0].sum() + scores[[0, 2], 0].sum()).backward()
    assert (logits.grad[[1, 3]] == 0).all() and logits.grad.isfinite().all()
    assert (logits.grad[[0, 2]] != 0).any()


@pytest.mark.interpret
@pytest.mark.parametrize("options", OPTIONS)
def test_experts_with_a_logit_of_minus_infinity_are_not_chosen(options: dict, device: torch.device) -> None:
    """Not even where fewer than k are left, or none."""
    logits = torch.full((3, 5), -INF, device=device)
    logits[0, [1, 3, 4]] = torch.tensor([1.0, 3.0, 2.0], device=device)
    logits[1, 2] = -4.0
    weights, ids, counts, scores = hetu_kernels.topk_gate(logits, 3, **options, return_scores=True)
    assert ids.tolist() == [[3, 4, 1], [2, -1, -1], [-1, -1, -1]]
    assert counts.tolist() == [0, 1, 1, 1, 1]
    assert (weights[ids < 0] == 0).all() and (weights[ids >= 0] > 0).all()
    assert (scores[logits == -INF] == 0).all() and scores.isfinite().all()


@pytest.mark.interpret
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy, computing with infinities
def test_infinity_is_a_sigmoid_of_one_and_no_softmax(device: torch.device) -> None:
    logits = torch.tensor([[0.0, INF, 1.0]], device=device)
    weights, ids, _ = hetu_kernels.topk_gate(logits, 2, score="sigmoid")
    assert ids.tolist() == [[1, 2]] and weights[0, 0] == 1
    weights, ids, counts = hetu_kernels.topk_gate(logits, 2)
    assert ids.tolist() == [[-1, -1]] and weights.tolist() == [[0, 0]] and int(counts.sum()) == 0


@pytest.mark.interpret
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_renormalized_weights_sum_to_one(score: str, device: torch.device) -> None:
    logits = 5 * torch.randn(20, 33, device=device).to(torch.bfloat16)
    weights, _, _ = hetu_kernels.topk_gate(logits, 6, score=score, renormalize=True)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.sum(1), torch.ones(20, device=device))
    assert (weights.diff(dim=1) <= 0).all()


@pytest.mark.interpret
@pytest.mark.slow
@pytest.mark.parametrize("experts", [1, 2, 3, 7, 8, 31, 33, 129, 256, 257, 511, 512])
def test_every_number_of_choices(experts: int, device: torch.device) -> None:
    logits = torch.randn(3, experts, device=device).mul(4).round()  # with ties
    for k in range(1, min(8, experts) + 1):
        for options in OPTIONS:
            ours = hetu_kernels.topk_gate(logits, k, **options, return_scores=True)
            theirs = topk_gate_reference(logits.double(), k, **options, return_scores=True)
            assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[2], theirs[2])
            torch.testing.assert_close(ours[0].double(), theirs[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(ours[3].double(), theirs[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": [1.0]}, TypeError, "logits is a list, expected a tensor"),
        ({"logits": torch.randn(5)}, ValueError, r"logits has shape \[5\], expected \[any, any\] \(tokens, experts\)"),
        ({"logits": torch.ones(5, 8, dtype=torch.int64)}, TypeError, "logits has dtype torch.int64, expected float32"),
        ({"logits": torch.randn(5, 513)}, ValueError, "logits has 513 columns, expected 1 to 512"),
        ({"logits": torch.randn(5, 0)}, ValueError, "logits has 0 columns, expected 1 to 512"),
        ({"k": 0}, ValueError, "k=0, expected 1 to 8"),
        ({"k": 9}, ValueError, "k=9, expected 1 to 8"),
        ({"k": 4, "logits": torch.randn(5, 3)}, ValueError, "k=4, expected 1 to 3"),
        ({"k": 2.0}, TypeError, "k=2.0, expected an integer"),
        ({"score": "tanh"}, ValueError, "score='tanh', expected one of 'softmax', 'sigmoid'"),
        ({"renormalize": 1}, TypeError, "renormalize=1, expected True or False"),
        ({"return_scores": None}, TypeError, "return_scores is None, expected True or False"),
    ],
)
def test_wrong_arguments_are_named(changes: dict, error: type[Exception], message: str) -> None:
    arguments = {"logits": torch.randn(5, 12), "k": 2, **changes}
    with pytest.raises(error, match=f"topk_gate: {message}"):
        hetu_kernels.topk_gate(**arguments)

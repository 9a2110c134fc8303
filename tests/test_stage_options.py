"""Options of what a step does beside its rule: which values, which of them together, and for which parameters."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.stages import WEIGHTS
from helpers import CLASSES, assert_same_state, make_problem, run_steps
from pairs import nothing_changes

BAD: tuple[dict[str, Any], ...] = (
    *({"max_grad_norm": value} for value in (-1.0, math.nan, "1", True, torch.tensor(1.0))),
    *({"max_grad_norm": 1.0, "grad_norm_type": value} for value in (1, 0, -math.inf, math.nan, "inf")),
    *({"max_grad_norm": 1.0, "nonfinite_grad_norm": value} for value in ("ignore", True, 1)),
    *({"max_grad_value": value} for value in (-1e-9, math.nan, "1", False)),
    *({"l1": value} for value in (-0.1, math.inf, math.nan, "1", True)),
    *({"l1": 0.1, "l1_method": value} for value in ("prox", True, 1)),
    *({"anchor_decay": value} for value in (-0.1, math.inf, math.nan, "1", True)),
    *({"average": value} for value in ("mean", True, 0.9)),
    *({"average": "ema", "average_decay": value} for value in (-0.1, 1.1, math.nan, "0.9", True)),
    *({"average": "ema", "average_start": value} for value in (-1, 1.5, "1", True)),
    *({"average": "swa", "average_every": value} for value in (0, -1, 1.5, "1", True)),
    {"average": "swa", "average_decay": 0.9},
    *({"weights": value} for value in ("bf16", True, 1)),
    *({"weights": "stochastic", "rounding_seed": value} for value in (-1, 1 << 24, 0.5, "1", True)),
    {"weights": "kahan", "rounding_seed": 1},
    # without the option that they need
    {"grad_norm_type": 2},
    {"nonfinite_grad_norm": "skip"},
    {"l1_method": "proximal"},
    {"average_decay": 0.9},
    {"average_start": 1},
    {"average_every": 2},
    {"rounding_seed": 1},
)


def culprits(options: dict[str, Any]) -> str:
    """A pattern: an error names the option."""
    return list(options)[-1]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_values_that_options_cannot_have(options: dict[str, Any]) -> None:
    """In the constructor, in a group, in a group that is added, and in a group that somebody changed, where the step changes nothing."""
    param = torch.nn.Parameter(torch.ones(3))
    for name in CLASSES:
        with pytest.raises(ValueError, match=culprits(options)):
            getattr(fused_opt, name)([param], **options)
    with pytest.raises(ValueError, match=culprits(options)):
        fused_opt.SGD([{"params": [param], **options}])
    optimizer = fused_opt.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(ValueError, match=culprits(options)):
        optimizer.add_param_group({"params": [param], **options})
    assert len(optimizer.param_groups) == 1
    run_steps(optimizer, [[torch.ones(2)]])
    optimizer.param_groups[0].update(options)
    with nothing_changes(optimizer), pytest.raises(ValueError, match=culprits(options)):
        optimizer.step()


@pytest.mark.parametrize("name", [name for name in CLASSES if name in ("RMSprop", "SGD")])
def test_no_option_is_in_a_group_that_was_not_given_it(name: str) -> None:
    """So that checkpoints of those who do without are as they were; torch's own options are all there."""
    optimizer = getattr(fused_opt, name)([torch.nn.Parameter(torch.ones(2))], l1=0.1, average=None)
    plain = getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(2))])
    assert set(optimizer.param_groups[0]) - set(plain.param_groups[0]) == {"l1"}


NOT_COMPLEX: tuple[dict[str, Any], ...] = (
    {"max_grad_value": 1.0},
    {"l1": 0.1},
    {"l1": 0.1, "l1_method": "subgradient"},
)


@pytest.mark.parametrize("options", NOT_COMPLEX, ids=str)
def test_complex_parameters_are_refused(options: dict[str, Any]) -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    param.grad = torch.ones_like(param)
    optimizer = fused_opt.Adam([param], **options)
    with nothing_changes(optimizer), pytest.raises(ValueError, match="complex64"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_weights_of_other_dtypes_stay_as_they_are(weights: str, dtype: torch.dtype) -> None:
    values, grads = make_problem(((40, 3),), 3, dtype)
    with_option, plain = (fused_opt.AdamW([torch.nn.Parameter(values[0].clone())], **options) for options in ({"weights": weights}, {}))
    run_steps(with_option, grads)
    run_steps(plain, grads)
    assert with_option._last_ran is not None
    assert_same_state(with_option, plain)


def test_complex_parameters_have_no_masks() -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.complex64))
    optimizer = fused_opt.Adam([param])
    with nothing_changes(optimizer), pytest.raises(TypeError, match="complex64"):
        optimizer.set_masks({param: torch.ones(3, dtype=torch.bool)})


@pytest.mark.parametrize("weights", ["stochastic", "split"])
def test_float16_is_refused(weights: str) -> None:
    param = torch.nn.Parameter(torch.ones(3, dtype=torch.float16))
    param.grad = torch.ones_like(param)
    optimizer = fused_opt.Adam([param], weights=weights)
    with nothing_changes(optimizer), pytest.raises(ValueError, match="float16"):
        optimizer.step()


@pytest.mark.parametrize(
    ("given", "of_group", "left_out"),
    [
        ({"average": "ema", "average_decay": 0.9}, {"average": None}, "average_decay"),
        ({"average": "ema", "average_decay": 0.9}, {"average": "swa"}, "average_decay"),
        ({"weights": "stochastic", "rounding_seed": 4}, {"weights": "kahan"}, "rounding_seed"),
        ({"l1": 0.1, "l1_method": "subgradient"}, {"l1": None}, "l1_method"),
    ],
    ids=str,
)
def test_a_group_with_another_value_does_not_inherit_what_belongs_to_it(
    given: dict[str, Any], of_group: dict[str, Any], left_out: str
) -> None:
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = fused_opt.AdamW([{"params": params[:1]}, {"params": params[1:2], **of_group}], **given)
    optimizer.add_param_group({"params": params[2:], **of_group})
    assert [group.get(left_out) for group in optimizer.param_groups] == [given[left_out], None, None]
    run_steps(optimizer, [[torch.ones(3)] * 3])
    assert optimizer.param_groups[0].get(next(iter(given))) == next(iter(given.values()))


def test_explain_tells_every_option() -> None:
    param = torch.nn.Parameter(torch.ones(3).bfloat16())
    average = {"average": "ema", "average_decay": 0.9, "average_start": 10, "average_every": 3}
    optimizer = fused_opt.AdamW(
        [param], max_grad_norm=1.0, nonfinite_grad_norm="skip", l1=0.1, **average, weights="stochastic", rounding_seed=4
    )
    assert fused_opt.explain(optimizer).rows[0].stages == (
        "clip by norm 1.0 (if it is not finite: skip)",
        "l1 0.1 (proximal)",
        "average (ema, decay 0.9, after step 10, every 3)",
        "weights stochastic (seed 4)",
    )


def test_explain_raises_what_the_step_would() -> None:
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = fused_opt.SGD(embedding.parameters(), lr=0.1, l1=0.1)
    embedding(torch.tensor([1])).sum().backward()
    for action in (lambda: fused_opt.explain(optimizer), optimizer.step):
        with nothing_changes(optimizer), pytest.raises(RuntimeError, match=r"layout torch\.sparse_coo, for which .* cannot be had"):
            action()


@pytest.mark.parametrize("name", ["RMSprop", "SGD"])
def test_torch_cannot_be_given_decoupled_weight_decay(name: str) -> None:
    optimizer = getattr(fused_opt, name)([torch.nn.Parameter(torch.ones(3))], lr=0.1, weight_decay=0.1, decoupled_weight_decay=True)
    with pytest.raises(ValueError, match=r"group 0 has weight_decay=0\.1 .* it would add the decay .* set weight_decay to 0"):
        fused_opt.torch_state_dict(optimizer)
    optimizer.param_groups[0]["weight_decay"] = 0
    exported = fused_opt.torch_state_dict(optimizer)
    assert "decoupled_weight_decay" not in exported["param_groups"][0]
    getattr(torch.optim, name)([torch.nn.Parameter(torch.ones(3))]).load_state_dict(exported)
    adamw = fused_opt.AdamW([torch.nn.Parameter(torch.ones(3))], weight_decay=0.1)
    assert (
        fused_opt.torch_state_dict(adamw)["param_groups"]
        == torch.optim.AdamW(adamw.param_groups[0]["params"], weight_decay=0.1).state_dict()["param_groups"]
    )

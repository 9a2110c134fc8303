"""Checkpoints of optimizers with 8-bit states: saved compactly, loaded exactly, converted where another format is asked for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fused_opt
from fused_opt.quantization import dequantize_blockwise
from helpers import assert_same_bits, assert_same_state, params_of
from pairs import through_file

# Class, options, and the states in 8-bit codes with their code.
CASES = (
    ("Adam", {}, {"exp_avg": "mulaw", "exp_avg_sq": "unsigned_mulaw"}),
    ("AdamW", {"amsgrad": True}, {"exp_avg": "mulaw", "exp_avg_sq": "unsigned_mulaw", "max_exp_avg_sq": "unsigned_mulaw"}),
    ("RMSprop", {"momentum": 0.9}, {"square_avg": "unsigned_mulaw", "momentum_buffer": "mulaw"}),
    ("SGD", {"momentum": 0.9}, {"momentum_buffer": "mulaw"}),
)
every_case = pytest.mark.parametrize(("name", "options", "codes"), CASES, ids=[name for name, _, _ in CASES])
LARGE, SMALL = (70, 91), (33,)  # 6370 elements: 25 blocks, the last one short


def gradients(steps: int, seed: int = 0) -> list[list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in (LARGE, SMALL)] for _ in range(steps)]


def make(name: str, options: dict[str, Any], suffix: str = "8bit", module: Any = fused_opt, dtype: torch.dtype = torch.float32) -> Any:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in (LARGE, SMALL)]
    return getattr(module, name + suffix)(params, lr=1e-2, **options)


def step(optimizer: Any, grads: list[list[torch.Tensor]]) -> None:
    for step_grads in grads:
        for param, grad in zip(params_of(optimizer), step_grads, strict=True):
            param.grad = grad.to(param.dtype)
        optimizer.step()


def copy_params(optimizer: Any, to: Any) -> None:
    with torch.no_grad():
        for source, target in zip(params_of(optimizer), params_of(to), strict=True):
            target.copy_(source)


def decoded(saved: dict[str, Any]) -> torch.Tensor:
    assert saved["order"] == [0, 1]
    return dequantize_blockwise(
        fused_opt.QuantizedTensor(saved["codes"], saved["scales"], saved["code"], torch.float32, saved["block_size"])
    )


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_load_continue(name: str, options: dict[str, Any], codes: dict[str, str], dtype: torch.dtype) -> None:
    optimizer = make(name, options, dtype=dtype)
    grads = gradients(6)
    step(optimizer, grads[:3])
    saved = through_file(optimizer.state_dict())  # weights_only
    for slot, code in codes.items():
        state = saved["state"][0][slot]
        assert {key: state[key] for key in ("version", "code", "block_size")} == {"version": 1, "code": code, "block_size": 256}
        assert state["codes"].dtype == (torch.uint8 if code.startswith("unsigned") else torch.int8)
        assert state["codes"].shape == LARGE
        assert state["scales"].shape == (25,)
        assert saved["state"][1][slot].dtype == torch.float32, "small ones are as in torch"
    for resumed in (make(name, options, dtype=dtype), make(name, options, suffix="", dtype=dtype)):  # the latter was not asked for 8 bits
        copy_params(optimizer, resumed)
        resumed.load_state_dict(copy.deepcopy(saved))
        assert_same_state(resumed, optimizer)
        continued = copy.deepcopy(optimizer)
        for one in (continued, resumed):
            step(one, grads[3:])
        assert_same_state(resumed, continued)
        assert resumed._last_ran is not None


@every_case
def test_torchs_checkpoint_is_quantized_on_load(name: str, options: dict[str, Any], codes: dict[str, str]) -> None:
    theirs = make(name, options, suffix="", module=torch.optim)
    step(theirs, gradients(3))
    ours = make(name, {**options, "block_size": 64})
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    for slot, code in codes.items():
        values = theirs.state[params_of(theirs)[0]][slot]
        expected = fused_opt.quantize_blockwise(values, 64, code=code)
        state = ours.state[params_of(ours)[0]]
        assert_same_bits(state[slot], expected.codes, slot)
        assert_same_bits(state[f"{slot}_scale"], expected.scales, slot)
        assert_same_bits(ours.state[params_of(ours)[1]][slot], theirs.state[params_of(theirs)[1]][slot])
    step(ours, gradients(2, seed=5))
    assert ours._last_ran is not None


@every_case
def test_export_to_torch(name: str, options: dict[str, Any], codes: dict[str, str]) -> None:
    ours = make(name, options)
    step(ours, gradients(3))
    saved = ours.state_dict()
    for exported in (fused_opt.torch_state_dict(ours), fused_opt.torch_state_dict(through_file(saved))):
        assert not {"state_dtype", "block_size", "min_8bit_size"} & set(exported["param_groups"][0])
        for slot in codes:
            assert_same_bits(exported["state"][0][slot], decoded(saved["state"][0][slot]), slot)
        theirs = make(name, options, suffix="", module=torch.optim)
        copy_params(ours, theirs)
        theirs.load_state_dict(through_file(exported))
        step(theirs, gradients(2, seed=3))
        for param, state in theirs.state.items():
            assert all(value.shape == param.shape for key, value in state.items() if key != "step")


def test_torch_does_not_take_codes_for_moments() -> None:
    ours = make("AdamW", {})
    step(ours, gradients(2))
    theirs = make("AdamW", {}, suffix="", module=torch.optim)
    theirs.load_state_dict(ours.state_dict())
    with pytest.raises((AttributeError, TypeError, RuntimeError)):  # as the version of torch has it
        step(theirs, gradients(1))


@every_case
def test_another_block_size_converts(name: str, options: dict[str, Any], codes: dict[str, str]) -> None:
    optimizer = make(name, {**options, "block_size": 128})
    step(optimizer, gradients(3))
    saved = optimizer.state_dict()
    resumed = make(name, {**options, "block_size": 1024})
    resumed.load_state_dict(copy.deepcopy(saved))
    for slot, code in codes.items():
        expected = fused_opt.quantize_blockwise(decoded(saved["state"][0][slot]), 1024, code=code)
        state = resumed.state[params_of(resumed)[0]]
        assert_same_bits(state[slot], expected.codes, slot)
        assert_same_bits(state[f"{slot}_scale"], expected.scales, slot)
    step(resumed, gradients(1))
    assert resumed.param_groups[0]["block_size"] == 1024
    unasked = make(name, options)
    unasked.load_state_dict(copy.deepcopy(saved))
    assert unasked.param_groups[0]["block_size"] == 128, "not asked for another, it keeps the saved one"
    assert_same_bits(unasked.state[params_of(unasked)[0]][next(iter(codes))], saved["state"][0][next(iter(codes))]["codes"])


@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_wider_states_can_be_asked_for(state_dtype: torch.dtype) -> None:
    optimizer = make("AdamW", {})
    step(optimizer, gradients(3))
    saved = optimizer.state_dict()
    resumed = make("AdamW", {"state_dtype": state_dtype}, suffix="")
    resumed.load_state_dict(copy.deepcopy(saved))
    for slot in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(resumed.state[params_of(resumed)[0]][slot], decoded(saved["state"][0][slot]).to(state_dtype), slot)
    step(resumed, gradients(1))
    assert fused_opt.explain(resumed).rows[0].states[0] == ("exp_avg", str(state_dtype).removeprefix("torch."))


def test_patterns_and_sizes_decide_on_load_too() -> None:
    optimizer = make("AdamW", {"min_8bit_size": 0})
    step(optimizer, gradients(2))
    names = zip(("body.weight", "embedding"), [torch.nn.Parameter(p.detach().clone()) for p in params_of(optimizer)], strict=True)
    resumed = fused_opt.AdamW8bit(names, min_8bit_size=0, state_dtype={"embed*": torch.float32})
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kinds = [resumed.state[param]["exp_avg"].dtype for param in params_of(resumed)]
    assert kinds == [torch.int8, torch.float32]


DAMAGES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("another version", {"version": 2}, "version 2, and this fused_opt reads version 1: update"),
    ("no version", {"version": None}, "version None"),
    ("an order that is none", {"order": [0, 0]}, "order of dimensions"),
    ("another code", {"code": "quartic"}, "code 'quartic', and this fused_opt reads 'mulaw' there: update"),
    ("the other code", {"code": "unsigned_mulaw"}, "reads 'mulaw' there"),
    ("another block size", {"block_size": 128}, "25,.* scales; the checkpoint is damaged"),
    ("no block size", {"block_size": 100}, "blocks of 100"),
    ("codes of another dtype", {"codes": torch.zeros(LARGE)}, "has torch.float32 codes"),
    ("negative scales", {"scales": torch.full((25,), -1.0)}, "negative scale"),
    ("codes that are no tensor", {"codes": [1]}, "no tensors"),
    ("a key more", {"offset": 1}, "it was not saved by fused_opt"),
)


@pytest.mark.parametrize(("damage", "message"), [d[1:] for d in DAMAGES], ids=[d[0] for d in DAMAGES])
def test_damaged_checkpoints_are_refused_and_nothing_is_changed(damage: dict[str, Any], message: str) -> None:
    optimizer = make("AdamW", {})
    step(optimizer, gradients(2))
    before = copy.deepcopy(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    saved["state"][0]["exp_avg"].update(damage)
    for refused in (lambda: optimizer.load_state_dict(saved), lambda: fused_opt.torch_state_dict(saved)):
        with pytest.raises(ValueError, match=message):
            refused()
    assert_same_state(optimizer, before)
    assert optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize(
    ("slot", "value", "message"),
    [("exp_avg", float("nan"), "not finite"), ("exp_avg", float("inf"), "not finite"), ("exp_avg_sq", -1.0, "mean of squares")],
)
def test_values_without_a_code_are_refused_and_nothing_is_changed(slot: str, value: float, message: str) -> None:
    theirs = make("AdamW", {}, suffix="", module=torch.optim)
    step(theirs, gradients(2))
    theirs.state[params_of(theirs)[0]][slot][3, 5] = value
    ours = make("AdamW", {})
    step(ours, gradients(1, seed=9))
    before = copy.deepcopy(ours)
    with pytest.raises(ValueError, match=f"state '{slot}' of parameter 0.*{message}"):
        ours.load_state_dict(theirs.state_dict())
    assert_same_state(ours, before)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_the_order_of_memory_is_saved_as_data(layout: torch.memory_format) -> None:
    """File formats that know no strides, and models in another layout, read the same values."""
    param = torch.nn.Parameter(torch.randn(16, 8, 8, 8, generator=torch.Generator().manual_seed(2)).to(memory_format=layout))
    optimizer = fused_opt.AdamW8bit([param])
    param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(3)) * torch.logspace(-3, 0, 8)[:, None, None]
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    for state in saved["state"][0].values():
        if isinstance(state, dict):
            state["codes"] = state["codes"].contiguous()
    values = fused_opt.torch_state_dict(optimizer)["state"][0]["exp_avg"]
    other = torch.nn.Parameter(param.detach().contiguous())
    for resumed in (fused_opt.AdamW8bit([other]), fused_opt.AdamW([other], state_dtype=torch.float32)):
        resumed.load_state_dict(copy.deepcopy(saved))
        assert torch.equal(fused_opt.torch_state_dict(resumed)["state"][0]["exp_avg"], values)
        other.grad = param.grad
        resumed.step()
        assert resumed._last_ran is not None


def test_a_load_that_torch_breaks_off_changes_nothing() -> None:
    optimizer = make("AdamW", {})
    step(optimizer, gradients(2))
    before = copy.deepcopy(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 7.0
    del saved["state"][0]["step"]
    with pytest.raises(KeyError, match="step"):
        optimizer.load_state_dict(saved)
    assert_same_state(optimizer, before)
    assert optimizer.param_groups[0]["lr"] == 1e-2


def test_options_that_an_old_checkpoint_lacks_are_filled_in() -> None:
    theirs = make("Adam", {}, suffix="", module=torch.optim)
    step(theirs, gradients(1))
    saved = theirs.state_dict()
    del saved["param_groups"][0]["amsgrad"]
    ours = make("Adam", {})
    ours.load_state_dict(saved)
    step(ours, gradients(1))
    assert ours._last_ran is not None


def test_other_names_are_refused_where_formats_go_by_names() -> None:
    def named(*names: str) -> Any:
        params = [torch.nn.Parameter(torch.ones(70, 91)) for _ in names]
        return fused_opt.AdamW8bit(zip(names, params, strict=True), state_dtype={"*embed*": torch.float32})

    one, other = named("embed", "w"), named("w", "embed")
    with pytest.raises(ValueError, match=r"'embed' for 'w'.*in the checkpoint's order"):
        other.load_state_dict(one.state_dict())


def test_states_as_the_optimizer_has_them_load_too() -> None:
    optimizer = make("AdamW", {})
    step(optimizer, gradients(2))
    bare = torch.optim.Optimizer.state_dict(optimizer)
    resumed = make("AdamW", {})
    resumed.load_state_dict(copy.deepcopy(bare))
    for param, other in zip(params_of(optimizer), params_of(resumed), strict=True):
        for key, value in optimizer.state[param].items():
            assert_same_bits(resumed.state[other][key], value, key)
    del bare["state"][0]["exp_avg_scale"]
    with pytest.raises(ValueError, match="there is no 'exp_avg_scale'"):
        resumed.load_state_dict(bare)


def test_hooks_see_what_is_saved_and_the_users_own_states_are_left_alone() -> None:
    optimizer = make("AdamW", {})
    step(optimizer, gradients(1))
    own = {
        "info_scale": 2.0,
        "ema": torch.randn(LARGE, generator=torch.Generator().manual_seed(1)),
        "info": {"a": 1},
        "bound": torch.tensor(0.1234567),
    }
    optimizer.state[params_of(optimizer)[0]].update(own)
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda _, state_dict: seen.append(state_dict))
    saved = optimizer.state_dict()
    assert seen[0]["state"][0]["exp_avg"]["version"] == 1
    resumed = make("AdamW", {})
    resumed.load_state_dict(saved)
    state = resumed.state[params_of(resumed)[0]]
    assert (state["info"], state["info_scale"]) == ({"a": 1}, 2.0)
    assert_same_bits(state["ema"], own["ema"])
    assert_same_bits(state["bound"], own["bound"])
    assert fused_opt.torch_state_dict(optimizer)["state"][0]["info"] == {"a": 1}


def test_saving_shares_tensors_and_changes_nothing() -> None:
    optimizer = make("AdamW", {})
    step(optimizer, gradients(1))
    state = optimizer.state[params_of(optimizer)[0]]
    keys = list(state)
    saved = optimizer.state_dict()
    assert saved["state"][0]["exp_avg"]["codes"] is state["exp_avg"]
    assert list(state) == keys == ["step", "exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale"]

"""Checkpoints of bitsandbytes' and torchao's 8-bit optimizers (tests/data, made by those packages) mean to us what they mean to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from data.make_foreign import ADAM, FOLDER, MAKERS, RMSPROP, SGD, STEPS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fused_opt import foreign
from fused_opt.foreign import foreign_group_options, read_foreign
from helpers import assert_same_bits

NEST = "__bnb_optimizer_quant_state__"
ADAMW, OLD_ADAMW, TORCHAO = "bitsandbytes_AdamW8bit", "bitsandbytes_0.43_AdamW8bit", "torchao_AdamW8bit"

every_checkpoint = pytest.mark.parametrize("name", MAKERS)


class OptimState8bit(torch.Tensor):
    """Stands in for torchao's class of that name: it has what the file gives it, and no operation works on it."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(func)


def load(name: str) -> dict[str, Any]:
    with torch.serialization.safe_globals([(OptimState8bit, "torchao.optim.subclass_8bit.OptimState8bit")]):
        checkpoint: dict[str, Any] = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    return checkpoint


def first_state(name: str) -> dict[str, Any]:
    """Of the parameter that has 8-bit states, without bitsandbytes' nesting."""
    state: dict[str, Any] = load(name)["state"][0]
    nested: dict[str, Any] = state.pop(NEST, {})
    return nested | state


def load_expected(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in np.load(FOLDER / f"{name}.npz").items()}


def assert_read(checkpoint: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    slots = tuple(dict.fromkeys(key.split(".")[1] for key in expected))
    compared = set()
    for index, state in checkpoint["state"].items():
        read = read_foreign(state, slots)
        assert read is not None
        assert set(read) == {*slots, "step"}
        assert_same_bits(read["step"], torch.tensor(float(STEPS)))
        for slot in slots:
            assert_same_bits(read[slot], expected[f"{index}.{slot}"], f"parameter {index}, {slot}")
            compared.add(f"{index}.{slot}")
    assert compared == set(expected)


@every_checkpoint
def test_states_are_those_that_the_package_computes(name: str) -> None:
    checkpoint = load(name)
    if name == TORCHAO:  # its states of other parameters have torch's format
        assert all(read_foreign(checkpoint["state"].pop(index), ADAM) is None for index in (1, 2))
        assert_read(checkpoint, {key: value for key, value in load_expected(name).items() if key.startswith("0.")})
    else:
        assert_read(checkpoint, load_expected(name))


@pytest.mark.peers
@pytest.mark.filterwarnings("ignore")  # theirs
@every_checkpoint
def test_states_of_the_installed_packages(name: str) -> None:
    """As above with checkpoints made now; and the versions installed write the format that the stored ones have."""
    checkpoint, expected = MAKERS[name]()
    stored = load(name)
    for index, state in checkpoint["state"].items():
        assert list(state) == list(stored["state"][index])
        assert state.get(NEST, {}).keys() == stored["state"][index].get(NEST, {}).keys()
    assert [list(group) for group in checkpoint["param_groups"]] == [list(group) for group in stored["param_groups"]]
    if name == TORCHAO:
        checkpoint["state"], expected = {0: checkpoint["state"][0]}, {key: expected[key] for key in expected if key.startswith("0.")}
    assert_read(checkpoint, expected)


def test_bitsandbytes_before_nesting() -> None:
    """Versions 0.44 to 0.49.1."""
    checkpoint = load(ADAMW)
    for state in checkpoint["state"].values():
        state.update(state.pop(NEST))
    assert_read(checkpoint, load_expected(ADAMW))


def test_the_checkpoint_is_left_as_it_was_and_shares_no_memory() -> None:
    state = load(ADAMW)["state"][1]  # fp32 states
    before = copy.deepcopy(state)
    read = read_foreign(state, ADAM)
    assert read is not None
    for tensor in read.values():
        tensor.fill_(-1)
    assert state[NEST].keys() == before[NEST].keys()
    for key, value in before[NEST].items():
        assert_same_bits(state[NEST][key], value, key)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.RMSprop, torch.optim.SGD])
def test_torchs_own_format_is_left_to_torch(optimizer: Any) -> None:
    param = torch.nn.Parameter(torch.ones(3))
    own = optimizer([param], lr=torch.tensor(0.1))
    param.grad = torch.ones(3)
    own.step()
    saved = own.state_dict()
    assert all(read_foreign(state, ()) is None for state in ({}, *saved["state"].values()))
    for rule in ("adam", "rmsprop", "sgd"):
        assert foreign_group_options(saved["param_groups"][0], rule) is None


def test_codes_of_another_kind_are_not_torchaos() -> None:
    for value in (SimpleNamespace(codes=torch.zeros(3), scales=torch.ones(1)), SimpleNamespace(scale=torch.ones(1))):
        assert read_foreign({"exp_avg": value}, ADAM) is None


def test_a_group_of_an_old_torch_is_left_to_torch() -> None:
    assert foreign_group_options({"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}, "adam") is None


@pytest.mark.parametrize(("name", "block_size", "scales"), [(ADAMW, 256, "absmax1"), (OLD_ADAMW, 2048, "absmax1"), (TORCHAO, 128, "scale")])
def test_a_nan_scale_makes_its_block_nan(name: str, block_size: int, scales: str) -> None:
    state = first_state(name)
    (state["exp_avg"].scale if name == TORCHAO else state[scales])[1] = torch.nan
    read = read_foreign(state, ADAM)
    assert read is not None
    expected = load_expected(name)["0.exp_avg"].clone()
    expected.view(-1)[block_size : 2 * block_size] = torch.nan
    assert_same_bits(read["exp_avg"], expected)


@every_checkpoint
def test_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter of more elements than are decoded at a time, whose number is no multiple of that."""
    monkeypatch.setattr(foreign, "_PIECE", 1000)
    expected = load_expected(name)
    slots = tuple(key.split(".")[1] for key in expected if key.startswith("0."))
    read = read_foreign(load(name)["state"][0], slots)
    assert read is not None
    for slot in slots:
        assert_same_bits(read[slot], expected[f"0.{slot}"], slot)


class NewTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The sizes in bytes of the tensors made within."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # so that no two storages have one address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
                self._alive.append(tensor)
        return out


def test_temporaries_are_small() -> None:
    elements = 5 * foreign._PIECE + 3
    codes = torch.zeros(elements, dtype=torch.uint8)
    state = {"state1": codes, "qmap1": torch.linspace(-1, 1, 256), "absmax1": torch.ones(-(-elements // 256))}
    with NewTensors() as made:
        read = read_foreign(state, SGD)
    assert read is not None
    made.sizes.pop(codes.data_ptr(), None)  # seen as views
    assert made.sizes.pop(read["momentum_buffer"].data_ptr()) == 4 * elements
    assert 0 < max(made.sizes.values()) <= 4 * foreign._PIECE


def as_ademamix(state: dict[str, Any]) -> None:
    """Two moments in one tensor, and as many scales as one moment of twice the size would have."""
    state.update(state1=torch.zeros(2, 64, 64, dtype=torch.uint8), absmax1=torch.ones(2, 16))


Change = Callable[[dict[str, Any]], Any]

BAD_STATES: tuple[tuple[str, Change, tuple[str, ...], str], ...] = (
    (ADAMW, lambda s: s.pop("absmax1"), ADAM, "state1 needs 'absmax1'.*only .*'absmax2'.*in full"),
    (ADAMW, lambda s: s.pop("qmap2"), ADAM, "state2 needs 'qmap2'.*in full"),
    (ADAMW, lambda s: s.pop("state1"), RMSPROP, "checkpoint needs 'state1'.*in full"),
    (ADAMW, lambda s: None, (*ADAM, "max_exp_avg_sq"), r"2 states .*\(state1, state2\).*needs 3 .*max_exp_avg_sq.*without amsgrad"),
    (ADAMW, lambda s: None, SGD, r"2 states .*needs 1 \(momentum_buffer\).*the class that saved it"),
    (ADAMW, lambda s: None, (), r"2 states .*needs 0 \(none\)"),
    (ADAMW, lambda s: s.update(qmap1=s["qmap1"][:16]), ADAM, "table of state1 has 16 values, expected 256.*32-bit"),
    (ADAMW, lambda s: s.update(absmax2=s["absmax2"][1:]), ADAM, r"absmax2 has shape \(16,\).*4160 codes.*\(17,\), blocks of 256 or \(3,\)"),
    (ADAMW, lambda s: s.update(absmax1=s["absmax1"].expand(2, -1)), ADAM, r"absmax1 has shape \(2, 17\).*not known here; save it with"),
    (ADAMW, as_ademamix, ADAM, r"absmax1 has shape \(2, 16\), but state1 has 8192 codes; expected \(32,\)"),
    (ADAMW, lambda s: s.update(state1=s["state1"].T.contiguous().T), ADAM, r"strides \(1, 65\), expected contiguous.*as_strided"),
    (ADAMW, lambda s: s.update(state1=s["state1"].short()), ADAM, "int16, expected torch.uint8"),
    (ADAMW, lambda s: s.update(max1=s.pop("absmax1")[:1]), ADAM, "max1 and no absmax1.*block_wise=False.*block_wise=True"),
    (TORCHAO, lambda s: None, RMSPROP, "needs 'square_avg'.*only .*exp_avg"),
    (TORCHAO, lambda s: None, (*ADAM, "max_exp_avg_sq"), "needs 'max_exp_avg_sq'.*only .*exp_avg"),
    (TORCHAO, lambda s: setattr(s["exp_avg"], "scale", torch.ones(39)), ADAM, r"exp_avg has 5120 codes.*\(39,\).*equal blocks.*in full"),
    (TORCHAO, lambda s: setattr(s["exp_avg"], "scale", torch.ones(2, 20)), ADAM, r"\(2, 20\); expected one dimension"),
    (TORCHAO, lambda s: setattr(s["exp_avg"], "scale", torch.ones(0)), ADAM, r"\(0,\); expected one dimension"),
    (TORCHAO, lambda s: setattr(s["exp_avg"], "qmap", torch.ones(16)), ADAM, "table of exp_avg has 16 values, expected 256"),
    (TORCHAO, lambda s: delattr(s["exp_avg_sq"], "qmap"), ADAM, r"exp_avg_sq \(OptimState8bit\) has no table 'qmap'.*AdamW8bit"),
)


@pytest.mark.parametrize(("name", "change", "slots", "message"), BAD_STATES, ids=[row[3][:40] for row in BAD_STATES])
def test_what_cannot_be_read_is_refused(name: str, change: Change, slots: tuple[str, ...], message: str) -> None:
    state = first_state(name)
    assert read_foreign(state, ADAM) is not None
    change(state)
    with pytest.raises(ValueError, match=message):
        read_foreign(state, slots)


GROUPS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    (ADAMW, "adam", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    (OLD_ADAMW, "adam", {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("bitsandbytes_RMSprop8bit", "rmsprop", {"lr": 0.01, "alpha": 0.95, "momentum": 0.0, "eps": 1e-8, "weight_decay": 0.1}),
    ("bitsandbytes_SGD8bit", "sgd", {"lr": 0.01, "momentum": 0.8, "dampening": 0.0, "weight_decay": 0.1}),
    (TORCHAO, "adam", {"lr": float(np.float32(0.01)), "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1, "amsgrad": False}),
)
IGNORED = {"rmsprop": "momentum=0.9, but bitsandbytes' RMSprop does not apply it", "sgd": "dampening=0.1, but bitsandbytes' SGD does not"}


@pytest.mark.parametrize(("name", "rule", "expected"), GROUPS, ids=[row[0] for row in GROUPS])
def test_options_have_torchs_names_and_the_values_that_were_in_effect(name: str, rule: str, expected: dict[str, Any]) -> None:
    (group,) = load(name)["param_groups"]
    before = copy.deepcopy(group)
    if rule in IGNORED:
        with pytest.warns(UserWarning, match=IGNORED[rule]):
            options = foreign_group_options(group, rule)
    else:
        options = foreign_group_options(group, rule)
    assert options == expected
    assert type(options["lr"]) is float
    assert group == before


def test_adam_without_decay_keeps_its_kind_of_decay() -> None:
    """bitsandbytes' Adam and AdamW cannot be told apart; where nothing decays, there is nothing to say."""
    (group,) = load(ADAMW)["param_groups"]
    options = foreign_group_options({**group, "weight_decay": 0}, "adam")
    assert options is not None
    assert "decoupled_weight_decay" not in options


@pytest.mark.parametrize("name", [ADAMW, TORCHAO])
def test_keys_of_the_user_are_kept(name: str) -> None:
    (group,) = load(name)["param_groups"]
    options = foreign_group_options({**group, "initial_lr": torch.tensor(0.5), "note": "encoder"}, "adam")
    assert options is not None
    assert options["note"] == "encoder"
    assert type(options["initial_lr"]) is float
    assert options["initial_lr"] == 0.5


def test_ademamix_is_refused() -> None:
    (group,) = load(ADAMW)["param_groups"]
    with pytest.raises(ValueError, match=r"betas=\(0.9, 0.999, 0.9999\), expected 2.*AdEMAMix.*another class"):
        foreign_group_options({**group, "betas": (0.9, 0.999, 0.9999)}, "adam")


def test_one_state_of_a_parameter_can_be_plain() -> None:
    state, plain = first_state(TORCHAO), torch.full((80, 64), 0.1, dtype=torch.bfloat16)
    for value in (plain, plain.float()):
        state["exp_avg_sq"] = value
        read = read_foreign(state, ADAM)
        assert read is not None
        assert_same_bits(read["exp_avg_sq"], value.float())
        assert read["exp_avg_sq"] is not value


def test_any_object_with_their_attributes_is_read() -> None:
    """As a script without torchao could build them from tensors that it got in some other way."""
    state = first_state(TORCHAO)
    for slot in ADAM:
        value = state[slot]
        state[slot] = SimpleNamespace(codes=value.codes, scale=value.scale, qmap=value.qmap)
    read = read_foreign(state, ADAM)
    assert read is not None
    assert_same_bits(read["exp_avg_sq"], load_expected(TORCHAO)["0.exp_avg_sq"])

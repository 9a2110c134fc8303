"""The kernel that computes a step's scalars on the device, where step counters or learning rate are: nobody has to wait for them.

It also counts the steps, and leaves all out where a gradient scaler found infinities. Its formulas are those of fused_opt/rules.py.
"""

import types

import triton
import triton.language as tl

from fused_opt import rules as specs
from fused_opt import stages as stage_specs
from fused_opt.kernels.step import COLUMNS, GRAD_SCALE, RUN, SCALAR_COLUMNS, SCALARS, STAGE_SCALARS

# Columns of `tensors`, beside those in kernels/step.py.
CONSTANTS = tl.constexpr(11)  # row of `constants`
COUNTER = tl.constexpr(12)  # address of the step counter, or 0
COUNTER_IS_DOUBLE = tl.constexpr(13)

# Columns of `constants`, float64, a row for each cohort of tensors.
LR = tl.constexpr(0)
LR_ADDRESS = tl.constexpr(1)  # an integer's bits; 0 if `LR` has the value
LR_IS_DOUBLE = tl.constexpr(2)
STEP = tl.constexpr(3)  # of this step, where there is no counter on the device
FIRST_CONSTANT = tl.constexpr(4)
STAGE_CONSTANTS = tl.constexpr(10)  # and eight more
N_STAGE_CONSTANTS = tl.constexpr(9)
CONSTANT_COLUMNS = tl.constexpr(20)


def _compiled(function):
    """With `tl` among its globals, which Triton's interpreter insists on."""
    return triton.jit(types.FunctionType(function.__code__, {"tl": tl, "__name__": __name__}, function.__name__))


# Name of a rule -> formula and number of constants.
FORMULAS = {rule.name: (_compiled(rule.scalars), constants) for rule, constants in ((specs.ADAM, 6), (specs.RMSPROP, 5), (specs.SGD, 4))}
stage_scalars = _compiled(stage_specs.stage_scalars)


@triton.jit
def power(base, exponent):
    """base ** exponent for a whole exponent of 0 or more, by squaring, as float64."""
    result = base * 0.0 + 1.0
    left = exponent.to(tl.int64)
    while left > 0:
        if left % 2 == 1:
            result = result * base
        base = base * base
        left = left // 2
    return result


@triton.jit
def root(x):
    return tl.sqrt(x)


@triton.jit
def select(condition, yes, no):
    return tl.where(condition, yes, no)


@triton.jit
def floor(x):
    return tl.floor(x)


@triton.jit
def clip_factor(norm, max_norm):
    """As torch.nn.utils.clip_grad_norm_ has it, in fp32: a number divided by a tensor is its reciprocal times the number. NaN stays.

    But 1 if `max_norm` is infinite, which only measures, where torch makes NaN of an infinite norm.
    """
    factor = tl.div_rn(tl.full((), 1.0, tl.float32), norm + 1e-6) * max_norm
    return tl.where((factor > 1.0) | (max_norm - max_norm != 0.0), 1.0, factor)


@triton.jit
def load_real(address, IS_DOUBLE):
    """A float32 or float64 number, as float64."""
    if IS_DOUBLE != 0:
        x = tl.load(address.to(tl.pointer_type(tl.float64)))
    else:
        x = tl.load(address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return x


@triton.jit
def compute_scalars(
    tensors, constants, scalars, found_inf, grad_scale, norm, max_norm: tl.float32,
    FORMULA: tl.constexpr, N_CONSTANTS: tl.constexpr, STAGED: tl.constexpr, OF_GRADIENT: tl.constexpr, SKIPS: tl.constexpr,
):  # fmt: skip
    """Of the tensor in row `program_id` of `tensors`.

    `found_inf`, `grad_scale` and `norm`: pointers to float32, or None. With a norm gradients are shortened to `max_norm`, and with SKIPS
    the step is left out where it is not finite. STAGED: whether there are stages, OF_GRADIENT: whether one has the factor of gradients.
    """
    row = tensors + tl.program_id(0) * COLUMNS
    own = constants + tl.load(row + CONSTANTS) * CONSTANT_COLUMNS
    out = scalars + tl.load(row + SCALARS) * SCALAR_COLUMNS
    run = tl.load(own + STEP) * 0.0 + 1.0
    if found_inf is not None:
        run = tl.where(tl.load(found_inf) != 0.0, 0.0, run)
    if SKIPS:
        run = tl.where(tl.load(norm) - tl.load(norm) == 0.0, run, 0.0)
    step = tl.load(own + STEP)
    counter = tl.load(row + COUNTER)
    if counter != 0:
        is_double = tl.load(row + COUNTER_IS_DOUBLE)
        step = load_real(counter, is_double) + run
        if is_double != 0:
            tl.store(counter.to(tl.pointer_type(tl.float64)), step)
        else:
            tl.store(counter.to(tl.pointer_type(tl.float32)), step.to(tl.float32))
    lr = tl.load(own + LR)
    lr_address = tl.load(own + LR_ADDRESS).to(tl.int64, bitcast=True)
    if lr_address != 0:
        lr = load_real(lr_address, tl.load(own + LR_IS_DOUBLE))
    factor = run * 0.0 + 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
        factor = factor / scale.to(tl.float64)
        tl.store(out + GRAD_SCALE, scale)
    if norm is not None:
        factor = factor * clip_factor(tl.load(norm), max_norm).to(tl.float64)
    c = ()
    for k in tl.static_range(N_CONSTANTS):
        c = c + (tl.load(own + FIRST_CONSTANT + k),)
    values = FORMULA(c, lr, step, factor, power, root)
    for k in tl.static_range(len(values)):
        value = values[k].to(tl.float32)
        if OF_GRADIENT and k == 0:
            value = tl.full((), 1.0, tl.float32)
        tl.store(out + k, value)
    if STAGED:
        c = ()
        for k in tl.static_range(N_STAGE_CONSTANTS):
            c = c + (tl.load(own + STAGE_CONSTANTS + k),)
        of_stages = stage_scalars(c, lr, step, values[0], select, floor)
        for k in tl.static_range(len(of_stages)):
            tl.store(out + STAGE_SCALARS + k, of_stages[k].to(tl.float32))
    tl.store(out + RUN, run.to(tl.float32))

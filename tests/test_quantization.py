"""Values in 8-bit codes: each code against its formula in float64, for every dtype, size, stride and magnitude; rounding at random."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fused_opt import QuantizedTensor, dequantize_blockwise, quantize_blockwise
from fused_opt.quantization import BLOCK_SIZES, dynamic_table
from helpers import SUPPORTED_ISAS, assert_same_bits
from layouts import SHAPES, Layout, layouts

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# Around the ends of blocks, of groups of 8 codes, and of the 4096 that pass through scratch memory together.
SIZES_AND_BLOCK_SIZES: tuple[tuple[int, int | None], ...] = (
    *((size, 32) for size in (0, 1, 7, 8, 9)),
    *((size, block_size) for block_size in BLOCK_SIZES for size in (block_size - 1, block_size, block_size + 1, 3 * block_size + 7)),
    *((size, None) for size in (0, 1, 9, 4096, 4097, 12_289)),
)

# The same examples in each run; see test_properties.py.
PROFILE: dict[str, Any] = {"derandomize": True, "deadline": None, "database": None, "suppress_health_check": [HealthCheck.too_slow]}


def examples(count: int) -> settings:
    return settings(settings.get_profile("default"), max_examples=count, **PROFILE)


@dataclass(frozen=True)
class Code:
    """A code as it is documented.

    Attributes:
        levels: the numbers from -1 to 1 that the codes stand for, ascending from the code `first` on.
        bound: of the distance between a number from -1 to 1 and what its code stands for, without a seed.
        least_scale: blocks whose largest magnitude is less have codes relative to it.
    """

    first: int
    levels: torch.Tensor
    bound: Callable[[torch.Tensor], torch.Tensor]
    least_scale: float = 0.0

    @property
    def signed(self) -> bool:
        return bool(self.levels[0] < 0)


def mulaw_levels(first: int, last: int, mu: int) -> torch.Tensor:
    codes = torch.arange(first, last + 1, dtype=torch.float64)
    octave, sixteenths = codes.abs() // 16, codes.abs() % 16
    return codes.sign() * (2**octave * (1 + sixteenths / 16) - 1) / mu


def dynamic_levels(signed: bool) -> torch.Tensor:
    parts = [2 ** (k + (not signed)) for k in range(7)]
    middles = torch.cat([(0.1 + 0.9 * (torch.arange(n, dtype=torch.float64) + 0.5) / n) * 10.0 ** (k - 6) for k, n in enumerate(parts)])
    return torch.cat([torch.tensor([0.0, 1.0], dtype=torch.float64), middles, *([-middles] if signed else [])]).sort().values


def half_the_distance_between(levels: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def bound(x: torch.Tensor) -> torch.Tensor:
        above = torch.searchsorted(levels, x).clamp(1, len(levels) - 1)
        # Below the lowest entry, -0.993, there is none to the other side.
        return torch.maximum((levels[above] - levels[above - 1]) / 2, levels[0] - x)

    return bound


DYNAMIC, UNSIGNED_DYNAMIC = dynamic_levels(True), dynamic_levels(False)
SMALLEST = 1 / (16 * 63487)  # of the unsigned mu-law code: what is positive is rounded up to it, however little it is

CODES = {
    "linear": Code(-127, torch.arange(-127, 128, dtype=torch.float64) / 127, lambda x: torch.full_like(x, 1 / 254), 127 * 2.0**-126),
    "mulaw": Code(-127, mulaw_levels(-127, 127, 247), lambda x: (x.abs() + 1 / 247) / 32, 247 * 2.0**-126),
    "unsigned_mulaw": Code(
        0,
        mulaw_levels(0, 255, 63487),
        lambda x: torch.where((x > 0) & (x < SMALLEST / 2), SMALLEST - x, (x + 1 / 63487) / 32),
        63487 * 2.0**-126,
    ),
    "dynamic": Code(0, DYNAMIC, half_the_distance_between(DYNAMIC)),
    "unsigned_dynamic": Code(0, UNSIGNED_DYNAMIC, half_the_distance_between(UNSIGNED_DYNAMIC)),
}
SEEDS = (None, 0, 2**64 - 1)
every_code = pytest.mark.parametrize("code", CODES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def random_values(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    code: str,
    seed: int,
    largest: float = 1.0,
    decades: float = 3.0,
    zeros: float = 0.1,
) -> torch.Tensor:
    """Magnitudes of up to so many decades below `largest`; a share of zeros of either sign. Negative ones if the code has a sign."""
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> torch.Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator)

    limit = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    values = (largest * 10 ** (-decades * uniform())).clamp(max=limit)
    values = torch.where(uniform() < zeros, 0.0, values)
    return torch.where(uniform() < (0.5 if CODES[code].signed else 0.0), -values, values).to(dtype)


def in_blocks(tensor: torch.Tensor, axis: int | None) -> torch.Tensor:
    """Its elements, in the order in which blocks run."""
    return (tensor if axis is None else tensor.movedim(axis, 0)).reshape(-1)


def check(x: torch.Tensor, q: QuantizedTensor, seeded: bool = False) -> None:
    """All that is documented about the codes of `x`."""
    assert (q.codes.shape, q.dtype) == (x.shape, x.dtype)
    code, size = CODES[q.code], q.block_size
    flat = in_blocks(x.detach(), q.axis).float()
    count = -(-len(flat) // size)
    padded = torch.nn.functional.pad(flat, (0, count * size - len(flat)))
    assert_same_bits(q.scales, padded.view(count, size).abs().amax(1) if count else torch.empty(0), "scales")

    places = in_blocks(q.codes, q.axis).long() - code.first
    assert bool(((places >= 0) & (places < len(code.levels))).all()), "a code that stands for nothing"
    largest = q.scales.double().repeat_interleave(size)[: len(flat)]
    meant, scales = code.levels[places], largest.clamp(min=code.least_scale)
    decoded = in_blocks(dequantize_blockwise(q, torch.empty(x.shape)), q.axis)
    # 4 roundings of decoding at the most; a subnormal number is rounded to a multiple of 2^-149.
    assert bool(((decoded.double() - meant * scales).abs() <= meant.abs() * scales * 2**-22 + 2**-149).all())

    relative = torch.where(scales > 0, flat.double() / scales, 0.0)
    above = torch.searchsorted(code.levels, relative).clamp(1, len(code.levels) - 1)
    gap = code.levels[above] - code.levels[above - 1]
    distance = (meant - relative).abs()
    slack = gap * 2**-12  # of arithmetic in float32: what is halfway may go either way
    assert bool((distance <= (2 if seeded else 1) * code.bound(relative) + slack).all()), "the documented bound"
    to_neighbours = torch.stack([relative - code.levels[above - 1], code.levels[above] - relative]).abs()
    to_neighbour = to_neighbours.amax(0) if seeded else to_neighbours.amin(0)
    never_zero = (flat > 0) if q.code == "unsigned_mulaw" else torch.zeros_like(flat, dtype=torch.bool)
    assert bool(((distance <= to_neighbour + slack) | never_zero & (places == 1)).all()), "not rounded to the nearest, or a neighbour"
    assert bool((places[never_zero] > 0).all()), "a positive value became zero"

    assert bool((decoded[flat == 0] == 0).all())
    kept = (flat.abs() == largest) & (largest >= code.least_scale) & ((flat >= 0) | (q.code != "dynamic"))
    if q.code.endswith("mulaw"):
        assert bool(((decoded[kept].double() - flat[kept]).abs() <= scales[kept] * 2**-22).all()), "largest magnitudes"
    else:
        assert_same_bits(decoded[kept] + 0.0, flat[kept] + 0.0, "largest magnitudes")


# --- which values, of which dtype, shape and size ---


@every_dtype
@every_code
def test_every_size_and_block_size(code: str, dtype: torch.dtype) -> None:
    for (size, block_size), seed in itertools.product(SIZES_AND_BLOCK_SIZES, (None, 5)):
        x = random_values((size,), dtype, code, seed=size)
        q = quantize_blockwise(x, block_size, code=code, seed=seed)
        assert (q.block_size, q.axis) == (block_size or max(size, 1), None)
        check(x, q, seeded=seed is not None)


@every_dtype
@every_code
def test_scales_along_an_axis(code: str, dtype: torch.dtype) -> None:
    """Blocks of any length, even longer than the longest of the others; an empty axis; a weight of a convolution, channels last."""
    for shape in ((3, 5), (2, 4097), (70, 65), (5, 3, 3, 2), (1,), (4, 0), (0, 4), (2, 9001)):
        x = random_values(shape, dtype, code, seed=1)
        views = [x, x.transpose(0, -1).contiguous().transpose(0, -1)]
        if x.dim() == 4:
            views.append(x.contiguous(memory_format=torch.channels_last))
        for axis, view in itertools.product(range(-x.dim(), x.dim()), views):
            q = quantize_blockwise(view, axis=axis, code=code)
            assert len(q.scales) == (shape[axis] if x.numel() else 0)
            check(view, q)


@dataclass(frozen=True)
class Example:
    """A tensor and how it is quantized."""

    x: torch.Tensor
    options: dict[str, Any]


@st.composite
def quantizations(draw: st.DrawFn, codes: tuple[str, ...] = tuple(CODES)) -> Example:
    code = draw(st.sampled_from(codes))
    shape: tuple[int, ...] = draw(SHAPES)
    layout: Layout = draw(layouts(len(shape), expanded=True))
    storage = random_values(
        (layout.extent(shape),),
        draw(st.sampled_from(DTYPES)),
        code,
        seed=draw(st.integers(0, 2**20)),
        largest=10.0 ** draw(st.integers(-46, 38)),
        decades=draw(st.sampled_from([0.0, 1.0, 6.0, 40.0])),
        zeros=draw(st.sampled_from([0.0, 0.5, 1.0])),
    )
    options: dict[str, Any] = {"code": code, "seed": draw(st.one_of(st.none(), st.integers(0, 2**64 - 1)))}
    if bool(shape) and draw(st.booleans()):
        options["axis"] = draw(st.integers(-len(shape), len(shape) - 1))
    else:
        options["block_size"] = draw(st.sampled_from([*BLOCK_SIZES, None]))
    return Example(layout.view(storage, shape), options)


@examples(300)
@given(example=quantizations())
def test_any_layout_magnitude_and_option(example: Example) -> None:
    before = example.x.clone()
    check(example.x, quantize_blockwise(example.x, **example.options), seeded=example.options["seed"] is not None)
    assert_same_bits(example.x, before, "the input")


@examples(150)
@given(example=quantizations(tuple(code for code in CODES if code != "dynamic")), seed=st.sampled_from(SEEDS))
def test_what_was_dequantized_has_the_same_codes(example: Example, seed: int | None) -> None:
    q = quantize_blockwise(example.x.float(), **example.options)
    decoded = q.dequantize()
    assume(not bool(((decoded.abs() < 1e-37) & (decoded != 0)).any()))  # subnormal: there are not as many of them as codes
    again = quantize_blockwise(decoded, **{**example.options, "seed": seed})
    assert torch.equal(again.codes, q.codes)
    assert_same_bits(again.dequantize(), decoded)


@every_code
def test_every_power_of_two(code: str) -> None:
    """A block of each magnitude that float32 has, from the smallest subnormal number to the largest."""
    first, last = -149, 127
    magnitudes = 2.0 ** torch.arange(first, last + 1, dtype=torch.float64)
    block = torch.linspace(-1 if CODES[code].signed else 0, 1, 256, dtype=torch.float64)
    x = (magnitudes[:, None] * block * (2 - 2**-23)).float()
    assert bool(x.isfinite().all())
    for seed in SEEDS:
        check(x, quantize_blockwise(x, code=code, seed=seed), seeded=seed is not None)


@pytest.fixture
def flush_denormal() -> Iterator[Callable[[bool], None]]:
    """Call it to make this thread's processor take subnormal numbers for zero, or not, until the test ends."""

    def flush(on: bool) -> None:
        assert torch.set_flush_denormal(on)

    yield flush
    torch.set_flush_denormal(False)


@every_code
def test_flushing_subnormal_numbers(code: str, flush_denormal: Callable[[bool], None]) -> None:
    """They may count as zero then; the smallest of float16 are none in float32, and are kept."""
    x = random_values((4096,), torch.float32, code, seed=2, largest=1e-36, decades=9.0)
    half = random_values((4096,), torch.float16, code, seed=2, largest=1e-6)
    assert bool((half.abs()[half != 0] < 6.1e-5).all())
    expected = quantize_blockwise(half, 32, code=code)
    flush_denormal(True)
    q, q_half = quantize_blockwise(x, 32, code=code), quantize_blockwise(half, 32, code=code)
    decoded = q.dequantize()
    flush_denormal(False)
    assert torch.equal(q_half.codes, expected.codes)
    assert_same_bits(q_half.scales, expected.scales)
    scales = q.scales.double().repeat_interleave(32)
    scales = scales.clamp(min=CODES[code].least_scale)
    bound = CODES[code].bound(torch.where(scales > 0, x.double() / scales, 0.0)) * scales
    assert bool(((decoded.double() - x.double()).abs() <= bound * 1.001 + 2**-126).all())


def test_numbers_of_float64_are_read_as_float32() -> None:
    x = random_values((5000,), torch.float64, "linear", seed=3, decades=0.01)
    assert bool((x.float().double() != x).any())
    a, b = quantize_blockwise(x), quantize_blockwise(x.float())
    assert torch.equal(a.codes, b.codes)
    assert_same_bits(a.scales, b.scales)


def test_the_dynamic_tables() -> None:
    for signed, levels in ((True, DYNAMIC), (False, UNSIGNED_DYNAMIC)):
        table = dynamic_table(signed)
        assert (table.shape, table.dtype) == ((256,), torch.float32)
        torch.testing.assert_close(table.double(), levels, rtol=1e-6, atol=0)


# --- dequantize ---


@examples(120)
@given(example=quantizations(), dtype=st.sampled_from(DTYPES), data=st.data())
def test_dequantize_rounds_once_into_any_layout(example: Example, dtype: torch.dtype, data: st.DataObject) -> None:
    """And writes to no other byte."""
    q = quantize_blockwise(example.x, **example.options)
    exact = torch.empty(q.shape)
    assert dequantize_blockwise(q, exact) is exact
    layout: Layout = data.draw(layouts(exact.dim()))
    storage = torch.full((layout.extent(q.shape) + 3,), 7.0, dtype=dtype)
    expected = storage.clone()
    layout.view(expected, q.shape).copy_(exact)
    out = layout.view(storage, q.shape)
    assert q.dequantize(out) is out
    assert_same_bits(storage, expected)
    made = q.dequantize()
    assert made.is_contiguous()
    assert_same_bits(made, exact.to(example.x.dtype))


@every_code
def test_large_results(code: str, threads: Callable[[int], None]) -> None:
    """From 2^23 elements on they are written past the caches (by instructions that test_vector_code.py looks for); to where vectors start,
    and beside."""
    x = random_values((2**23 + 300,), torch.float32, code, seed=9)
    q = quantize_blockwise(x, 4096, code=code)
    for count, offset in itertools.product((1, 3), (0, 1)):
        threads(count)
        storage = torch.full((len(x) + 2,), 7.0)
        q.dequantize(storage[offset : offset + len(x)])
        assert float(storage[len(x) + 1 if offset == 0 else 0]) == 7.0
        for first in range(0, len(x), 2**22):  # too few for that
            part = slice(first, first + 2**22)
            expected = QuantizedTensor(
                q.codes[part], q.scales[first // 4096 : -(-min(first + 2**22, len(x)) // 4096)], code, x.dtype, 4096
            ).dequantize()
            assert_same_bits(storage[offset:][: len(x)][part], expected)


def test_every_code_of_a_block(use_isa: Callable[[str], None]) -> None:
    """Also -128, which quantizing never makes."""
    for name, code in CODES.items():
        signed = quantize_blockwise(torch.ones(1), code=name).codes.dtype == torch.int8
        codes = torch.arange(-128, 128, dtype=torch.int8) if signed else torch.arange(256, dtype=torch.int32).to(torch.uint8)
        results = []
        for isa in SUPPORTED_ISAS:
            use_isa(isa)
            results.append(QuantizedTensor(codes, torch.tensor([3.0]), name, torch.float32, 256).dequantize())
        known = codes.long() - code.first >= 0
        torch.testing.assert_close(results[0][known].double(), 3 * code.levels, rtol=1e-6, atol=0)
        for other in results[1:]:
            assert_same_bits(other, results[0], name)


def test_a_scale_that_is_nan_shows_everywhere() -> None:
    """As the optimizers' blocks have it, whose gradients were not finite."""
    for name in CODES:
        made = quantize_blockwise(torch.linspace(0, 1, 100), 64, code=name)
        made.scales[0] = math.nan
        decoded = made.dequantize()
        assert bool(decoded[:64].isnan().all())
        assert bool(decoded[64:].isfinite().all())


# --- rounding at random, instruction sets and threads ---

ERROR_RATE = 1e-6  # of a fair rounding with other seeds than these failing the next test


@every_code
def test_random_rounding_is_right_on_average(code: str) -> None:
    """Means of independent errors, each in an interval as long as the distance of two codes, by Hoeffding's inequality: at each of a
    block's 32 places over 128 blocks and 500 seeds (to 1.2% of that distance), and of each element over the seeds (to 15%)."""
    blocks, size, seeds = 128, 32, 500
    smallest = float(CODES[code].levels[CODES[code].levels > 0][0])
    x = random_values((blocks, size), torch.float32, code, seed=4, zeros=0.0, decades=2.5)
    assert bool((x.abs() / x.abs().amax(1, keepdim=True) > (0 if CODES[code].signed else smallest)).all())
    if code == "dynamic":
        x.clamp_(min=-0.99)[:, 0] = 1.0  # the lowest entry is -0.993, and what is below has one neighbour only
    relative = x.double() / x.abs().amax(1, keepdim=True)
    levels = CODES[code].levels
    above = torch.searchsorted(levels, relative).clamp(1, len(levels) - 1)
    gap = (levels[above] - levels[above - 1]) * x.abs().amax(1, keepdim=True)
    errors = torch.zeros(blocks, size, dtype=torch.float64)
    for seed in range(seeds):
        decoded = quantize_blockwise(x, size, code=code, seed=seed).dequantize()
        errors += (decoded.double() - x.double()) / gap
    errors /= seeds

    def limit(means: int, samples: int) -> float:
        return math.sqrt(math.log(2 * means / ERROR_RATE) / (2 * samples))

    as_good_as_kept = (errors * gap).abs() <= x.abs() * (2**-22 if code.endswith("mulaw") else 0)
    assert int(((x.abs() == x.abs().amax(1, keepdim=True)) & as_good_as_kept).sum()) >= blocks
    assert float(errors.abs().max()) <= limit(blocks * size, seeds)
    assert float(errors.mean(0).abs().max()) <= limit(size, blocks * seeds)


@every_code
def test_seeds(code: str) -> None:
    """Each rounds in its own way, but the same one always in the same; equal blocks are rounded differently."""
    x = random_values((256,), torch.float32, code, seed=6).repeat(64)
    seeds = (0, 1, 2, 2**31, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    codes = [quantize_blockwise(x, code=code, seed=seed).codes for seed in seeds]
    for seed, own in zip(seeds, codes, strict=True):
        assert torch.equal(quantize_blockwise(x, code=code, seed=seed).codes, own)
    for a, b in itertools.combinations([*codes, quantize_blockwise(x, code=code).codes], 2):
        assert 0.1 < float((a != b).float().mean()) < 0.6
    assert len(codes[0].view(64, 256).unique(dim=0)) == 64


@pytest.mark.parametrize("seed", [None, 2**40 + 1])
@every_code
def test_isas_and_threads(code: str, seed: int | None, use_isa: Callable[[str], None], threads: Callable[[int], None]) -> None:
    """As many elements as keep three threads busy; blocks that do not end where their shares do."""
    x = random_values((373, 271), torch.float32, code, seed=8, decades=6.0)
    inputs = (x, x.bfloat16().t(), x.double()[:, 3:].movedim(0, 1), x.half())
    options = ({"block_size": 32}, {"block_size": 4096}, {"block_size": None}, {"axis": 1})
    results = []
    for isa, count in itertools.product(SUPPORTED_ISAS, (1, 2, 3)):
        use_isa(isa)
        threads(count)
        made = [quantize_blockwise(tensor, code=code, seed=seed, **option) for tensor in inputs for option in options]
        with_gaps = [torch.empty(*q.shape, 2)[..., 0] for q in made]
        results.append([t for q, out in zip(made, with_gaps, strict=True) for t in (q.codes, q.scales, q.dequantize(), q.dequantize(out))])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_same_bits(a, b)

"""exp and tanh of 16 lanes, each with its derivation."""

import math
from collections import namedtuple
from functools import partial

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastxent._simd.numba_backend import by_types, inlined
from fastxent._simd.vector import I32, I64, SCALAR, WIDE, absolute, at_least, call_llvm, fma, lanes_of, pick, splat, where

# exp(x - m) for x <= m, with exp(0) exactly 1 and without the rounding error of x - m, which is the largest one of a plain
# exp(x - m): half an ulp of x - m = -12.3 is 4e-7, and becomes the relative error of the exponential. With n = STEPS:
#   k   = round(n (x - m) / ln 2), by adding 1.5 * 2^(mantissa bits): the sum's low bits are k, rounded by the adder.
#   r   = x - m - k ln(2)/n, |r| <= ln(2)/2n, exact but for its own rounding and a smaller one: m is split into base + coarse +
#         fine, and ln(2)/n into high + low (Cody, Waite), where coarse and high are multiples of so large a power of two (the
#         grid) that c = coarse + k high is exact; r = (x - base - c) - (fine + k low). If m is too large for the grid, base is
#         m and the other parts are 0: x - base is exact then for every x that matters.
#   e^r = 1 + r + r^2 q(r), with q interpolated at Chebyshev nodes: its error is 0.2 (f32), 0.002 (f64) of a half-ulp, and with
#         the table 0.08 and 0.25.
#   2^(k/n) is made by shifting the low bits so that those of k // n are in the exponent field: as n (bias + UP) is in the added
#         number, they are k // n + bias + UP. Those of i = k % n, just below, are replaced by a table's mantissa of 2^(i/n).
#         2^(k/n) e^r = 2^(k/n) + 2^(k/n) (r + r^2 q(r)), rounded once; a number of the table is rounded too.
# With AVX-512, one instruction looks 16 lanes up in a table of 16 numbers, by the low bits of an index. That saves three terms
# of q of float32, and six of float64: benchmarks/LOG.md#a-table-for-exp. Elsewhere n = 1.
# Softmax needs only ratios of exponentials. So exp_scaled returns exp(x - m) 2^UP, UP = 24 or 52: the factor cancels, and a
# probability too small for a normal number keeps its bits until the last multiplication rounds it to a denormal one.
# At x - m = -(bias + UP) ln 2 the low bits are 0, and for x below it, also -inf, the result is exactly 0.

_Q32 = (0.5, 0.16666575, 0.041666552, 0.008363472, 0.0013926551)
_Q64 = (
    0.5, 0.1666666666666667, 0.04166666666666667, 0.008333333333325848, 0.0013888888888883544,
    0.00019841269875819578, 2.4801587326261104e-05, 2.755725413931689e-06, 2.7557272742699346e-07,
    2.5105739219586713e-08, 2.0915059884917686e-09,
)  # fmt: skip
SHORT = 5  # a polynomial of at most this many terms is evaluated term by term
_GRID = {"f32": 2.0**-9, "f64": 2.0**-32}
FORMAT = {  # mantissa bits, exponent bias, UP, ln 2 high part (a multiple of the grid), ln 2 low part, coefficients of q
    "f32": (23, 127, 24, 0.693359375, -2.1219444005469057e-4, _Q32),
    "f64": (52, 1023, 52, 6.93147180369123816490e-01, 1.90821492927058770002e-10, _Q64),
}
_BY_TABLE = {  # the same for n = 16: ln(2)/n high and low part, coefficients of q
    "f32": (0.04296875, 0.00035294878499658185, (0.5000097749180301, 0.16666862164590476)),
    "f64": (
        0.04332169867120683, 1.1378974990650914e-10,
        (0.5, 0.1666666666530169, 0.04166666666496045, 0.008333449701253456, 0.0013889034348599464),
    ),
}  # fmt: skip
LOOKED_UP = 4 if WIDE else 0  # bits of k by which the table is read
STEPS = 2**LOOKED_UP


def polynomial_of(coefficients):
    """Return a jitted ``c0 + c1 x + c2 x^2 + ...`` of x and x^2, by Horner's rule.

    A short one is evaluated in x, with the fewest instructions; a long one in x^2, over pairs of terms, which are independent.
    """

    @intrinsic
    def polynomial(typingctx, x, xx):
        vector = lanes_of(SCALAR[x.kind], x.lanes)
        constants = [ir.Constant(vector, [c] * x.lanes) for c in coefficients]

        def codegen(context, builder, sig, args):
            fused = partial(call_llvm, builder, f"llvm.fmuladd.v{x.lanes}{x.kind}", vector)
            terms, variable = constants, args[0]
            if len(constants) > SHORT:
                pairs = [fused([args[0], b, a]) for a, b in zip(constants[::2], constants[1::2], strict=False)]
                terms, variable = pairs + constants[2 * len(pairs) :], args[1]  # an odd term has no partner
            *rest, y = terms
            for term in reversed(rest):
                y = fused([y, variable, term])
            return y

        return x(x, xx), codegen

    return polynomial


@intrinsic
def _power_of_two(typingctx, shifted):
    """Return ``2^(n - bias)`` from ``shifted = 1.5 2^mantissa + n``, n >= 0; 0 for n = 0."""
    mantissa = FORMAT[shifted.kind][0]
    integer = {"f32": I32, "f64": I64}[shifted.kind]

    def codegen(context, builder, sig, args):
        ints = lanes_of(integer, shifted.lanes)
        field = builder.shl(builder.bitcast(args[0], ints), ir.Constant(ints, [mantissa] * shifted.lanes))
        return builder.bitcast(field, args[0].type)

    return shifted(shifted), codegen


def _exp_constants(kind):
    """Return ln(2)/n, high and low part, and the coefficients of q."""
    return _BY_TABLE[kind] if STEPS > 1 else FORMAT[kind][3:]


def _mantissas(kind):
    """Return the mantissa bits of 2^(i/n), less those of i where ``_power_of_two`` has shifted them to."""
    mantissa, bias, *_ = FORMAT[kind]
    number, integer = {"f32": (np.float32, np.int32), "f64": (np.float64, np.int64)}[kind]
    bits = np.exp2(np.arange(STEPS) / STEPS).astype(number).view(integer).tolist()
    return [b - (bias << mantissa) - (i << (mantissa - LOOKED_UP)) for i, b in enumerate(bits)]


def _looked_up(builder, table, index):
    """Return the lanes of a table of 16 integers that the low bits of ``index``, of any number of lanes, choose."""
    whole, found = index.type, []
    lanes = 512 // whole.element.width
    register = lanes_of(whole.element, lanes)
    halves = [ir.Constant(register, table[first : first + lanes]) for first in range(0, len(table), lanes)]
    for first in range(0, whole.count, lanes):
        part = pick(builder, index, index, list(range(first, first + lanes)))
        if len(halves) == 1:
            found.append(call_llvm(builder, "llvm.x86.avx512.permvar.si.512", register, [halves[0], part]))
        else:
            found.append(call_llvm(builder, "llvm.x86.avx512.vpermi2var.q.512", register, [halves[0], part, halves[1]]))
    while len(found) > 1:
        order = list(range(2 * found[0].type.count))
        found = [pick(builder, a, b, order) for a, b in zip(found[::2], found[1::2], strict=True)]
    return found[0]


@intrinsic
def _power_by_table(typingctx, shifted):
    """Return ``2^(k/n - bias)`` from ``shifted = 1.5 2^mantissa + k``, k >= 0; for k < n a denormal number, for k = 0 0."""
    mantissa = FORMAT[shifted.kind][0]
    integer = {"f32": I32, "f64": I64}[shifted.kind]
    table = _mantissas(shifted.kind)

    def codegen(context, builder, sig, args):
        ints = lanes_of(integer, shifted.lanes)
        low = builder.bitcast(args[0], ints)
        field = builder.shl(low, ir.Constant(ints, [mantissa - LOOKED_UP] * shifted.lanes))
        return builder.bitcast(builder.add(field, _looked_up(builder, table, low)), args[0].type)

    return shifted(shifted), codegen


_power_of_step = _power_by_table if STEPS > 1 else _power_of_two


Shift = namedtuple("Shift", "base coarse fine lowest")  # m = base + coarse + fine; x - base below which exp_scaled is 0


def shift_by(m):
    """Return what ``exp_scaled`` needs of the maximum ``m``; -inf counts as 0, for -inf - -inf would be nan."""
    raise TypeError("shift_by is for kernels")


@by_types(shift_by)
def _shift_by(m):
    mantissa, bias, up, *_ = FORMAT[m.kind]
    to_grid = 1.5 * 2.0**mantissa * _GRID[m.kind]  # adding and subtracting it rounds to the grid
    reach = to_grid / 3.0
    lowest = -(bias + up) * math.log(2.0)

    def shift_by(m):
        m = where(m == -math.inf, splat(m, 0.0), m)
        far = absolute(m) >= reach
        near = where(far, splat(m, 0.0), m)
        coarse = (near + to_grid) - to_grid
        return Shift(where(far, m, 0.0), coarse, near - coarse, coarse + lowest)

    return shift_by


@inlined
def _minus(x, base):
    return x - base


@inlined
def _itself(x, base):
    return x


def reduce_argument(x, shift):
    """Return ``(r, 2**(k + UP))``, from which ``exp_reduced`` computes ``exp(x - m) * 2**UP``: see ``exp_scaled``."""
    raise TypeError("reduce_argument is for kernels")


@by_types(reduce_argument)
def _reduce_argument(x, shift):
    mantissa, bias, up, *_ = FORMAT[x.kind]
    high, low, _ = _exp_constants(x.kind)
    offset = 1.5 * 2.0**mantissa + STEPS * (bias + up)
    steps_per_e = STEPS / math.log(2.0)
    less = _itself if shift.types[0] == types.none else _minus

    def reduce(x, shift):
        x = at_least(less(x, shift.base), shift.lowest)
        shifted = fma(x - shift.coarse, steps_per_e, splat(x, offset))
        k = shifted - offset
        r = (x - fma(k, high, shift.coarse)) - fma(k, low, shift.fine)
        return r, _power_of_step(shifted)

    return reduce


def exp_reduced(r, power):
    """Return ``power e^r``, |r| <= ln(2)/2n."""
    raise TypeError("exp_reduced is for kernels")


@by_types(exp_reduced)
def _exp_reduced(r, power):
    q_of = polynomial_of(_exp_constants(r.kind)[-1])

    def exp_of(r, power):
        rr = r * r
        return fma(power, fma(rr, q_of(r, rr), r), power)

    return exp_of


@inlined
def exp_scaled(x, shift):
    """Return ``exp(x - m) * 2**UP`` for ``x <= m``, -inf and nan, with an error below 1.5 ulp; ``shift = shift_by(m)``.

    A base that is 0 may be passed as None, which saves one operation.
    """
    r, power = reduce_argument(x, shift)
    return exp_reduced(r, power)


def tanh(x, height):
    """Return ``height tanh(x)``, to some ulps also near 0: with d = -2 |x|, e^d - 1 = 2^k (e^r - 1) + (2^k - 1)."""
    raise TypeError("tanh is for kernels")


@by_types(tanh)
def _tanh(x, height):
    mantissa, bias, _, ln2_high, ln2_low, q = FORMAT[x.kind]
    offset = 1.5 * 2.0**mantissa + bias
    lowest = -1.5 * mantissa  # below it, e^d is negligible against 1
    log2e = 1.0 / math.log(2.0)
    q_of = polynomial_of(q)

    def tanh(x, height):
        d = at_least(absolute(x) * -2.0, lowest)
        shifted = fma(d, log2e, splat(d, offset))
        k = shifted - offset
        r = fma(k, -ln2_low, fma(k, -ln2_high, d))
        rr = r * r
        power = _power_of_two(shifted)
        expm1 = fma(power, fma(rr, q_of(r, rr), r), power - 1.0)
        size = (expm1 * -height) / (expm1 + 2.0)
        return where(x < 0.0, size * -1.0, size)

    return tanh


@inlined
def sech_squared(x):
    """Return ``1 - tanh(x)^2``, tanh's slope, as 4 r (1 - r), r = 1 / (1 + e^(2 |x|)): it keeps its digits at a large |x|."""
    d = absolute(x) * -2.0
    e = exp_scaled(d, shift_by(splat(d, 0.0))) / exp_scale(d)
    r = e / (e + 1.0)
    return r * 4.0 * (splat(r, 1.0) - r)


def exp_scale(like):
    """Return what ``exp_scaled`` returns for ``exp(0) = 1``: the factor 2**UP of ``like``'s kind (a Vec or a Ptr)."""
    raise TypeError("exp_scale is for kernels")


@by_types(exp_scale)
def _exp_scale(like):
    factor = 2.0 ** FORMAT[like.kind][2]
    return lambda like: factor


def exp_negative(x):
    """Return ``exp(x)``, x <= 0: with no maximum to subtract exactly, it takes some operations less than `exp_scaled`."""
    raise TypeError("exp_negative is for kernels")


@by_types(exp_negative)
def _exp_negative(x):
    mantissa, bias, up, *_ = FORMAT[x.kind]
    high, low, _ = _exp_constants(x.kind)
    offset = 1.5 * 2.0**mantissa + STEPS * (bias + up)
    lowest, steps_per_e, down = -(bias + up) * math.log(2.0), STEPS / math.log(2.0), 2.0**-up

    def exp_down(x):
        x = at_least(x, lowest)
        shifted = fma(x, steps_per_e, splat(x, offset))
        k = shifted - offset
        r = fma(k, -low, fma(k, -high, x))
        return exp_reduced(r, _power_of_step(shifted)) * down

    return exp_down

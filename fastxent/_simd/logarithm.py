"""log and log(1 + x) of 16 lanes, with their derivation."""

import math

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastxent._simd.elementary import FORMAT, polynomial_of
from fastxent._simd.numba_backend import by_types, inlined
from fastxent._simd.vector import I32, I64, fma, lanes_of, splat, where

# log(x) = k ln 2 + log(m), x = m 2^k with m in [sqrt(1/2), sqrt(2)).
#   log(m) = 2 atanh(s) = 2 s + 2 s z L(z), with f = m - 1, which is exact, s = f / (2 + f) and z = s^2. The rounding error of s
#   would be one of the result; but in 2 s = f - s f = f - f^2/2 + s f^2/2, s is in the small terms only.
#   A denormal number's exponent is not in its exponent field, so it is multiplied by 2^UP first.
# log(1 + e) for 0 <= e <= 1 is the same with f = e and k = 0: it keeps the digits of a small e, and z <= 1/9 needs a longer L.

_L = {  # coefficients of 2 L for z <= 0.03, and for z <= 1/9
    "f32": (
        (0.6666668503957586, 0.3998878056602198, 0.29579949391972),
        (0.6666666732052742, 0.3999970632992968, 0.28592357998302836, 0.21706575800880374, 0.23224329224025236),
    ),
    "f64": (
        (
            0.6666666666666666, 0.4000000000000094, 0.28571428570764852, 0.2222222240054776, 0.181817947008978,
            0.15386290534658992, 0.13267418596475648, 0.13100723383501488,
        ),
        (
            0.6666666666666666, 0.40000000000014585, 0.2857142856710876, 0.22222222717427864, 0.18181789436132858,
            0.15385570065018625, 0.13314144209654935, 0.12001072809590704, 0.08800738486144673, 0.16164045611943932,
        ),
    ),
}  # fmt: skip
_SQRT_HALF_BITS = {"f32": 0x3F3504F3, "f64": 0x3FE6A09E667F3BCD}


@intrinsic
def split_exponent(typingctx, x):
    """Return ``(k, m)`` with ``x = m * 2**k`` and m in [sqrt(1/2), sqrt(2)); k has the kind of x."""
    mantissa, integer = {"f32": (23, I32), "f64": (52, I64)}[x.kind]

    def codegen(context, builder, sig, args):
        ints = lanes_of(integer, x.lanes)
        const = lambda v: ir.Constant(ints, [v] * x.lanes)  # noqa: E731
        bits = builder.bitcast(args[0], ints)
        k = builder.ashr(builder.sub(bits, const(_SQRT_HALF_BITS[x.kind])), const(mantissa))
        m = builder.bitcast(builder.sub(bits, builder.shl(k, const(mantissa))), args[0].type)
        k = builder.sitofp(k, args[0].type)
        return context.make_tuple(builder, sig.return_type, [k, m])

    return types.UniTuple(x, 2)(x), codegen


def log(x):
    """Return the natural logarithm, to about 1 ulp."""
    raise TypeError("log is for kernels")


@by_types(log)
def _log(x):
    _, bias, up, ln2_high, ln2_low, _ = FORMAT[x.kind]
    least, raised = 2.0 ** (1 - bias), 2.0**up
    l_of = polynomial_of(_L[x.kind][0])

    def log(x):
        denormal = x < least
        k, m = split_exponent(where(denormal, x * raised, x))
        k = where(denormal, k - up, k)
        f = m - 1.0
        s = f / (f + 2.0)
        z = s * s
        half = f * f * 0.5
        tail = s * fma(z, l_of(z, z * z), half) + k * ln2_low
        y = k * ln2_high - ((half - tail) - f)
        y = where(x == 0.0, splat(x, -math.inf), y)
        y = where(x == math.inf, x, y)
        return where(x >= 0.0, y, math.nan)

    return log


@inlined
def x_log_x(x):
    """Return ``x log(x)``, and 0 for 0."""
    return where(x == 0.0, x, x * log(x))


def log1p_to_1(e):
    """Return ``log(1 + e)``, 0 <= e <= 1, to about 1 ulp."""
    raise TypeError("log1p_to_1 is for kernels")


@by_types(log1p_to_1)
def _log1p_to_1(e):
    l_of = polynomial_of(_L[e.kind][1])

    def log1p_to_1(e):
        s = e / (e + 2.0)
        z = s * s
        half = e * e * 0.5
        return e - fma(s * -1.0, fma(z, l_of(z, z * z), half), half)

    return log1p_to_1


@inlined
def log1p(e):
    """Return ``log(1 + e)`` of float64 lanes ``e >= -1/2``, corrected for the rounding error of 1 + e."""
    u = e + 1.0
    return log(u) + (e - (u - 1.0)) / u

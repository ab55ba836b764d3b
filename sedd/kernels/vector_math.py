"""Exponentials and logarithms of blocks of float32 numbers, in loops that LLVM turns into vector instructions.

Numba calls the C library for each number. The polynomials here are those of Cephes (Moshier 1992), right to 1e-7; how much
faster they are is measured in `benchmarks/network.py`.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

BLOCK = 256
"""Numbers in a block."""

_F = np.float32
_ZERO, _HALF, _ONE = _F(0), _F(0.5), _F(1)
_LOG2E, _LN2_HIGH, _LN2_LOW, _ROOT = _F(1.44269504088896341), _F(0.693359375), _F(-2.12194440e-4), _F(0.70710678)
_E0, _E1, _E2 = _F(1.9875691500e-4), _F(1.3981999507e-3), _F(8.3334519073e-3)
_E3, _E4, _E5 = _F(4.1665795894e-2), _F(1.6666665459e-1), _F(5.0000001201e-1)
_L0, _L1, _L2 = _F(7.0376836292e-2), _F(-1.1514610310e-1), _F(1.1676998740e-1)
_L3, _L4, _L5 = _F(-1.2420140846e-1), _F(1.4249322787e-1), _F(-1.6668057665e-1)
_L6, _L7, _L8 = _F(2.0000714765e-1), _F(-2.4999993993e-1), _F(3.3333331174e-1)
_EXP_LOW, _EXP_HIGH = _F(-87.0), _F(88.0)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def exp(x: Any, out: Any, bits: Any) -> None:
    """Write the exponentials of `x` (bounded by -87 and 88) to `out`; `bits` is (BLOCK,) int32 to work in."""
    for i in range(BLOCK):
        v = min(max(x[i], _EXP_LOW), _EXP_HIGH)
        z = np.floor(v * _LOG2E + _HALF)
        r = v - z * _LN2_HIGH - z * _LN2_LOW
        y = ((((_E0 * r + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
        out[i] = y * r * r + r + _ONE
        bits[i] = (np.int32(z) + np.int32(127)) << np.int32(23)
    power = bits.view(np.float32)
    for i in range(BLOCK):
        out[i] *= power[i]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def log(x: Any, out: Any, bits: Any) -> None:
    """Write the logs of positive normal numbers."""
    of_x, mantissa = x.view(np.int32), bits.view(np.float32)
    for i in range(BLOCK):
        bits[i] = (of_x[i] & np.int32(0x007FFFFF)) | np.int32(0x3F000000)
    for i in range(BLOCK):
        e = np.float32((of_x[i] >> np.int32(23)) - np.int32(126))
        m = mantissa[i]
        small = m < _ROOT
        e = e - _ONE if small else e
        m = m + m - _ONE if small else m - _ONE
        z = m * m
        y = (((((((_L0 * m + _L1) * m + _L2) * m + _L3) * m + _L4) * m + _L5) * m + _L6) * m + _L7) * m + _L8
        out[i] = m + (y * m * z + _LN2_LOW * e - _HALF * z) + _LN2_HIGH * e


@numba.njit(cache=True, nogil=True, error_model="numpy")
def log1p(x: Any, out: Any, bits: Any, u: Any) -> None:
    """Write `log(1 + x)`, x >= 0; what the sum, kept in `u`, rounds off is put back as a factor."""
    for i in range(BLOCK):
        u[i] = _ONE + x[i]
    log(u, out, bits)
    for i in range(BLOCK):
        d = u[i] - _ONE
        out[i] = out[i] * (x[i] / d) if d != _ZERO else x[i]

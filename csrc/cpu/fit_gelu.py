"""Prints the tables of vec.inl for GELU in bfloat16: on 32 segments of |x|, polynomials in the place f in the segment.

q(a) = 1 - Phi(a) by cubics, of relative error; e(a) = 101 - 202 (q(a) - a phi(a)) by parabolas, in steps of the byte.
"""

import math

import numpy as np
from numpy.polynomial import chebyshev

SEGMENTS = 32
LIMIT = 5.25
POINTS = 40


def tail(a: float) -> float:
    return 0.5 * math.erfc(a / math.sqrt(2))


def code(a: float) -> float:
    return 101 - 202 * (tail(a) - a * math.exp(-a * a / 2) / math.sqrt(2 * math.pi))


def table(function, degree: int, relative: bool) -> tuple[np.ndarray, float]:
    f = 0.5 - 0.5 * np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
    rows, worst = [], 0.0
    for segment in range(SEGMENTS):
        y = np.array([function((segment + v) * LIMIT / SEGMENTS) for v in f])
        weight = 1 / y if relative else np.ones_like(y)
        fit = chebyshev.chebfit(f, y, degree, w=weight)
        worst = max(worst, float(np.abs((chebyshev.chebval(f, fit) - y) * weight).max()))
        rows.append(chebyshev.cheb2poly(fit))
    return np.array(rows).T, worst


for name, function, degree, relative in (("q", tail, 3, True), ("e", code, 2, False)):
    coefficients, error = table(function, degree, relative)
    print(f"// {name}: largest error of the fit {error:.1e}")
    for power in coefficients:
        print("    {" + ", ".join(f"{c:.8g}f" for c in power) + "},")

"""Prints the coefficients of erf_sqrt2 in vec.inl: erf(x / sqrt 2) = x q(2 (x / limit)^2 - 1) for |x| <= limit."""

import math

import numpy as np
from numpy.polynomial import chebyshev

LIMIT = 5.54
DEGREE = 15
POINTS = 400

u = np.cos(np.pi * (np.arange(POINTS) + 0.5) / POINTS)
x = LIMIT * np.sqrt((u + 1) / 2)
target = np.array([math.erf(v / math.sqrt(2)) / v for v in x])
lawson = np.ones(POINTS)
scale = np.maximum(x, 0.4)  # errors are counted on x q, not on q
for _ in range(200):
    fit = chebyshev.chebfit(u, target, DEGREE, w=np.sqrt(lawson) * scale)
    error = np.abs((chebyshev.chebval(u, fit) - target) * scale)
    lawson *= error / error.max() + 1e-3
    lawson /= lawson.sum()
print(f"// largest error of the fit: {error.max():.1e}")
print(", ".join(f"{c:.9g}f" for c in chebyshev.cheb2poly(fit)))

"""Tolerances that are derived, not chosen.

A result may be off the float64 oracle by at most twice what a plain torch computation of the same formula in the same dtype is
off, plus a rounding band: one ``eps`` for every summed term (``oracle.magnitudes``). This is asked of every element (against
the plain computation's largest error) and of the whole tensor (by its Frobenius norm, which sees what single outliers hide).
In float64 the plain computation *is* the oracle; there results must agree to 1e-12.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ringflash.kernels.running import accumulate_dtype
from ringflash.testing.oracle import Inputs, Results, dense_lse, dense_results, magnitudes

FLOAT64_TOLERANCE = 1e-12


class Judge:
    """Holds the oracle's results of one call and says whether others are as close to them as they should be.

    inputs: in the dtype of the call, on the device that is to compute the formula. visible: (Sq, Sk) bool. What is held is on
    the CPU.
    """

    def __init__(self, inputs: Inputs, visible: Tensor, *, scale: float | None = None, softcap: float = 0.0) -> None:
        self.dtype = inputs.q.dtype
        visible = visible.to(inputs.q.device)
        results = dense_results(inputs, visible, dtype=torch.float64, scale=scale, softcap=softcap)
        self.oracle = results.cpu()
        if self.dtype == torch.float64:
            exact = dict(self.oracle.items())
            self._allowed = {name: torch.full_like(x, FLOAT64_TOLERANCE * max(1.0, _largest(x))) for name, x in exact.items()}
            self._allowed_norm = {name: _norm(x) for name, x in self._allowed.items()}
            return
        exact = dict(results.items())
        # The LSE is kept in float32 for any dtype, so plain torch must do so as well.
        accumulate = accumulate_dtype(self.dtype)
        with _unhurried_sums():
            plain = dict(dense_results(inputs, visible, dtype=self.dtype, scale=scale, softcap=softcap).items())
            plain["lse"] = dense_lse(inputs, visible, dtype=accumulate, scale=scale, softcap=softcap)
        rounded, accumulated = (dict(m.items()) for m in magnitudes(inputs, visible, scale=scale, softcap=softcap))
        eps, accumulate_eps = torch.finfo(self.dtype).eps, torch.finfo(accumulate).eps
        fair = {name: _difference(plain[name], exact[name]) for name in exact}
        band = {name: eps * rounded[name] + accumulate_eps * accumulated[name] for name in exact}
        self._allowed = {name: (2 * _largest(fair[name]) + band[name]).cpu() for name in exact}
        self._allowed_norm = {name: 2 * _norm(fair[name]) + _norm(band[name]) for name in exact}

    def objections(self, results: Results) -> list[str]:
        """A line for each result that is not close enough or has another shape, dtype or other infinities; [] if all is well."""
        found, given = [], dict(results.items())
        for name, exact in self.oracle.items():
            if name not in given:
                found.append(f"{name} is missing")
                continue
            objection = self._objection(name, given[name].detach().cpu(), exact)
            if objection:
                found.append(f"{name} {objection}")
        return found

    def _objection(self, name: str, given: Tensor, exact: Tensor) -> str | None:
        dtype = accumulate_dtype(self.dtype) if name == "lse" else self.dtype
        if name != "dsinks" and given.dtype != dtype:
            return f"has dtype {given.dtype}, not {dtype}"
        if given.shape != exact.shape:
            return f"has shape {tuple(given.shape)}, not {tuple(exact.shape)}"
        if not torch.equal(given.isneginf(), exact.isneginf()):
            return f"is -inf at {int(given.isneginf().sum())} places, the oracle's at {int(exact.isneginf().sum())}"
        error, allowed = _difference(given, exact), self._allowed[name]
        if not bool((error <= allowed).all()):  # a NaN is never <= anything
            worst = int(torch.where(error.isnan(), torch.inf, error - allowed).argmax())
            place = tuple(int(x) for x in torch.unravel_index(torch.tensor(worst), exact.shape))
            off, limit, got, wanted = (float(x.flatten()[worst]) for x in (error, allowed, given, exact))
            wrong = int((~(error <= allowed)).sum())
            return (
                f"is off by {off:.3g} at {place}, allowed {limit:.3g} "
                f"(got {got:.6g}, oracle {wanted:.6g}; {wrong} of {exact.numel()} wrong)"
            )
        norm, limit = _norm(error), self._allowed_norm[name]
        return None if norm <= limit else f"is off by {norm:.3g} in norm, allowed {limit:.3g}"


@contextmanager
def _unhurried_sums() -> Iterator[None]:
    """Products of matrices on CUDA add in float32 throughout, as on the CPU: by default parts of a sum may be rounded to 16 bits,
    and what is fair would grow with it."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, False)
    try:
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def relative_error(given: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of ``exact``."""
    return float(torch.linalg.vector_norm(given.double() - exact) / torch.linalg.vector_norm(exact))


def _difference(given: Tensor, exact: Tensor) -> Tensor:
    """|given - exact| in float64; 0 where both are the same infinity."""
    given = given.double()
    return torch.where(given == exact, 0.0, (given - exact).abs())


def _norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x))


def _largest(x: Tensor) -> float:
    finite = x[x.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0

"""What tests, ``ringflash check`` and benchmarks share: cases, inputs, the float64 oracle, derived tolerances, real ranks."""

from ringflash.testing.cases import Case, draw, read_mask
from ringflash.testing.idle import Idle
from ringflash.testing.inputs import make_inputs, spread
from ringflash.testing.oracle import Inputs, Results, dense_attention, dense_results, visibility
from ringflash.testing.rank_pool import Outcome, RankError, RankPool, gpu_places
from ringflash.testing.runs import objections_on_ranks, objections_simulated, simulate
from ringflash.testing.tolerance import FLOAT64_TOLERANCE, Judge, relative_error
from ringflash.testing.waits import steady_waits

__all__ = [
    "FLOAT64_TOLERANCE",
    "Case",
    "Idle",
    "Inputs",
    "Judge",
    "Outcome",
    "RankError",
    "RankPool",
    "Results",
    "dense_attention",
    "dense_results",
    "draw",
    "gpu_places",
    "make_inputs",
    "objections_on_ranks",
    "objections_simulated",
    "read_mask",
    "relative_error",
    "simulate",
    "spread",
    "steady_waits",
    "visibility",
]

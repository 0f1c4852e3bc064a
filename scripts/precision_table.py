"""Error of bfloat16 results against float64 for growing worlds, as a markdown table for the README.

    python scripts/precision_table.py --seqlen 2048 --worlds 1 2 4 8 16 32 64

Every world is simulated in this process. Errors are relative, by the Frobenius norm of the whole tensor. Running state is kept in
float32 and rounded once, so the error is that of one bfloat16 rounding (about 1.7e-3) whatever the world.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ringflash.testing import Case, dense_results, make_inputs, relative_error, simulate, visibility

NAMES = ("out", "dq", "dk", "dv")


def errors(case: Case, worlds: Sequence[int]) -> dict[int, dict[str, float]]:
    """Relative error of each result by world; key 0 is plain torch in the case's dtype on one device."""
    inputs = make_inputs(case)
    visible = visibility(case.build_mask(), case.q_len, case.k_len)
    exact = dict(dense_results(inputs, visible, dtype=torch.float64).items())
    runs = {0: dense_results(inputs, visible, dtype=case.torch_dtype)}
    for world in worlds:
        runs[world] = simulate(case.with_world(world), inputs)
    return {world: {name: relative_error(getattr(run, name), exact[name]) for name in NAMES} for world, run in runs.items()}


def markdown(table: dict[int, dict[str, float]]) -> str:
    lines = ["| ranks | " + " | ".join(NAMES) + " |", "|---" * (1 + len(NAMES)) + "|"]
    for world, row in table.items():
        label = str(world) if world else "plain torch, 1 device"
        lines.append(f"| {label} | " + " | ".join(f"{row[name]:.2e}" for name in NAMES) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seqlen", type=int, default=2048, help="tokens of the whole sequence")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], help="numbers of ranks")
    parser.add_argument("--mask", default="causal()", help='as cases spell it, for example "causal(window=256)"')
    parser.add_argument("--schedule", default="ring")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    args = parser.parse_args()
    torch.set_num_threads(1)
    case = Case(
        mask=args.mask,
        schedule=args.schedule,
        q_len=args.seqlen,
        k_len=args.seqlen,
        heads=4,
        kv_heads=2,
        head_dim=64,
        head_dim_v=64,
        dtype=args.dtype,
        dlse=False,
    )
    print(markdown(errors(case, args.worlds)))


if __name__ == "__main__":
    main()

"""The peers that the benchmarks measure beside ringflash: one function each, (q, k, v) -> out, differentiable.

On several GPUs every peer gets the same local tensors (1, S / world, H, D). All are run by their own public entries, but for
ring-flash-attn, which imports flash-attn 2's private functions: where flash-attn is not installed, the same kernels as shipped
with torch, or FlashAttention-4's, stand in for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
CUDNN, FLASH = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, causal: bool = True) -> Tensor:
    """torch's scaled_dot_product_attention on (B, S, H, D) tensors, with one backend."""
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=True
        )
    return out.transpose(1, 2)


def flash_attn_4(causal: bool = True, window: int = 0, lengths: Sequence[int] = ()) -> Attention:
    """FlashAttention-4 on (B, S, H, D) tensors. window: keys a row sees, 0 for all. lengths: of packed documents (B 1), if any.

    Raises ImportError where the package flash-attn-4 is not installed.
    """
    from flash_attn.cute import flash_attn_func, flash_attn_varlen_func

    options: dict[str, Any] = {"causal": causal, "window_size": (window - 1, 0) if window else (None, None)}
    if not lengths:
        return lambda q, k, v: _output(flash_attn_func(q, k, v, **options))
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    options |= {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths)}
    # Not q[0]: its backward fills a tensor of zeros and copies into it.
    return lambda q, k, v: _output(flash_attn_varlen_func(q.squeeze(0), k.squeeze(0), v.squeeze(0), **options)).unsqueeze(0)


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result  # type: ignore[no-any-return]


class _AllToAll(torch.autograd.Function):
    """Heads for sequence (gather=True) or back, with one all_to_all_single."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: bool) -> Tensor:
        ctx.gather, world = gather, dist.get_world_size()
        _, s, n, d = x.shape
        if gather:
            y = x.view(s, world, n // world, d).transpose(0, 1).contiguous()
            z = torch.empty_like(y)
            dist.all_to_all_single(z, y)
            return z.view(1, world * s, n // world, d)
        y = x.contiguous().view(world, s // world, n, d)
        z = torch.empty_like(y)
        dist.all_to_all_single(z, y)
        return z.transpose(0, 1).contiguous().view(1, s // world, n * world, d)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllToAll.apply(grad.contiguous(), not ctx.gather), None  # type: ignore[no-untyped-call]


def ulysses(local: Attention) -> Attention:
    """DeepSpeed Ulysses written with torch: all-to-all, one device's attention, all-to-all."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (_AllToAll.apply(x, True) for x in (q, k, v))  # type: ignore[no-untyped-call]
        return _AllToAll.apply(local(q, k, v), False)  # type: ignore[no-untyped-call, no-any-return]

    return attend


def ring_flash_attn(kernels: str) -> Attention:
    """zigzag_ring_flash_attn_func of the package ring-flash-attn, on torch's FlashAttention-2 or the user's FlashAttention-4."""
    for name in [m for m in sys.modules if m.split(".")[0] == "ring_flash_attn"]:
        del sys.modules[name]  # it binds its kernels at import
    spec = importlib.util.find_spec("ring_flash_attn")
    if spec is None or spec.submodule_search_locations is None:
        raise RuntimeError("ring-flash-attn is not installed: pip install ring-flash-attn")
    stand_in = types.ModuleType("flash_attn.flash_attn_interface")
    stand_in.__dict__.update(_flash_attn_2(kernels))
    if importlib.util.find_spec("flash_attn") is None:
        sys.modules["flash_attn"] = types.ModuleType("flash_attn")
    parent = importlib.import_module("flash_attn")
    sys.modules["flash_attn.flash_attn_interface"] = stand_in
    parent.__dict__.setdefault("flash_attn_interface", stand_in)
    # Its __init__ imports the internals of one version of transformers; the module itself needs none of them.
    package = types.ModuleType("ring_flash_attn")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["ring_flash_attn"] = package
    zigzag = importlib.import_module("ring_flash_attn.zigzag_ring_flash_attn").zigzag_ring_flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _output(zigzag(q, k, v, causal=True))

    return attend


def _flash_attn_2(kernels: str) -> dict[str, Callable[..., Any]]:
    """flash-attn 2's private forward and backward over other kernels: "fa2" (torch's) or "fa4" (flash_attn.cute)."""
    if kernels == "fa4":
        from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd

    def forward(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
                window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
                return_softmax: bool = False) -> tuple[Any, ...]:  # fmt: skip
        if kernels == "fa4":
            result = _flash_attn_fwd(q, k, v, softmax_scale=softmax_scale, causal=causal, return_lse=True)
            return result[0], result[1], None, None
        result = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, causal, False, scale=softmax_scale
        )
        return result[0], result[1], None, None

    # fmt: off
    def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor, dk: Tensor,
                 dv: Tensor,
                 dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False, window_size_left: int = -1,
                 window_size_right: int = -1, softcap: float = 0.0, alibi_slopes: Tensor | None = None,
                 deterministic: bool = False, rng_state: Tensor | None = None) -> None:
        # fmt: on
        if kernels == "fa4":
            inputs = (x.contiguous() for x in (q, k, v, out, dout, softmax_lse))
            grads = _flash_attn_bwd(*inputs, softmax_scale=softmax_scale, causal=causal)
        else:
            seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
            grads = torch.ops.aten._flash_attention_backward(
                dout,
                q,
                k,
                v,
                out,
                softmax_lse,
                None,
                None,
                q.shape[1],
                k.shape[1],
                dropout_p,
                causal,
                seed,
                seed[0],
                scale=softmax_scale,
            )
        for target, grad in zip((dq, dk, dv), grads, strict=False):
            target.copy_(grad)

    def varlen(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("the benchmark does not use variable lengths")

    return {
        "_flash_attn_forward": forward,
        "_flash_attn_backward": backward,
        "_flash_attn_varlen_forward": varlen,
        "_flash_attn_varlen_backward": varlen,
    }


def torch_context_parallel(rotate: str, backend: SDPBackend) -> Attention:
    """torch.distributed's experimental context_parallel; it wants key heads repeated and computes backward inside its context."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    world = dist.get_world_size()
    mesh = init_device_mesh("cuda", (world,))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        set_rotate_method(rotate)
        buffer = torch.zeros(1, 2 * world * world, device=q.device)
        context = context_parallel(mesh, buffers=[buffer], buffer_seq_dims=[1])
        context.__enter__()  # left by leave(), after the backward pass
        _open_contexts.append(context)
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], dim=2) for x in (k, v))
        return sdpa(q, k, v, backend)

    return attend


_open_contexts: list[Any] = []


def leave() -> None:
    """Closes what a peer left open until after its backward pass."""
    while _open_contexts:
        _open_contexts.pop().__exit__(None, None, None)


PEERS: dict[str, Callable[[], Attention]] = {
    "ulysses_cudnn": lambda: ulysses(lambda q, k, v: sdpa(q, k, v, CUDNN)),
    "ring_flash_attn_fa2": lambda: ring_flash_attn("fa2"),
    "ring_flash_attn_fa4": lambda: ring_flash_attn("fa4"),
    "torch_cp_allgather_cudnn": lambda: torch_context_parallel("allgather", CUDNN),
    "torch_cp_allgather_fa2": lambda: torch_context_parallel("allgather", FLASH),
}
"""Of causal attention over several GPUs."""


def single(kernels: str, window: int, lengths: Sequence[int]) -> Attention:
    """Causal attention on one GPU by torch's "cudnn" or "fa2". Raises ValueError where more is asked for."""
    if window or lengths:
        raise ValueError(f"{kernels} on one GPU is measured on causal masks without windows and documents only")
    return lambda q, k, v: sdpa(q, k, v, CUDNN if kernels == "cudnn" else FLASH)


def distributed(name: str, window: int, lengths: Sequence[int]) -> Attention:
    """A peer by its name. Raises ValueError for one that does causal attention only where more is asked for."""
    if name == "ulysses_fa4":
        return ulysses(flash_attn_4(True, window, lengths))
    if name not in PEERS:
        raise ValueError(f"unknown system {name!r}; allowed peers: ulysses_fa4, {', '.join(PEERS)}")
    if window or lengths:
        raise ValueError(f"{name} is measured on causal masks without windows and documents only")
    return PEERS[name]()

"""Whether calls wait for the device."""

from __future__ import annotations

from collections.abc import Callable

import torch


def steady_waits(run: Callable[[], object]) -> str:
    """torch's complaint about a wait for the device in calls after the first two; empty if there is none."""
    run()
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
        run()
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""

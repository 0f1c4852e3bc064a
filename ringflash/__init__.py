"""ringflash: exact attention for sequences that do not fit one GPU."""

from ringflash.api import attention
from ringflash.mask import Mask
from ringflash.parallel.context import ContextParallel
from ringflash.parallel.layout import Layout
from ringflash.parallel.schedule import Schedule
from ringflash.parallel.transport import TransportError
from ringflash.simulated import SimulatedWorld

__all__ = ["ContextParallel", "Layout", "Mask", "Schedule", "SimulatedWorld", "TransportError", "attention"]
__version__ = "0.1.0"

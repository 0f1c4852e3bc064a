"""Reading command-line options: errors in one line, sizes with k and M, masks spelled as text."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ringflash.mask import Mask

MASKS = """masks (repeat --mask for the intersection; sizes may end in k or M, 1024 and 1024^2):
  full                            causal[:WINDOW]                window:LEFT,RIGHT (none: unbounded)
  documents:LENGTHS[,noncausal]   prefix:N                       chunked:SIZE
  dilated:STRIDE[,WINDOW]         blocks:FILE,SIZE (.npy, or text with a line of 0 and 1 per row of blocks)
LENGTHS: of packed documents, as 4096x32,131072 (32 of 4,096 tokens and one of 131,072), or @FILE with numbers"""


PICTURES = (".png", ".pdf", ".svg")


class Parser(argparse.ArgumentParser):
    """A parser that says in one line what is wrong, and ends with exit code 2."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message} ({self.prog} --help says more)", file=sys.stderr)
        raise SystemExit(2)


def size(name: str, text: str) -> int:
    """A number of tokens: digits with an optional k or M (1024 and 1024^2)."""
    found = re.fullmatch(r"(\d+)([kKmM]?)", text.replace(",", "").replace("_", ""))
    if found is None:
        raise ValueError(f"{name} must be a number of tokens such as 4096, 128k or 1M, got {text!r}")
    return int(found[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[found[2].lower()]


def at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return value


def schedule_name(text: str) -> str:
    """The name of a --schedule, possibly with a number. ValueError for others."""
    from ringflash.parallel.schedule import read_schedule

    read_schedule(text)
    return text


def check_picture(text: str) -> None:
    """ValueError unless the file of a --picture is of a kind that is drawn."""
    if Path(text).suffix.lower() not in PICTURES:
        raise ValueError(f"--picture {text} must end in {', '.join(PICTURES[:-1])} or {PICTURES[-1]}")


def lengths(text: str) -> list[int]:
    """``4096x32,131072`` -> 32 times 4096, once 131072; ``@FILE``: the same, and white space and new lines part as well."""
    if text.startswith("@"):
        text = Path(text[1:]).read_text()
    found = []
    for word in re.split(r"[\s,]+", text.strip()):
        length, _, times = word.partition("x")
        if times and not times.isdigit():
            raise ValueError(f"document lengths are such as 4096x32,131072, got {word!r}")
        found += [size("a document's length", length)] * (int(times) if times else 1)
    return found


def read_mask(text: str) -> Mask:
    """The mask of one --mask option. Raises ValueError naming what is allowed."""
    name, _, rest = text.partition(":")
    words = [word for word in rest.split(",") if word]

    def numbers(least: int, most: int) -> list[int]:
        if not least <= len(words) <= most:
            count = f"{least}" if least == most else f"{least} to {most}"
            raise ValueError(
                f"--mask {name} takes {count} number{'s' if most > 1 else ''}, got {text!r}; see ringflash plan --help"
            )
        return [size(f"--mask {name}", word) for word in words]

    if name == "full" and not words:
        return Mask.full()
    if name == "causal":
        return Mask.causal(*numbers(0, 1))
    if name == "window" and len(words) == 2:
        left, right = (None if word == "none" else size("--mask window", word) for word in words)
        return Mask.window(left, right)
    if name == "documents" and words:
        causal = words[-1] != "noncausal"
        return Mask.documents(lengths(rest if causal else rest.rpartition(",")[0]), causal=causal)
    if name == "prefix":
        return Mask.prefix(*numbers(1, 1))
    if name == "chunked":
        return Mask.chunked(*numbers(1, 1))
    if name == "dilated":
        return Mask.dilated(*numbers(1, 2))
    if name == "blocks" and len(words) == 2:
        return Mask.blocks(_block_map(Path(words[0])), size("--mask blocks", words[1]))
    raise ValueError(f"--mask {text!r} is not understood; ringflash plan --help lists the masks")


def _block_map(path: Path) -> Any:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False).astype(bool)
    rows = [re.sub(r"[\s,]", "", line) for line in path.read_text().splitlines() if line.strip()]
    if not rows or any(len(row) != len(rows[0]) or set(row) - {"0", "1"} for row in rows):
        raise ValueError(f"{path} must hold a line of 0 and 1 for every row of blocks, all of one length")
    return np.array([[cell == "1" for cell in row] for row in rows])

"""The seeded bugs of scripts/mutate.py: their patches fit the code, and a few are caught here (all by ``make mutate``)."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "mutate.py"

spec = importlib.util.spec_from_file_location("mutate", SCRIPT)
assert spec is not None and spec.loader is not None
mutate = importlib.util.module_from_spec(spec)
sys.modules["mutate"] = mutate
finders = list(sys.meta_path)
spec.loader.exec_module(mutate)
sys.meta_path[:] = finders  # the script hides an editable install from itself; the tests want it


@pytest.mark.parametrize("bug", mutate.BUGS, ids=[bug.name for bug in mutate.BUGS])
def test_every_patch_fits_the_code(bug: mutate.Bug) -> None:
    ast.parse(mutate.patched(bug, ROOT))


def test_there_are_enough_bugs_and_no_two_are_one() -> None:
    assert len({(bug.file, bug.old, bug.new) for bug in mutate.BUGS}) == len(mutate.BUGS) >= 20


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=500)


def test_bugs_are_caught() -> None:
    done = run("--trust", "--jobs", "1", "--only", "^(window one too wide|sign of dlse|missing rescale in the merge)$")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 caught" in done.stdout


def test_a_bug_that_no_test_notices_is_told() -> None:
    """The script can fail: a patch of a comment survives, and a patch that does not fit is an error."""
    harmless = mutate.Bug("harmless", "ringflash/mask.py", '"""Everybody sees everybody."""', '"""Everyone."""', mutate.LAYOUT)
    assert mutate.patched(harmless, ROOT) != (ROOT / "ringflash/mask.py").read_text()
    with pytest.raises(ValueError, match="occurs 0 times"):
        mutate.patched(mutate.Bug("gone", "ringflash/mask.py", "no such text", "x"), ROOT)
    with pytest.raises(ValueError, match="occurs"):
        mutate.patched(mutate.Bug("everywhere", "ringflash/mask.py", "self", "x"), ROOT)

"""`torch.compile`: the dense twin as one graph; masked, with graph breaks and the same numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compiled.py")


def assert_equal_when_compiled(*words: str) -> None:
    call = [sys.executable, "-W", "error::UserWarning:torch", str(SCRIPT), *words]
    done = subprocess.run(call, cwd=SCRIPT.parent, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "equal", done.stderr


def test_tracing_changes_no_number() -> None:
    assert_equal_when_compiled("eager", "own 2d")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_compiling_changes_no_number_in_any_dimension(compiler: str) -> None:
    assert_equal_when_compiled(compiler)

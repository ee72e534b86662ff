"""Whether bfloat16 is fast where a run computes: many CPUs only emulate it."""

import logging

import torch

log = logging.getLogger(__name__)

INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "avx10_2", "bf16", "sve_bf16")
"""Of x86 and of ARM, under the names by which torch calls them."""


def cpu_has_bfloat16() -> bool | None:
    """Whether this CPU computes in bfloat16 itself; None where torch cannot tell (before 2.11)."""
    ask = getattr(torch.cpu, "get_capabilities", None)
    if ask is None:
        return None
    known = ask()
    names = [name for name in INSTRUCTIONS if name in known]
    return any(known[name] for name in names) if names else None


def warn_of_slow_bfloat16(device: torch.device, half: bool, remedy: str) -> None:
    """Say in one line that bfloat16 is emulated on this CPU; nothing is changed.

    Args:
        device: where the network runs.
        half: whether it is to run in bfloat16.
        remedy: what to set for float32.
    """
    if half and device.type == "cpu" and cpu_has_bfloat16() is False:
        log.warning(
            "this CPU has no bfloat16 instructions and emulates them, many times slower than "
            "float32; %s",
            remedy,
        )

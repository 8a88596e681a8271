"""The levels of processors that kernels are compiled for ahead of time; a process uses the best one that its processor has."""

from __future__ import annotations

from typing import NamedTuple

from llvmlite import binding

from fastxent._simd import host


class Level(NamedTuple):
    name: str
    machine: str  # architecture, as in a triple and in the name of a wheel
    triple: str  # what the machine code is for, as LLVM writes it
    cpu: str  # LLVM's name of the least such processor
    features: str  # what it has, as LLVM writes it; the kernels look for some of these
    only: str = "*"  # a pattern of the names of the kernels that gain from it; a lower level has the others

    @property
    def needs(self) -> set[str]:
        return set(self.features.split(",")) - {""}

    @property
    def system(self) -> str:
        return _system(self.triple)


def _system(triple: str) -> str:
    """Return which system's calling convention and object format a triple names, of those that have levels."""
    return next((system for system in ("linux", "darwin") if system in triple), "none")


def _x86(name: str, *features: str, extra: str = "", only: str = "*") -> Level:
    text = ",".join(f"+{feature}" for feature in sorted(features))
    return Level(name, "x86_64", "x86_64-unknown-linux-gnu", name.removesuffix(extra), text, only)


# The levels of the x86-64 psABI, each with the features of those before it. 64-bit Arm has NEON and converts half precision.
_V2 = "cx16", "popcnt", "sahf", "sse3", "sse4.1", "sse4.2", "ssse3"
_V3 = *_V2, "avx", "avx2", "bmi", "bmi2", "f16c", "fma", "lzcnt", "movbe", "xsave"
_V4 = *_V3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl"
LEVELS = (
    _x86("x86-64-v2", *_V2),
    _x86("x86-64-v3", *_V3),
    _x86("x86-64-v4", *_V4),
    # Rounding to bfloat16 by an instruction: a gradient of 4096 x 8192 takes 0.84 times as long
    _x86("x86-64-v4-bf16", *_V4, "avx512bf16", extra="-bf16", only="*-bf16-*"),
    Level("aarch64", "aarch64", "aarch64-unknown-linux-gnu", "generic", ""),
    # Every Mac of this architecture has what the M1 has. Tried under emulation, on Linux: not on a Mac.
    Level("apple-m1", "arm64", "arm64-apple-darwin20.0.0", "apple-m1", ""),
)
NAMES = tuple(level.name for level in LEVELS)


def of_this_cpu() -> list[Level]:
    """Return the levels of the processor that Numba compiles for, the best first.

    Windows has no level: see "Prebuilt kernels" in benchmarks/README.md.
    """
    triple = binding.get_process_triple()
    here, has = (_system(triple), triple.partition("-")[0]), set(host.features(binding).split(","))
    return [level for level in reversed(LEVELS) if (level.system, level.machine) == here and level.needs <= has]

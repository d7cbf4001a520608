"""The emulation of the CUDA kernels, a library made of csrc and tests/simt."""

import fcntl
import hashlib
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def build(folder: Path) -> Path:
    """Compiles the emulation, or finds it compiled from the same sources."""
    directories = (ROOT / "csrc", ROOT / "tests" / "simt")
    files = sorted(path for directory in directories for path in directory.iterdir() if path.is_file())
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    library = folder / f"emulated_{digest}.so"
    with open(folder / "lock", "w") as lock:
        # Of several processes one compiles, and the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if library.exists():
            return library
        unfinished = library.with_suffix(".part")
        # Fibers are switched by jumps that a fortified libc takes for an error.
        command = ["g++", "-std=c++17", "-O1", "-march=native", "-U_FORTIFY_SOURCE", "-w", "-shared", "-fPIC"]
        # What a GPU calls a misaligned address is a trap here too.
        command += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
        command += [*(f"-I{path}" for path in directories), "-x", "c++", str(ROOT / "tests" / "simt" / "emulate.cpp")]
        subprocess.run([*command, "-o", str(unfinished)], check=True)
        unfinished.rename(library)
    return library

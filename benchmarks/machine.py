"""What a measurement was made on, and whether anything else was running there."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "transformers", "accelerate")
VARIABLES = ("XLA_FLAGS", "JAX_PLATFORMS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "KMP_AFFINITY")


def _text(path: str) -> str:
    file = Path(path)
    return file.read_text().strip() if file.exists() else "unknown"


def _output(command: list[str]) -> str:
    """What a command prints; "" where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def facts() -> dict[str, Any]:
    """Processor, cores, clock, memory, load, versions, environment and commit of this machine, for the record."""
    lines = dict(line.split(":", 1) for line in _output(["lscpu"]).splitlines() if ":" in line)
    gpu = ["nvidia-smi", "--query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit", "--format=csv,noheader"]
    # Cloud machines hide the name behind "AMD EPYC": the family tells one from the next, twice as fast in XLA.
    kind = ", ".join(f"{name} {lines[name].strip()}" for name in ("CPU family", "Model") if name in lines)
    commit = _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"])
    return {
        "processor": lines.get("Model name", platform.processor()).strip() + (f" ({kind})" if kind else ""),
        "cores": os.cpu_count(),
        "instructions": [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in lines.get("Flags", "")],
        "caches": {name.strip(): value.strip() for name, value in lines.items() if "cache" in name},
        "hypervisor": lines.get("Hypervisor vendor", "none").strip(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "clock": _text("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "gpus": _output(gpu).splitlines(),
        "commit": commit or "unknown",
        "loadavg": os.getloadavg(),
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def busy_share(seconds: float = 0.5) -> float:
    """Share of all cores' time that was not idle during a pause of so many seconds (Linux; stolen time counts)."""

    def times() -> list[int]:
        return [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]

    before = times()
    time.sleep(seconds)
    spent = [after - was for after, was in zip(times(), before, strict=True)]
    return 1.0 - (spent[3] + spent[4]) / max(sum(spent), 1)  # idle and waiting for disks


def wait_until_idle(share: float = 0.05, patience: float = 60.0) -> float:
    """The busy share once it is at most `share`, or what it was when patience (in seconds) ran out."""
    start = time.monotonic()
    while (result := busy_share()) > share and time.monotonic() - start < patience:
        pass
    return result

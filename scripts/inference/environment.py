"""What a computation ran with, for those who ask later: versions, device, and the memory that it took at most."""

from __future__ import annotations

import json
import platform
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch

from ..weights.model_settings import BUNDLE_ROOT

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

LIBRARIES = {"torch": "PyTorch", "monai": "MONAI", "pytorch-ignite": "Ignite", "nibabel": "nibabel", "numpy": "NumPy"}


def bundle() -> dict[str, str]:
    """Return what configs/metadata.json says."""
    return json.loads((Path(BUNDLE_ROOT) / "configs/metadata.json").read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """Name the versions of the bundle, of Python, its libraries and the system."""
    metadata = bundle()
    return {
        metadata["name"]: metadata["version"],
        "Python": platform.python_version(),
        **{name: version(package) for package, name in LIBRARIES.items()},
        "system": platform.platform(),
    }


def device_name(device: str | torch.device) -> str:
    """Name a device, of a GPU with its model."""
    device = torch.device(device)
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def reset_peak() -> None:
    """Measure peaks of memory from now on."""
    with suppress(OSError):  # where that does not work, the peak is that of the process's life
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_memory() -> int | None:
    """Return the most bytes of RAM that this process had since `reset_peak`; None where the system does not say."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 if resource else None


def peaks_gb() -> dict[str, float]:
    """Name the peaks of RAM and, where there is one in use, of the GPU's memory since `reset_peak`, in GB."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else None
    found = {"peak_ram_gb": peak_memory(), "peak_gpu_gb": gpu}
    return {name: round(size / 1e9, 3) for name, size in found.items() if size is not None}

"""What a measurement was made on, for the head of every file of results."""

import os
import platform
import subprocess
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def processor_name() -> str:
    """Name the processor as Linux does."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def where() -> dict[str, object]:
    """Give commit, versions, processor and GPU (None without one), and how busy the machine is now."""
    import torch

    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True)
    return {
        "commit": git.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 1),
    }

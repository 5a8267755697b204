"""What this machine has: versions, processor, memory, disk, cache, GPU. Changes nothing."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from edgeexport import __version__, errors
from edgeexport.core import Finding
from edgeexport.paths import cache_dir

ISA = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8", "asimd", "asimddp", "i8mm", "sve")
"""Processor flags that decide about the speed of quantised kernels, as Linux spells them."""


def requirements() -> dict[str, list[str]]:
    """The packages that we ask for, by extra; those of a bare install under "". Empty if pip did not install us."""
    found: dict[str, list[str]] = {}
    try:
        lines = metadata.requires("edgeexport") or []
    except metadata.PackageNotFoundError:
        return {}
    for line in lines:
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra == ['\"]([^'\"]+)['\"]", line)
        if name:
            found.setdefault(extra[1] if extra else "", []).append(name[0])
    return found


def extra_of(module: str) -> str | None:
    """The extra that brings this module; None if none does."""
    package = _normal(module.partition(".")[0])
    listed = requirements().items()
    return next((extra for extra, names in listed if extra and package in map(_normal, names)), None)


def report() -> dict[str, Any]:
    """Everything, as one JSON-able document; bytes where sizes are meant.

    `exit_code` is 7 when a package of the bare install cannot be loaded, and `findings` says which; otherwise 0.
    """
    needed = requirements()
    findings = _broken(needed.get("", []))
    document: dict[str, Any] = {
        "edgeexport": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {extra: {name: _version(name) for name in names} for extra, names in needed.items()},
        "findings": findings,
        "exit_code": errors.ToolError.exit_code if findings else 0,
    }
    return document if findings else {**document, **_machine()}


def _machine() -> dict[str, Any]:
    import psutil

    memory = psutil.virtual_memory()
    cache = cache_dir()
    return {
        "cpu": _cpu(),
        "memory": {"total": memory.total, "available": memory.available, "cgroup_limit": _cgroup_limit()},
        "disk_free": {"here": shutil.disk_usage(Path.cwd()).free, "cache": shutil.disk_usage(_existing(cache)).free},
        "cache": {"path": str(cache), "bytes": _folder_bytes(cache)},
        "gpus": _gpus(),
    }


def _broken(packages: list[str]) -> list[Finding]:
    """The packages that do not load. Without a list of packages, pip did not install us: that is broken too."""
    if not packages:
        problem = "pip knows of no installed package edgeexport"
        return list(errors.broken_dependency("edgeexport", problem).findings)
    findings: list[Finding] = []
    modules = _modules()
    for package in packages:
        try:
            metadata.version(package)
            for module in modules.get(_normal(package), ()):
                importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - whatever a broken package raises, OSError of a library among them
            findings += errors.broken_dependency(package, str(error) or type(error).__name__).findings
    return findings


def _modules() -> dict[str, list[str]]:
    """What each installed package is imported as, which need not be its name, by what it says itself."""
    found: dict[str, list[str]] = {}
    for module, packages in metadata.packages_distributions().items():
        if module.isidentifier() and not module.startswith("_"):
            for package in packages:
                found.setdefault(_normal(package), []).append(module)
    return found


def _normal(package: str) -> str:
    """A package's name as pip compares names."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import psutil

    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    present = set(flags[1].split()) if flags else set()
    return {
        "model": model[1] if model else platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "usable_threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else psutil.cpu_count(),
        "isa": [flag for flag in ISA if flag in present],
    }


def _cgroup_limit() -> int | None:
    """The memory limit of the container we are in, if there is one (cgroup v2)."""
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _existing(path: Path) -> Path:
    """The path, or its nearest parent that exists."""
    return path if path.exists() else _existing(path.parent)


def _folder_bytes(folder: Path) -> int:
    """Bytes of all files under the folder; a build may remove some while they are counted."""
    total = 0
    for parent, _, files in os.walk(folder):
        for name in files:
            try:
                total += Path(parent, name).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def _gpus() -> list[str]:
    """Name and memory of each NVIDIA GPU that its driver's own tool reports; none without the tool."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []

"""What a process says of itself; runs in the client, in the scheduler and in the workers.

Workers get this file as text and may lack dask-nn, PyTorch or this Python: it imports the standard
library at its top, everything else where it is used, and uses no syntax newer than Python 3.9.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["describe_process", "in_thread"]

_Result = TypeVar("_Result")

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - it is looked at, nothing is made in it
INTERFACES = "/sys/class/net"
# The type of an InfiniBand interface, as Linux counts them.
INFINIBAND = "32"
PACKAGES = ("dask", "distributed", "numpy", "torch", "dask-nn")
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUDA_VISIBLE_DEVICES",
    "LD_PRELOAD",
    "MALLOC_TRIM_THRESHOLD_",
    "MKL_NUM_THREADS",
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
)
ALLOCATORS = ("jemalloc", "mimalloc", "tcmalloc")
# What the process grows by when PyTorch and a rank's code are imported, with CUDA's libraries
# and without.
IMPORT_BYTES = {True: 850 << 20, False: 400 << 20}
COMMAND_TIMEOUT_S = 5
# At this share of its limit a nanny ends its worker.
ENDS_AT_SHARE = 0.95


async def describe_process(
    modules: Sequence[str] = (), load: Sequence[str] = (), dask_worker: Any = None
) -> dict[str, Any]:
    """Describe this process, as the fields of ProcessFacts.

    Parameters
    ----------
    modules : sequence of str
        Packages besides dask-nn's own that must be importable.
    load : sequence of str
        Modules to import, as training would; none on a scheduler.
    dask_worker : Server or None
        The scheduler or worker that this is, handed over by Dask; None in a client.
    """
    return await in_thread(_describe, tuple(modules), tuple(load), dask_worker)


async def in_thread(  # noqa: UP047 - no Python before 3.12 reads type parameters
    function: Callable[..., _Result], *arguments: Any
) -> _Result:
    """Run a function beside the event loop, in a thread that ends with it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def settle(result: Any, error: Exception | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    def work() -> None:
        result, error = None, None
        try:
            result = function(*arguments)
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended, nobody waits
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="doctor", daemon=True).start()
    found: _Result = await future
    return found


def _describe(modules: Sequence[str], load: Sequence[str], server: Any) -> dict[str, Any]:
    limit = int(getattr(getattr(server, "memory_manager", None), "memory_limit", None) or 0)
    scratch = str(getattr(server, "local_directory", "") or "")
    found = {
        "address": getattr(server, "address", "") or "",
        "hostname": socket.gethostname(),
        "machine": _machine(),
        "network": _read_link("/proc/self/ns/net"),
        "process": os.getpid(),
        "threads": int(getattr(getattr(server, "state", None), "nthreads", 0) or 0),
        "cores": _cores(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "memory_limit_bytes": limit,
        "host_memory_bytes": _host_memory(),
        "scratch_folder": scratch,
        "libc": " ".join(platform.libc_ver()).strip(),
        "allocator": _allocator(),
        "processor": _processor(),
        "architecture": platform.machine(),
        "gpus": _gpus(),
        "interfaces": _interfaces(),
        "ends_at_s": _ends_at(server),
    }
    found.update(_shared_memory())
    found.update(_scratch(scratch))
    found.update(_packages(modules, load, limit))
    found.update(_torch())
    found["used_bytes"] = _used_bytes()
    return found


def _packages(modules: Sequence[str], load: Sequence[str], limit_bytes: int) -> dict[str, Any]:
    """Find versions and what cannot be imported; import what a rank needs."""
    versions = {"python": platform.python_version()}
    problems = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    spared = bool(load) and not _fits(limit_bytes)
    for name in () if spared else load:
        try:
            importlib.import_module(name)
        except Exception as error:
            problems[name] = _text(error)
    for name in modules:
        if not _exists(name):
            problems[name] = "is not installed"
    loaded = sys.modules.get("torch")
    if loaded is not None:  # what is imported counts, not what some folder is named
        versions["torch"] = str(getattr(loaded, "__version__", versions.get("torch", "")))
    elif not _exists("torch"):
        versions.pop("torch", None)
    if not _exists("dask_nn"):
        versions.pop("dask-nn", None)
    return {"versions": versions, "problems": problems, "spared": spared}


def _fits(limit_bytes: int) -> bool:
    """Tell whether this process can import PyTorch without being ended for it."""
    if not limit_bytes or "torch" in sys.modules or not _exists("torch"):
        return True
    found = importlib.util.find_spec("torch")
    folders = (found.submodule_search_locations if found is not None else None) or ()
    with_cuda = any(any(Path(folder, "lib").glob("libtorch_cuda*")) for folder in folders)
    return _used_bytes() + IMPORT_BYTES[with_cuda] < ENDS_AT_SHARE * limit_bytes


def _exists(module: str) -> bool:
    if sys.modules.get(module) is not None:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _torch() -> dict[str, Any]:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "get_num_threads"):
        return {}
    found = {"torch_threads": torch.get_num_threads()}
    try:
        found["capability"] = torch.backends.cpu.get_cpu_capability()
        found["cuda"] = str(torch.version.cuda or "")
        found["num_cuda_devices"] = torch.cuda.device_count()
        found["nccl"] = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    except Exception as error:
        found["torch_problem"] = _text(error)
    return found


def _gpus() -> list[dict[str, Any]]:
    """Ask the driver: PyTorch would take memory of the device to answer."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    query = [command, "--query-gpu=uuid,name,memory.total", "--format=csv,noheader,nounits"]
    answer = _run(query)
    rows = [line.split(", ") for line in answer.splitlines()]
    return [
        {"uuid": row[0], "name": row[1], "memory_mib": int(row[2])}
        for row in rows
        if len(row) == 3 and row[2].strip().isdigit()
    ]


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the driver's and the queue's own tools
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _ends_at(server: Any) -> dict[str, float]:
    """Tell when this process will be ended, by whom: from source to seconds since 1970."""
    found = {}
    environment = os.environ
    text = environment.get("SLURM_JOB_END_TIME", "")
    squeue = shutil.which("squeue")
    if not text and "SLURM_JOB_ID" in environment and squeue is not None:
        text = _seconds(_run([squeue, "-h", "-j", environment["SLURM_JOB_ID"], "-o", "%e"]))
    if _number(text):
        found["SLURM_JOB_END_TIME"] = float(text)
    elif _number(environment.get("DASK_NN_JOB_END_TIME", "")):
        # That of jobs that dask_nn.cluster submits, for batch systems that do not tell it.
        found["DASK_NN_JOB_END_TIME"] = float(environment["DASK_NN_JOB_END_TIME"])
    started = _started_at()
    if started and _number(environment.get("PBS_WALLTIME", "")):
        found["PBS_WALLTIME"] = started + float(environment["PBS_WALLTIME"])
    lifetime = getattr(server, "lifetime", None)
    if started and lifetime:
        found["--lifetime"] = started + float(lifetime)
    return found


def _seconds(text: str) -> str:
    """Turn Slurm's local time, such as 2026-01-31T12:00:00, into seconds since 1970."""
    try:
        return str(time.mktime(time.strptime(text, "%Y-%m-%dT%H:%M:%S")))
    except ValueError:
        return ""


def _number(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def _machine() -> str:
    """Name the machine: processes of it share processors and memory."""
    boot = _read("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()}|{boot}" if boot else socket.gethostname()


def _cores() -> int:
    try:
        from dask.system import cpu_count

        return int(cpu_count())
    except Exception:
        return os.cpu_count() or 1


def _host_memory() -> int:
    """Give what the host has, or its control group allows."""
    try:
        from distributed.system import memory_limit

        return int(memory_limit())
    except Exception:
        return 0


def _used_bytes() -> int:
    try:
        import psutil

        return int(psutil.Process().memory_info().rss)
    except Exception:
        return 0


def _started_at() -> float:
    try:
        import psutil

        return float(psutil.Process().create_time())
    except Exception:
        return 0.0


def _interfaces() -> list[dict[str, Any]]:
    """Give the network interfaces that are up, with their IP addresses and speed."""
    try:
        import psutil

        states = psutil.net_if_stats()
        addresses = psutil.net_if_addrs()
    except Exception:
        return []
    kinds = (socket.AF_INET, socket.AF_INET6)
    found = []
    for name, state in states.items():
        own = [entry.address for entry in addresses.get(name, ()) if entry.family in kinds]
        if state.isup and own:
            found.append(
                {
                    "name": name,
                    "addresses": own,
                    "mbit_per_s": state.speed,
                    "virtual": _is_virtual(name),
                }
            )
    return found


def _is_virtual(name: str) -> bool:
    """Tell whether an interface leads nowhere by itself, as bridges of containers and tunnels.

    Not so bonds, VLANs, and whatever else lies above an interface with a device; nor one of which
    nothing is known.
    """
    folder = Path(INTERFACES, name)
    if not folder.exists():
        return False
    described = _read(str(folder / "uevent")).splitlines()
    if (folder / "device").exists() or (folder / "bonding").exists():
        return False
    if _read(str(folder / "type")) == INFINIBAND or "DEVTYPE=vlan" in described:
        return False
    lower = [path.name.partition("_")[2] for path in folder.glob("lower_*")]
    return "DEVTYPE=vxlan" in described or all(map(_is_virtual, lower))


def _shared_memory() -> dict[str, Any]:
    try:
        usage = shutil.disk_usage(SHARED_MEMORY)
        status = Path(SHARED_MEMORY).stat()
    except OSError:
        return {}
    return {
        "shared_bytes": usage.total,
        "shared_free_bytes": usage.free,
        "shared_place": f"{status.st_dev}-{status.st_ino}",
    }


def _scratch(folder: str) -> dict[str, int]:
    try:
        return {"scratch_free_bytes": shutil.disk_usage(folder or Path.cwd()).free}
    except OSError:
        return {}


def _allocator() -> str:
    """Name the library that took the C library's place as allocator, if one did."""
    maps = _read("/proc/self/maps")
    return next((name for name in ALLOCATORS if f"lib{name}" in maps), "")


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _read_link(path: str) -> str:
    try:
        return str(Path(path).readlink())
    except OSError:
        return ""


def _text(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".strip(": ")

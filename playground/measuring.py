"""Time and memory of steps that take turns in one process, on the CPU or a GPU."""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

Step = Callable[[], Any]
Clock = Callable[[Step], float]
"""Runs a step and tells the seconds that it took."""

WARM_UP = 3
PACKAGES = ("transformers", "peft", "accelerate", "bitsandbytes", "deepspeed", "flash-attn", "triton")


def take_turns(
    steps: dict[str, Step], rounds: int, reference: str, title: str, clock: Clock | None = None
) -> dict[str, dict[str, float]]:
    """Median milliseconds of each step, and the median of its ratios to the `reference` step of the same round.

    A slow spell of the machine is longer than a round, so it hits both sides of a ratio. The order of the steps turns
    by one each round: none follows the same other step, and its leavings in the processor's caches, every time. Three
    rounds more, the first, are not counted.
    """
    clock = clock or processor_clock
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for number in tqdm(range(WARM_UP + rounds), desc=title, unit="round"):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            taken = clock(steps[name])
            if number >= WARM_UP:
                seconds[name].append(taken)
    return {
        name: {
            "milliseconds": round(1000 * statistics.median(values), 3),
            "milliseconds_ratio": round(statistics.median(map(truediv, values, seconds[reference])), 3),
        }
        for name, values in seconds.items()
    }


def clock_of(device: torch.device) -> Clock:
    """The clock of a device."""
    return gpu_clock if device.type == "cuda" else processor_clock


def processor_clock(step: Step) -> float:
    """Seconds by the wall clock."""
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def gpu_clock(step: Step) -> float:
    """Seconds between two events of the current CUDA stream, from an idle GPU until the step's last kernel has run."""
    torch.cuda.synchronize()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000


def peak_bytes(step: Step, device: torch.device) -> int:
    """The most that is allocated during a step beyond what was before it, in bytes, by the allocator's own account."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def profile_of(step: Step, device: torch.device, lines: int = 12) -> dict[str, Any]:
    """What a step starts on the device: how many operations, their milliseconds, and the costliest kinds of them.

    On a GPU these are kernels, on the CPU operations of PyTorch. `"host_milliseconds"` is what the processor needed to
    start them all, under the profiler, which slows it down: where that exceeds `"device_milliseconds"`, the GPU waits.
    """
    on_gpu = device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    step()
    with torch.profiler.profile(activities=activities) as profile:
        host = processor_clock(step)
        if on_gpu:
            torch.cuda.synchronize()
    time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kinds = [kind for kind in profile.key_averages() if getattr(kind, time_of) > 0]
    if on_gpu:
        kinds = [kind for kind in kinds if kind.device_type == torch.autograd.DeviceType.CUDA]
    kinds.sort(key=lambda kind: getattr(kind, time_of), reverse=True)
    return {
        "operations": sum(kind.count for kind in kinds),
        "device_milliseconds": round(sum(getattr(kind, time_of) for kind in kinds) / 1000, 3),
        "host_milliseconds": round(1000 * host, 3),
        "costliest": [
            {"name": kind.key[:80], "count": kind.count, "milliseconds": round(getattr(kind, time_of) / 1000, 3)}
            for kind in kinds[:lines]
        ],
    }


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What a result was measured on, and when; of a `device` also its driver, and the versions of packages."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "")
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": model.partition(":")[2].strip() or platform.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
    return found if device is None else {**found, **_gpu(device), **_versions()}


def _gpu(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"device": device.type}
    properties = torch.cuda.get_device_properties(device)
    asked = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "device": properties.name,
        "device_memory": properties.total_memory,
        "driver": asked.stdout.split("\n")[0].strip() or "unknown",
        "cuda": torch.version.cuda,
    }


def _versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed

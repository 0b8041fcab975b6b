"""What a profiler's trace says of kernels: which of them took the time."""

import collections
import gzip
import json
import pathlib
from collections.abc import Iterator
from typing import Any

# Operations that only run others, whose time is counted there.
CONTROL = ("while", "call", "conditional")


def newest_trace(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The events of the last trace that jax.profiler left in a folder, in the Trace Event Format."""
    path = max(folder.glob("plugins/profile/*/*.trace.json.gz"), key=lambda path: path.stat().st_mtime_ns)
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def costliest(events: list[dict[str, Any]], count: int = 10) -> list[dict[str, Any]]:
    """The kernels or fusions that took most time, the costliest first: name, seconds, calls, share (of all of them).

    A kernel goes by the name of its operation in the compiled program, with its own where that is another. Kernels that
    run at the same time, as on a CPU's cores, are added up.
    """
    microseconds: dict[str, float] = collections.defaultdict(float)
    calls: collections.Counter[str] = collections.Counter()
    for event, alone in _alone(_kernels(events)):
        operation = event.get("args", {}).get("hlo_op", event["name"])
        if not operation.startswith(CONTROL):
            name = operation if operation == event["name"] else f"{operation} ({event['name']})"
            microseconds[name] += alone
            calls[name] += 1
    total = sum(microseconds.values())
    return [
        {"name": name, "seconds": microseconds[name] / 1e6, "calls": calls[name], "share": microseconds[name] / total}
        for name in sorted(microseconds, key=microseconds.__getitem__, reverse=True)[:count]
    ]


def _kernels(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What ran on the devices: on a GPU's streams, among a TPU's operations, or on the host's threads."""
    names = {  # of processes, whose threads' ids are None, and of threads
        (event["pid"], event.get("tid") if event["name"] == "thread_name" else None): event["args"]["name"]
        for event in events
        if event.get("ph") == "M" and event["name"] in ("process_name", "thread_name")
    }

    def runs(event):
        thread = names.get((event["pid"], event["tid"]), "")
        return thread.startswith("Stream") or thread == "XLA Ops" and "/device:TPU" in names[event["pid"], None]

    spans = [event for event in events if event.get("ph") == "X"]
    on_devices = [event for event in spans if runs(event)]
    return on_devices or [event for event in spans if "hlo_op" in event.get("args", {})]


def _alone(events: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], float]]:
    """Each event with its microseconds less those of the events within it."""
    inner: list[float] = []  # of each event that is open
    opened: list[dict[str, Any]] = []

    def close() -> tuple[dict[str, Any], float]:
        event, within = opened.pop(), inner.pop()
        if inner:
            inner[-1] += event["dur"]
        return event, event["dur"] - within

    for event in sorted(events, key=lambda e: (e["pid"], e["tid"], e["ts"], -e["dur"])):
        thread = (event["pid"], event["tid"])
        while opened and ((opened[-1]["pid"], opened[-1]["tid"]) != thread or _end(opened[-1]) <= event["ts"]):
            yield close()
        opened.append(event)
        inner.append(0.0)
    while opened:
        yield close()


def _end(event: dict[str, Any]) -> float:
    return event["ts"] + event["dur"]

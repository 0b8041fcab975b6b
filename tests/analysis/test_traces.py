"""Traces of devices as their profilers write them."""

import gzip
import json
import os

import pytest

from vit_jax.analysis import traces


def name(kind, pid, text, tid=0):
    return {"ph": "M", "name": f"{kind}_name", "pid": pid, "tid": tid, "args": {"name": text}}


def span(label, start, length, pid=1, tid=7, **args):
    return {"ph": "X", "name": label, "pid": pid, "tid": tid, "ts": start, "dur": length, "args": args}


def test_time_within_another_event_is_counted_once():
    events = [
        name("process", 1, "/host:CPU"),
        span("while.1", 0, 100, hlo_op="while.1"),
        span("call.2", 5, 60, hlo_op="call.2"),
        span("fusion.3", 10, 30, hlo_op="fusion.3"),
        span("dot.4", 15, 20, hlo_op="dot.4"),
        span("dot.4", 50, 5, hlo_op="dot.4"),
        span("dot.4", 0, 15, tid=8, hlo_op="dot.4"),
        span("python", 0, 1000),
    ]
    first, second = traces.costliest(events)
    assert first == {"name": "dot.4", "seconds": pytest.approx(40e-6), "calls": 3, "share": pytest.approx(0.8)}
    assert second["name"] == "fusion.3" and second["seconds"] == pytest.approx(10e-6) and second["calls"] == 1
    assert [kernel["name"] for kernel in traces.costliest(events, 1)] == ["dot.4"]


def test_a_gpus_kernels_are_those_on_its_streams():
    events = [
        name("process", 1, "/device:GPU:0"),
        name("thread", 1, "Stream #13(Compute)", 7),
        name("thread", 1, "XLA Ops", 9),
        name("process", 2, "/host:CPU"),
        span("sm90_gemm", 0, 30, hlo_op="gemm_fusion.1"),
        span("MemcpyD2D", 40, 10),
        span("gemm_fusion.1", 0, 30, tid=9, hlo_op="gemm_fusion.1"),
        span("launch", 0, 99, pid=2, hlo_op="gemm_fusion.1"),
    ]
    first, second = traces.costliest(events)
    assert first["name"] == "gemm_fusion.1 (sm90_gemm)" and first["share"] == 0.75
    assert second["name"] == "MemcpyD2D"


def test_a_tpus_kernels_are_its_operations():
    events = [
        name("process", 1, "/device:TPU:0"),
        name("thread", 1, "XLA Modules", 6),
        name("thread", 1, "XLA Ops", 7),
        span("jit_train_steps", 0, 99, tid=6),
        span("fusion.1", 0, 30),
    ]
    assert [kernel["name"] for kernel in traces.costliest(events)] == ["fusion.1"]


def test_the_newest_trace_is_read(tmp_path):
    for i, run in enumerate(("later", "earlier")):
        path = tmp_path / "plugins" / "profile" / run / "host.trace.json.gz"
        path.parent.mkdir(parents=True)
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": [run]}, file)
        os.utime(path, (2 - i, 2 - i))
    assert traces.newest_trace(tmp_path) == ["later"]

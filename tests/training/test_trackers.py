"""What trackers are sent, in which order, what a failure does; and the real libraries' stores, read back."""

import importlib.util
import json
import os
import signal
import zipfile
from types import SimpleNamespace

import pytest

from vit_jax.config import FIELDS, checked, default_config, differences, from_dict, to_dict, tracker_names
from vit_jax.errors import UserError
from vit_jax.training import trackers
from vit_jax.training.trackers import Tracking
from vit_jax.training.writers import COLUMNS, read_metrics


class Kept:
    """A tracker that keeps what it is sent, and fails where it is told to."""

    def __init__(self, calls, fails=(), continues=True):
        self.calls, self.fails, self.continues = calls, set(fails), continues
        self.note, self.opened = "", 0

    def open(self, library, workdir, config, record):
        self._do("open", config, record)
        self.opened += 1
        self.record = record if record and self.continues else f"record {self.opened}"
        return self

    def _do(self, what, *values):
        self.calls.append((what, *values))
        if what in self.fails:
            raise OSError(f"no {what}\ntoday")

    def add(self, row):
        self._do("add", row["step"])

    def finish(self, summary, pictures):
        self._do("finish", summary, [path.name for path in pictures])

    def close(self, done):
        self._do("close", done)


def config_of(names):
    config = default_config()
    config.train.trackers = names
    return config


def tracking(workdir, **kept):
    """Opens the given trackers under their names."""
    return Tracking(workdir, config_of(tuple(kept)), {name: ("json", tracker.open) for name, tracker in kept.items()})


def row(step):
    return dict.fromkeys(COLUMNS, 0.5) | {"step": step, "train_accuracy": None}


def test_a_run_is_sent_in_order(tmp_path):
    calls = []
    run = tmp_path / "run"
    opened = tracking(run, mlflow=Kept(calls))
    (run / "figures").mkdir()
    for name in ("curves.png", "figures/b.png", "figures/a.png", "figures/a.csv"):
        (run / name).touch()
    opened.add(row(3))
    opened.add(row(6))
    opened.finish({"test_accuracy": 0.5})
    opened.close()
    (what, config, record), *rest = calls
    assert (what, record) == ("open", None) and config.keys() == FIELDS.keys() and config["optim.name"] == "adamw"
    pictures = ["curves.png", "a.png", "b.png"]
    assert rest == [("add", 3), ("add", 6), ("finish", {"test_accuracy": 0.5}, pictures), ("close", True)]


@pytest.mark.parametrize("continues, sent", [(True, [9]), (False, [3, 6, 9])])
def test_a_resumed_run_goes_on_with_its_record_or_fills_another(tmp_path, continues, sent):
    first, calls = Kept([], continues=continues), []
    opened = tracking(tmp_path, mlflow=first)
    (tmp_path / "config.json").touch()  # as a run writes when it begins
    for step in (3, 6):
        opened.add(row(step))
    opened.close()
    assert first.calls[-1] == ("close", False)
    first.calls = calls
    again = tracking(tmp_path, mlflow=first)
    for step in (3, 6, 9):
        again.add(row(step))
    assert calls[0][2] == "record 1" and calls[1:] == [("add", step) for step in sent]
    record = "record 1" if continues else "record 2"
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"mlflow": {"record": record, "step": 9}}


def test_one_that_fails_is_left_and_the_others_go_on(tmp_path, capsys):
    bad, good = Kept([], fails=["add"]), Kept([])
    opened = tracking(tmp_path, wandb=bad, mlflow=good)
    (tmp_path / "config.json").touch()
    opened.add(row(3))
    opened.add(row(6))
    opened.finish({})
    opened.close()
    assert [what for what, *_ in bad.calls] == ["open", "add"]
    assert [what for what, *_ in good.calls] == ["open", "add", "add", "finish", "close"]
    assert capsys.readouterr().err == "warning: the tracker wandb failed (no add today); it gets no more\n"
    bad.calls, bad.fails = [], {"finish", "close"}  # the next start sends what was missed
    opened = tracking(tmp_path, wandb=bad)
    for step in (3, 6):
        opened.add(row(step))
    opened.finish({})
    opened.close()
    assert [call[0] for call in bad.calls] == ["open", "add", "add", "finish"]
    assert "wandb failed (no finish today)" in capsys.readouterr().err


def test_one_that_cannot_be_opened_is_an_error_and_nothing_is_written(tmp_path):
    good, bad = Kept([]), Kept([], fails=["open"])
    with pytest.raises(UserError, match="the tracker wandb cannot be used .*train.trackers"):
        tracking(tmp_path / "run", mlflow=good, wandb=bad)
    assert good.calls[-1] == ("close", False) and not (tmp_path / "run").exists()
    (tmp_path / "kept").touch()
    with pytest.raises(UserError):
        tracking(tmp_path, wandb=bad)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_one_that_is_not_installed_is_an_error_before_any_is_opened(tmp_path):
    good = Kept([])
    kinds = {"mlflow": ("json", good.open), "comet": ("no_such_library", good.open)}
    with pytest.raises(UserError, match=r'comet.*no_such_library.*pip install "vit_jax\[comet\]"'):
        Tracking(tmp_path / "run", config_of("mlflow,comet"), kinds)
    assert good.calls == [] and not (tmp_path / "run").exists()


def test_a_record_that_is_gone_and_a_damaged_list_of_records(tmp_path):
    kept = Kept([])
    tracking(tmp_path, mlflow=kept).close()
    (tmp_path / "config.json").touch()
    kept.fails = {"open"}
    with pytest.raises(UserError, match="to begin a new record, remove .*trackers.json"):
        tracking(tmp_path, mlflow=kept)
    for damage in ("", "[1]", '{"mlflow": {}}'):
        (tmp_path / "trackers.json").write_text(damage)
        with pytest.raises(UserError, match="trackers.json is damaged"):
            tracking(tmp_path, mlflow=Kept([]))


def test_a_start_that_came_to_nothing_leaves_its_record_behind(tmp_path):
    """Its config is not kept: the next start may have another one."""
    calls = []
    for _ in range(2):
        tracking(tmp_path, mlflow=Kept(calls)).close()
    assert [record for what, *rest, record in calls if what == "open"] == [None, None]


def test_no_trackers_leave_nothing(tmp_path):
    opened = Tracking(tmp_path, default_config())
    opened.add(row(3))
    opened.close()
    assert list(tmp_path.iterdir()) == []


def test_names_are_a_text_or_in_brackets():
    field = FIELDS["train.trackers"]
    for value in ("wandb,comet", "wandb, comet,", ["wandb", "comet", "wandb"]):
        assert tracker_names(checked("train.trackers", field, value)) == ["wandb", "comet"]
    for value in ("wandb,comte", ("wandb", 3), 3, None):
        with pytest.raises(UserError, match="any of wandb, mlflow, comet"):
            checked("train.trackers", field, value)
    assert tracker_names(field.default) == tracker_names("") == []


def test_they_may_change_on_the_way_and_older_runs_have_none():
    config = config_of("mlflow")
    config.train.steps = 3
    stored = to_dict(config)
    del stored["train"]["trackers"]
    assert from_dict(stored).train.trackers == () and differences(from_dict(stored), config) == []


# --- the real ones --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tracked(commands, tmp_path_factory):
    """A run that was stopped and went on, recorded by all trackers that are installed, and what it said."""
    installed = [name for name, (module, _) in trackers.KINDS.items() if importlib.util.find_spec(module)]
    if not installed:
        pytest.skip("no tracker is installed: pip install '.[mlflow]', or wandb, comet")
    folder = tmp_path_factory.mktemp("tracked")
    (folder / "blocked" / "tensorflow").mkdir(parents=True)
    (folder / "blocked" / "tensorflow" / "__init__.py").write_text(
        f"open({str(folder / 'tensorflow was imported')!r}, 'w')\nraise ImportError('tensorflow is blocked')\n"
    )
    environment = {"PYTHONPATH": f"{folder / 'blocked'}:{os.environ.get('PYTHONPATH', '')}", "WANDB_MODE": "offline"}
    environment |= {"MLFLOW_TRACKING_URI": f"file://{folder / 'mlruns'}", "MLFLOW_ALLOW_FILE_STORE": "true"}
    environment |= {"COMET_API_KEY": "", "HOME": str(folder)}
    run = folder / "a run"
    call = commands.training(run, train__steps=160, train__eval_every=2, train__trackers=",".join(installed))
    process = commands.popen("main", *call, environment=environment)
    while not (line := process.stderr.readline()).startswith("step "):
        assert line, process.communicate()
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 75, err
    records = json.loads((run / "trackers.json").read_text())
    out, err = commands.run("main", *call, environment=environment)
    assert "warning" not in err and "going on from step" in out
    assert not (folder / "tensorflow was imported").exists()
    now, rows = json.loads((run / "trackers.json").read_text()), read_metrics(run / "metrics.csv")
    summary = json.loads((run / "summary.json").read_text())
    return SimpleNamespace(folder=folder, run=run, out=out, before=records, now=now, rows=rows, summary=summary)


def expected(rows, name):
    return [(int(row["step"]), row[name]) for row in rows if row[name] is not None]


def test_mlflow_has_the_whole_run_in_one_record(tracked, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="pip install '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(f"file://{tracked.folder / 'mlruns'}")
    (run,) = client.search_runs([client.get_experiment_by_name("vit_jax").experiment_id])
    assert run.info.run_id == tracked.before["mlflow"]["record"] == tracked.now["mlflow"]["record"]
    assert (run.info.run_name, run.info.status) == ("a run", "FINISHED")
    assert run.data.params.keys() == FIELDS.keys() and run.data.params["model.width"] == "16"
    for name in COLUMNS[1:]:
        sent = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))
        assert sent == expected(tracked.rows, name), name
    assert run.data.metrics["test_accuracy"] == tracked.summary["test_accuracy"]
    assert run.data.tags["protocol"] == tracked.summary["protocol"]
    names = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert names >= {"curves.png", "summary.json", "confusion.png"}
    sent = client.download_artifacts(run.info.run_id, "summary.json", str(tracked.folder))
    assert json.loads(open(sent).read()) == tracked.summary


def wandb_records(path):
    """The records of a .wandb file, which is a LevelDB log after its first 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # too little for a record's head: the next block
            place += 32768 - place % 32768
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the last part of one
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def test_wandb_offline_has_a_second_record_with_the_whole_run(tracked):
    pytest.importorskip("wandb", reason="pip install '.[wandb]'")
    first, second = tracked.before["wandb"]["record"], tracked.now["wandb"]["record"]
    assert first != second and f"cannot go on with the record {first}" in tracked.out
    (path,) = tracked.run.glob(f"wandb/offline-run-*-{second}/run-{second}.wandb")
    records = list(wandb_records(path))
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert run.display_name == "a run" and run.project == "vit_jax"
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config.keys() >= FIELDS.keys() and config["model.width"] == 16
    history = [
        {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    for name in COLUMNS[1:]:
        assert [(x["_step"], x[name]) for x in history if name in x] == expected(tracked.rows, name), name
    assert "curves" in history[-1]
    last = {item.key: item.value_json for r in records for item in r.summary.update}
    assert json.loads(last["test_accuracy"]) == tracked.summary["test_accuracy"]


def test_comet_offline_goes_on_with_its_record(tracked):
    pytest.importorskip("comet_ml", reason="pip install '.[comet]'")
    assert tracked.before["comet"]["record"] == tracked.now["comet"]["record"]
    assert f"send {tracked.run / 'comet'}/*.zip with `comet upload`" in tracked.out
    parts = sorted((tracked.run / "comet").glob("*.zip"), key=lambda path: path.stat().st_mtime)
    assert len(parts) == 2
    messages, strategies = [], []
    for part in parts:
        with zipfile.ZipFile(part) as archive:
            about = json.loads(archive.read("experiment.json"))
            strategies.append((about["offline_id"], about["resume_strategy"]))
            messages += [json.loads(line) for line in archive.read("messages.json").splitlines()]
    record = tracked.now["comet"]["record"]
    assert strategies == [(record, "create"), (record, "get")]
    sent = [m["payload"]["metric"] for m in messages if m["type"] == "metric_msg"]
    for name in COLUMNS[2:]:
        assert [(m["step"], m["metricValue"]) for m in sent if m["metricName"] == name] == expected(tracked.rows, name)
    sent = [m["payload"] for m in messages if m["type"] == "parameter_msg"]
    assert {(p.get("param") or p["params"])["paramName"] for p in sent} >= FIELDS.keys()  # params: of several values
    pictures = {m["payload"]["additional_params"]["figName"] for m in messages if m["type"] == "file_upload"}
    assert pictures >= {"curves", "confusion"}
    others = {m["payload"]["key"]: m["payload"]["value"] for m in messages if m["type"] == "log_other"}
    assert float(others["test_accuracy"]) == pytest.approx(tracked.summary["test_accuracy"])


def test_one_that_does_not_answer_is_an_error(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="pip install '.[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match="mlflow cannot be used .*127.0.0.1"):
        Tracking(tmp_path / "run", config_of("mlflow"))
    assert not (tmp_path / "run").exists()

"""Trackers: what a run writes is also sent to Weights & Biases, MLflow or Comet, where people keep their experiments.

Each library is set up in its own way (its login, its environment variables) and imported only where it is asked for.
"""

import importlib
import json
import logging
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from ml_collections import ConfigDict

from vit_jax.config import FIELDS, get, tracker_names
from vit_jax.errors import UserError, one_line
from vit_jax.training import processes, runs
from vit_jax.training.writers import COLUMNS, Row, write_json

PROJECT = "vit_jax"  # where the tracker's own environment variable names no other


class Tracker(Protocol):
    """A run's record in one tracker.

    Attributes:
      record: what the tracker knows it by.
      note: what the user should know, or "".
    """

    record: str
    note: str

    def add(self, row: Row) -> None:
        """Sends a row of metrics.csv."""

    def finish(self, summary: Mapping[str, Any], pictures: Sequence[pathlib.Path]) -> None:
        """Sends the end of the run."""

    def close(self, done: bool) -> None:
        """Ends the record, or for now where the run is not `done`."""


# Opens a record, of: the tracker's library, the run's workdir, its config as {path: value}, which a new record is sent,
# and the record to go on with, None for a new one. Where it cannot go on with that, it opens another.
Opener = Callable[[Any, pathlib.Path, Mapping[str, Any], str | None], Tracker]


class Wandb:
    """Offline (WANDB_MODE=offline) it writes into the workdir, for `wandb sync`, and cannot go on with a record."""

    def __init__(self, library: Any, workdir: pathlib.Path, config: Mapping[str, Any], record: str | None):
        self._image = library.Image
        offline = library.setup().settings.mode in ("offline", "dryrun")
        again = None if offline else record
        self._run = library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=runs.name_of(workdir),
            dir=workdir,
            id=again,
            resume="must" if again else None,
            config=None if again else dict(config),
            settings=library.Settings(console="off", silent=True, init_timeout=30),
        )
        self.record = self._run.id
        self.note = f"wandb writes offline: send {workdir / 'wandb'} with `wandb sync`" if offline else ""
        if offline and record:
            self.note += f"; it cannot go on with the record {record}: this is a second one of the same name"

    def add(self, row: Row) -> None:
        self._run.log(_measured(row), step=int(row["step"]))

    def finish(self, summary: Mapping[str, Any], pictures: Sequence[pathlib.Path]) -> None:
        self._run.log({path.stem: self._image(str(path)) for path in pictures})
        self._run.summary.update(dict(summary))

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class Mlflow:
    """To the server or store of MLFLOW_TRACKING_URI, else to mlflow's own default."""

    def __init__(self, library: Any, workdir: pathlib.Path, config: Mapping[str, Any], record: str | None):
        # Its own patience with a server that does not answer is minutes, in which the run would stand still.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self._entities, self._client = library.entities, library.MlflowClient()
        self.note = ""
        if record:
            self.record = record
            self._client.update_run(record, status="RUNNING")
            return
        project = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self._client.get_experiment_by_name(project)
        place = experiment.experiment_id if experiment else self._client.create_experiment(project)
        self.record = self._client.create_run(place, run_name=runs.name_of(workdir)).info.run_id
        params = [library.entities.Param(name, str(value)) for name, value in config.items()]
        self._client.log_batch(self.record, params=params)

    def add(self, row: Row) -> None:
        self._log(_measured(row), int(row["step"]))

    def finish(self, summary: Mapping[str, Any], pictures: Sequence[pathlib.Path]) -> None:
        new = {name: value for name, value in summary.items() if name not in COLUMNS and value is not None}
        self._log({name: x for name, x in new.items() if not isinstance(x, str)}, summary["steps"])
        for name, value in new.items():
            if isinstance(value, str):
                self._client.set_tag(self.record, name, value)
        self._client.log_dict(self.record, dict(summary), "summary.json")
        for path in pictures:
            self._client.log_artifact(self.record, str(path))

    def close(self, done: bool) -> None:
        self._client.set_terminated(self.record, "FINISHED" if done else "KILLED")

    def _log(self, values: Mapping[str, float], step: int) -> None:
        now = int(1000 * time.time())
        metrics = [self._entities.Metric(name, value, now, step) for name, value in values.items()]
        self._client.log_batch(self.record, metrics=metrics)


class Comet:
    """Where there is no key, or COMET_OFFLINE_DIRECTORY is set, it writes archives for `comet upload`."""

    def __init__(self, library: Any, workdir: pathlib.Path, config: Mapping[str, Any], record: str | None):
        logging.getLogger("comet_ml").setLevel(logging.ERROR)
        folder = os.environ.get("COMET_OFFLINE_DIRECTORY")
        offline = folder is not None or library.config.get_api_key(None, library.get_config()) is None
        folder = folder or str(workdir / "comet")
        self._experiment = library.start(
            project_name=os.environ.get("COMET_PROJECT_NAME", PROJECT),
            online=not offline,
            mode="get" if record else "create",
            experiment_key=record,
            experiment_config=library.ExperimentConfig(
                name=runs.name_of(workdir),
                offline_directory=folder if offline else None,
                # What it finds out by itself is left out: it would reach into other libraries, and send the code.
                log_env_details=False,
                log_code=False,
                log_git_patch=False,
                parse_args=False,
                auto_param_logging=False,
                auto_metric_logging=False,
                auto_output_logging=False,
                display_summary_level=0,
            ),
        )
        if not self._experiment.alive:
            raise ConnectionError("it does not answer, or does not know the key")
        self.record = self._experiment.get_key()
        self.note = f"comet writes offline: send {folder}/*.zip with `comet upload`" if offline else ""
        if not record:
            self._experiment.log_parameters(dict(config))

    def add(self, row: Row) -> None:
        values = _measured(row)
        self._experiment.log_metrics(values, step=int(row["step"]), epoch=values.pop("epoch"))

    def finish(self, summary: Mapping[str, Any], pictures: Sequence[pathlib.Path]) -> None:
        self._experiment.log_others(dict(summary))
        for path in pictures:
            self._experiment.log_image(str(path), name=path.stem)

    def close(self, done: bool) -> None:
        self._experiment.end()


KINDS: dict[str, tuple[str, Opener]] = {  # the library to import, and what opens a record with it
    "wandb": ("wandb", Wandb),
    "mlflow": ("mlflow", Mlflow),
    "comet": ("comet_ml", Comet),
}


class Tracking:
    """A run's records in the trackers that its config names; trackers.json keeps which, and what was sent last.

    To open one that cannot be used is an error; one that fails later is left with a warning.

    Attributes:
      notes: lines for the user.

    Raises:
      UserError: a library is not installed, or a tracker cannot be reached; nothing new is left in the workdir.
    """

    def __init__(self, workdir: pathlib.Path, config: ConfigDict, kinds: Mapping[str, tuple[str, Opener]] = KINDS):
        self._workdir, self._done = workdir, False
        self._path = workdir / "trackers.json"
        self._open: dict[str, Tracker] = {}
        names = tracker_names(config.train.trackers) if processes.is_first() else []
        # Records of a start that came to nothing, perhaps with another config, are not gone on with.
        self._records = _read(self._path) if names and (workdir / "config.json").exists() else {}
        libraries = {name: _library(name, kinds[name][0]) for name in names}
        fields = {path: get(config, path) for path in FIELDS}
        new = not workdir.exists()
        workdir.mkdir(parents=True, exist_ok=True)
        before = set(workdir.iterdir())
        for name, library in libraries.items():
            stored = self._records.get(name, {"record": None})
            try:
                tracker = kinds[name][1](library, workdir, fields, stored["record"])
            except Exception as error:
                self.close()
                for path in set(workdir.iterdir()) - before:
                    shutil.rmtree(path, ignore_errors=True)
                if new:
                    workdir.rmdir()
                anew = f"; to begin a new record, remove {self._path}" if stored["record"] else ""
                raise UserError(
                    f"the tracker {name} cannot be used ({one_line(error)}): set it up, or leave it out of "
                    f"train.trackers{anew}"
                ) from error
            self._open[name] = tracker
            if tracker.record != stored["record"]:
                self._records[name] = {"record": tracker.record, "step": 0}
        self.notes = [tracker.note for tracker in self._open.values() if tracker.note]
        self._keep()

    def add(self, row: Row) -> None:
        """Sends a row of metrics.csv to the records that do not have it."""

        def send(name: str, tracker: Tracker) -> None:
            if row["step"] > self._records[name]["step"]:
                tracker.add(row)
                self._records[name]["step"] = row["step"]

        self._each(send)
        self._keep()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Sends the summary and the run's pictures: the run is done."""
        pictures = [self._workdir / "curves.png", *sorted((self._workdir / "figures").glob("*.png"))]
        self._each(lambda _, tracker: tracker.finish(summary, [path for path in pictures if path.exists()]))
        self._done = True

    def close(self) -> None:
        self._each(lambda _, tracker: tracker.close(self._done))

    def _each(self, act: Callable[[str, Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(name, tracker)
            except Exception as error:
                del self._open[name]
                warning = f"warning: the tracker {name} failed ({one_line(error)}); it gets no more"
                print(warning, file=sys.stderr, flush=True)

    def _keep(self) -> None:
        if self._records:
            write_json(self._path, self._records)


def _read(path: pathlib.Path) -> dict[str, Any]:
    """{tracker: its record, and the step of the last row that was sent}."""
    if not path.exists():
        return {}
    try:
        return {
            name: {"record": kept["record"], "step": kept["step"]}
            for name, kept in json.loads(path.read_text()).items()
        }
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove it, and the run begins new records") from error


def _library(name: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"train.trackers names {name}, but {module} cannot be imported ({error}): pip install "
            f'"vit_jax[{name}]", or leave it out'
        ) from error


def _measured(row: Row) -> dict[str, float]:
    return {name: row[name] for name in COLUMNS[1:] if row[name] is not None}

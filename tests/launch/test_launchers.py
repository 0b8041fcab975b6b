"""launch/: the shell scripts and the manifest say what they should, and SLURM's is run on a real SLURM."""

import contextlib
import copy
import csv
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jsonschema
import kubernetes_validate
import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
SCRIPTS = [*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch"), *ROOT.glob("tests/launch/*.sh"), ROOT / ".ci/run"]
KUBERNETES = "1.31.0"


def run(*call, code=0, **environment):
    call, environment = list(map(str, call)), os.environ | environment
    done = subprocess.run(call, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=60)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def test_scripts_pass_shellcheck():
    assert len(SCRIPTS) == 7
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    run(shutil.which("shellcheck", path=path), *SCRIPTS)


@pytest.mark.parametrize(
    "call",
    [
        "local.sh",
        "local.sh 2",
        "local.sh two configs/digits.py",
        "slurm.sbatch",
        "tpu_vm.sh",
        "tpu_vm.sh run",
        "gpu_benchmark.sh a b",
        "reproduce.sh a b",
        "reproduce.sh --cifar100",
    ],
)
def test_what_is_missing_is_wrong_input(call):
    name, *arguments = call.split()
    error = run("bash", ROOT / "launch" / name, *arguments, code=2).stderr
    assert error.startswith("error: usage: ") and len(error.splitlines()) == 1


def test_a_gpus_table_has_the_rows_that_were_made_and_says_what_failed(tmp_path):
    """With a Python whose benchmark answers at once, and for ViT-B/16 with all of it not at all."""
    row = {"batch_size": 7, "images_per_second": 123.4, "milliseconds_per_step": 5.0, "spread": 0.1, "mfu": None}
    rows = [row | {"compile_seconds": 8.5, "peak_memory_bytes": None}]
    python = f"""#!/bin/bash
    if [[ $1 != -m ]]; then exec {sys.executable} "$@"; fi
    while [[ $1 != --json ]]; do shift; done
    if [[ $2 == */base.json ]]; then exit 1; fi
    echo '{json.dumps(rows)}' > "$2"
    """
    (tmp_path / "python").write_text(python)
    (tmp_path / "python").chmod(0o755)
    folder = tmp_path / "out"
    said = run("launch/gpu_benchmark.sh", folder, code=1, PYTHON=str(tmp_path / "python")).stdout.splitlines()
    header = next(i for i, line in enumerate(said) if line.startswith("run "))
    assert f"base: exit code 1, see {folder}/base.log" in said[:header]
    names = ["tiny_bare", "small_bare", "base_bare", "tiny", "small", "tiny_sweep"]
    assert [line.split()[:5] for line in said[header + 1 :]] == [[name, "ours", "7", "123", "5.00"] for name in names]
    late = run("launch/gpu_benchmark.sh", folder, code=2, MINUTES="many").stderr
    assert late.startswith("error: MINUTES=many") and len(late.splitlines()) == 1


CLAIMS = re.findall(r'^  "(.*)"$', (ROOT / "launch/reproduce.sh").read_text(), re.MULTILINE)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.split("|")[2])
def test_what_is_reproduced_is_what_is_stated(claim):
    _, _, source, then, _ = claim.split("|")
    stated = "".join(path.read_text() for path in (ROOT / "RESULTS.md", ROOT / "configs/digits.py"))
    assert source == "killed.json differing" or re.search(rf"(?<![\d,.]){re.escape(then)}(?![\d,.]\d)", stated)


# A Python that measures nothing and answers at once.
FAKE = """#!/bin/bash
if [[ $1 == -c ]]; then exit; fi
if [[ $1 != -m ]]; then exec {python} "$@"; fi
case "$2 $*" in
  *--help*) ;;
  *benchmark*) echo '[{{"images_per_second": 600.0}}]' > "${{@: -1}}" ;;
  *main*--workdir*)
    while [[ $1 != --workdir ]]; do shift; done
    again=$([[ -e $2 ]] && echo yes)
    mkdir -p "$2/checkpoints/90"
    if [[ $2 == killed && ! $again ]]; then exec sleep 60; fi
    echo '{summary}' > "$2/summary.json" ;;
  *export*) {python} -c 'import numpy; numpy.savez("whole.npz", a=1.0); numpy.savez("killed.npz", a={exported})' ;;
  *) exit 3 ;;
esac
"""


@pytest.mark.parametrize(
    "measured, exported, wrong",
    [
        ({"test_accuracy": 0.99, "images_per_second": 4000.0}, 1.0, []),
        (
            {"test_accuracy": 0.98},
            2.0,
            ["digits, test accuracy", "digits, images/s", "arrays that differ after kill -9"],
        ),
    ],
)
def test_a_claim_that_no_longer_holds_is_a_failure(measured, exported, wrong, tmp_path):
    summary = json.dumps({"train_seconds": 30.0, "parameters": 136_010} | measured)
    (tmp_path / "python").write_text(FAKE.format(python=sys.executable, summary=summary, exported=exported))
    (tmp_path / "python").chmod(0o755)
    call = ["launch/reproduce.sh", tmp_path / "out"]
    said = run(*call, code=1 if wrong else 0, PYTHON=str(tmp_path / "python")).stdout.splitlines()
    header = next(i for i, line in enumerate(said) if line.startswith("claim "))
    assert len(said[header + 1 :]) == len([claim for claim in CLAIMS if "cifar10/" not in claim])
    assert [line[:40].strip() for line in said[header + 1 :] if " NO " in line] == wrong
    again = run(*call, code=2).stderr
    assert again.startswith("error: ") and "is there already" in again


# TPU VM

TPU = {"PROJECT": "p", "ZONE": "z"}


@pytest.mark.parametrize("queued", ["0", "1"])
def test_a_dry_run_prints_what_would_be_done_and_does_nothing(queued, tmp_path):
    for name in ("gcloud", "git"):
        (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    call = ["launch/tpu_vm.sh", "--dry-run", "run", "configs/digits.py", "--workdir", "runs/a b"]
    printed = run(*call, **TPU, QUEUED=queued, SPOT=queued, BUCKET="my bucket", PATH=path).stdout
    assert not (tmp_path / "called").exists()

    say = "".join(f"{name}() {{ printf '%s\\037' {name} \"$@\"; printf '\\036'; }}\n" for name in ("gcloud", "git"))
    commands = [c.split("\x1f")[:-1] for c in run("bash", "-c", say + printed).stdout.split("\x1e")[:-1]]
    if queued == "1":
        assert [c[3:5] for c in commands if c[:3] == "gcloud compute tpus".split()] == [
            ["queued-resources", "create"],
            ["tpu-vm", "scp"],
            *3 * [["tpu-vm", "ssh"]],
            ["queued-resources", "delete"],
        ]
    assert all({"--project=p", "--zone=z"} <= set(c) for c in commands if c[0] == "gcloud")
    assert ("--spot" in commands[0]) == (queued == "1")
    remote = [c[-1].removeprefix("--command=") for c in commands if "ssh" in c]
    for script in remote:
        run("bash", "-n", "-c", script)
    assert "gcsfuse --implicit-dirs --metadata-cache-ttl-secs 0 my\\ bucket vit_jax/runs" in remote[0]


def test_what_the_workers_are_told_trains_is_followed_and_gives_its_exit_code(tmp_path):
    """With a gcloud that does on this machine what it is told to do on a worker, and a Python that says what it got."""
    (tmp_path / "vit_jax").mkdir()
    (tmp_path / "venv/bin").mkdir(parents=True)
    for path, text in {
        "gcloud": f'cd {tmp_path}\nfor last; do :; done\nbash -c "${{last#--command=}}"',
        "venv/bin/python": 'pwd; printf "<%s>" "$@"; exit 75',
    }.items():
        (tmp_path / path).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / path).chmod(0o755)
    tpu = TPU | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    run("launch/tpu_vm.sh", "train", "configs/digits.py", "--workdir", "runs/a 'b'", **tpu)
    where, said = run("launch/tpu_vm.sh", "log", **tpu, code=75).stdout.splitlines()
    assert where == str(tmp_path / "vit_jax")
    assert said == "<-m><vit_jax.main><--config><configs/digits.py><--workdir><runs/a 'b'><--coordinator><auto>"


# GKE

# JobSet's fields that the manifest may use (its v1alpha2 API); a Job in it is checked as Kubernetes itself would.
TEXT, COUNT = {"type": "string", "minLength": 1}, {"type": "integer", "minimum": 0}


def fields(required=(), **properties):
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


def some(item):
    return {"type": "array", "items": item, "minItems": 1}


RULE = fields(
    ["name", "action"],
    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
    onJobFailureReasons=some({"enum": ["BackoffLimitExceeded", "DeadlineExceeded", "PodFailurePolicy"]}),
    targetReplicatedJobs=some(TEXT),
)
JOBSET = fields(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=fields(["name"], name=TEXT, annotations={"type": "object"}),
    spec=fields(
        ["replicatedJobs"],
        network=fields(enableDNSHostnames={"type": "boolean"}, subdomain=TEXT),
        failurePolicy=fields(maxRestarts=COUNT, rules=some(RULE)),
        replicatedJobs=some(
            fields(["name", "template"], name=TEXT, replicas=COUNT, template=fields(["spec"], spec={"type": "object"}))
        ),
    ),
)


@pytest.mark.parametrize("kind", ["GPU", "TPU"])
def test_the_manifest_is_what_kubernetes_and_jobset_take(kind):
    text = (ROOT / "launch/gke_jobset.yaml").read_text()
    if kind == "TPU":
        (command,) = [line for line in text.splitlines() if line.startswith("#     sed ")]
        text = run("bash", "-c", command.removeprefix("#").partition("|")[0]).stdout
    service, jobset = yaml.safe_load_all(text)
    kubernetes_validate.validate(service, KUBERNETES, strict=True)
    jsonschema.validate(jobset, JOBSET)
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, "spec": workers["template"]["spec"]}
    kubernetes_validate.validate(job, KUBERNETES, strict=True)
    wrong = copy.deepcopy(job)
    wrong["spec"]["template"]["spec"]["nodeSelectors"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)

    name, network = jobset["metadata"]["name"], jobset["spec"]["network"]
    assert service["metadata"]["name"] == network["subdomain"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"jobset.sigs.k8s.io/jobset-name": name}
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    arguments = dict(argument.split("=", 1) for argument in container["args"])
    assert job["spec"]["parallelism"] == job["spec"]["completions"]
    assert [list(container["resources"]["limits"]), arguments["--coordinator"]] == {
        "GPU": [["nvidia.com/gpu"], f"{name}-{workers['name']}-0-0.{network['subdomain']}:1234"],
        "TPU": [["google.com/tpu"], "auto"],
    }[kind]
    assert arguments.get("--num_processes") in (None, str(job["spec"]["completions"]))
    assert {v["name"] for v in pod["volumes"]} == {m["name"] for m in container["volumeMounts"]}
    assert job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["containerName"] == container["name"]
    assert (ROOT / arguments["--config"]).exists()


# SLURM


def slurm_runs():
    """With a configuration that was named: nobody's real cluster gets jobs from tests."""
    return "SLURM_CONF" in os.environ and subprocess.run(["sinfo"], capture_output=True).returncode == 0


def numbers(workdir):
    with (workdir / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {(row["step"], name): float(row[name]) for row in rows for name in ("train_loss", "val_loss")}


@pytest.mark.slurm
@pytest.mark.skipif(not slurm_runs(), reason="no SLURM runs here (tests/launch/slurm.sh starts one)")
def test_a_slurm_job_that_is_requeued_goes_on_to_the_same_numbers(finished, commands, tmp_path):
    call = commands.training(tmp_path / "run", checkpoint__every=0.1)[1:]
    log = tmp_path / "log"
    log.touch()
    options = ["--ntasks-per-node=2", "--cpus-per-task=1", "--gres=none", "--time=10", f"--output={log}"]
    environment = commands.environment | {"PYTHON": sys.executable}
    number = run("sbatch", *options, "launch/slurm.sbatch", *call, **environment).stdout.split()[-1]
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["scancel", number])  # where something fails; a job that is done stays done
        follow = subprocess.Popen(["timeout", "300", "tail", "-n", "+1", "-F", log], stdout=subprocess.PIPE, text=True)
        stack.callback(follow.kill)
        said = []

        def until(start):
            for line in follow.stdout:
                said.append(line)
                if line.startswith(start):
                    return
            raise AssertionError("".join(said))

        until("step 9/24")
        run("scancel", "--signal=USR1", number)  # to the step alone, as sbatch's --signal before the limit
        until("stopped: saved step")
        until(f"job {number} on")
        until("going on from step")
        until("step 18/24")
        run("scontrol", "requeue", number)
        until("stopped: saved step")
        until(f"job {number} on")
        until("going on from step")
        until("test accuracy")
        state = "RUNNING"
        while state in ("RUNNING", "COMPLETING"):
            state = run("scontrol", "show", "job", number).stdout.split("JobState=")[1].split()[0]
        assert state == "COMPLETED"
    assert numbers(tmp_path / "run") == pytest.approx(numbers(finished), rel=1e-5)

"""Whether the tests can fail: small faults put into the code, one at a time, and the tests of its room run on each.

    python tests/mutate.py --count 300 --seed 0 --output /tmp/mutants.jsonl

Mutants are drawn from all places in ROOMS where an operator, a comparison, a number, a condition, an argument or a
statement can be changed. Each is tried in a copy of the checkout and in a process of its own, forked from one that has
the libraries loaded and nothing of the project; it is killed where a test fails or takes too long. The table, and each
survivor's line, is printed last; mutants that OUTPUT holds already are not tried again. 300 take an hour or two, so
that this is no part of CI.
"""

import argparse
import ast
import collections
import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 400  # seconds
FRESH = multiprocessing.get_context("forkserver")
LIBRARIES = "jax flax.linen optax orbax.checkpoint PIL.Image hypothesis.strategies torch transformers.models.vit pytest"
# Files, and the tests that must notice a fault in them, the likeliest first.
ROOMS = {
    "augment/*.py": ["augment"],
    "models/[!pa]*.py": [
        "models/test_vit.py",
        "models/test_stems.py",
        "models/test_resnet.py",
        "models/test_parity.py",
    ],
    "models/names.py": ["models/test_pretrained.py", "models/test_parity.py", "models/test_archives.py"],
    "models/presets.py": ["models/test_presets.py", "models/test_parity.py"],
    "models/pretrained.py": ["models/test_pretrained.py", "models/test_archives.py", "models/test_parity.py"],
    "models/archives.py": ["models/test_archives.py", "models/test_pretrained.py"],
    "training/step.py": ["training/test_step.py", "training/test_multipliers.py"],
    "training/optim.py": ["training/test_optim.py", "training/test_multipliers.py"],
    "training/rules.py": ["training/test_multipliers.py", "training/test_optim.py"],
    "data/resident.py": ["data/test_resident.py"],
}
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.RShift: ast.LShift, ast.MatMult: ast.Add,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def places(tree: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """The nodes that can be changed, each with how, in a fixed order; none in messages, types or decorators."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "decorator_list", "type_params") or isinstance(tree, ast.JoinedStr):
            continue
        for node in value if isinstance(value, list) else [value]:
            if not isinstance(node, ast.AST):
                continue
            if isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in SWAPS:
                yield node, "operator"
            if isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
                yield node, "comparison"
            if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
                yield node, "constant"
            if isinstance(node, ast.If | ast.IfExp | ast.While):
                yield node, "condition"
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
                yield node, "sign"
            if isinstance(node, ast.Call) and any(keyword.arg for keyword in node.keywords):
                yield node, "argument"
            if isinstance(node, ast.Raise | ast.AugAssign) or (
                isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)
            ):
                yield node, "statement"
            yield from places(node)


def changed(node: ast.AST, how: str) -> ast.AST:
    """The node with a fault in it."""
    match how, node:
        case "operator", ast.BinOp() | ast.BoolOp() | ast.AugAssign():
            node.op = SWAPS[type(node.op)]()
        case "comparison", ast.Compare():
            node.ops[0] = SWAPS[type(node.ops[0])]()
        case "constant", ast.Constant():
            node.value = not node.value if isinstance(node.value, bool) else node.value + 1
        case "condition", ast.If() | ast.IfExp() | ast.While():
            node.test = ast.UnaryOp(ast.Not(), node.test)
        case "sign", ast.UnaryOp():
            return node.operand
        case "argument", ast.Call():
            node.keywords.remove([keyword for keyword in node.keywords if keyword.arg][-1])
        case "statement", ast.stmt():
            return ast.Pass()
    return node


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, how: str):
        self.old, self.how = old, how

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(changed(node, self.how), node) if node is self.old else self.generic_visit(node)


def mutant(path: pathlib.Path, place: int) -> tuple[str, int, str, str]:
    """A file's text with the fault `place`; its line, what stood there and what stands there now."""
    tree = ast.parse(path.read_text())
    node, how = list(places(tree))[place]
    line, before = node.lineno, ast.unparse(node).splitlines()[0]  # type: ignore[attr-defined]
    new = changed_at(tree, node, how)
    return ast.unparse(new), line, before, how


def changed_at(tree: ast.Module, node: ast.AST, how: str) -> ast.Module:
    return ast.fix_missing_locations(Replace(node, how).visit(tree))


def all_places() -> list[tuple[str, int, str]]:
    """(file, place, pattern) of every mutant that there is."""
    found = {}
    for pattern in ROOMS:
        for path in sorted((ROOT / "vit_jax").glob(pattern)):
            for i in range(len(list(places(ast.parse(path.read_text()))))):
                found[str(path.relative_to(ROOT)), i] = pattern  # a later pattern says it better
    return [(file, i, pattern) for (file, i), pattern in found.items()]


class CheapFirst:
    """Notes the seconds of each test, and runs those of a file in their order where they are known."""

    def __init__(self, seconds: dict[str, float]):
        self.seconds = collections.Counter(seconds)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        files = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (files.index(item.path), self.seconds[item.nodeid]))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration


def tried(copy: pathlib.Path, room: list[str], seconds: dict[str, float], stem: str = "") -> tuple[bool, str]:
    """Whether tests of a room fail in a copy of the checkout, those named after the file `stem` first; and which does.

    Where none fails `seconds` gets what each test took.
    """
    folders = [copy / "tests" / name for name in room]
    names = [path for folder in folders for path in sorted(folder.glob("test_*.py")) or [folder]]
    names.sort(key=lambda path: path.stem != f"test_{stem}")
    with tempfile.NamedTemporaryFile("w+") as log, tempfile.NamedTemporaryFile("w+") as times:
        process = FRESH.Process(target=run, args=(copy, names, seconds, log.name, times.name))
        process.start()
        process.join(TIMEOUT if stem else None)
        if process.exitcode is None:
            process.kill()
            process.join()
            return True, "too slow"
        if process.exitcode:
            said = [line for line in log if line.startswith(("FAILED", "ERROR"))]
            return True, said[0].split(" - ")[0].strip() if said else ""
        seconds |= json.load(times)
    return False, ""


def run(copy: pathlib.Path, names: list[pathlib.Path], seconds: dict[str, float], log: str, times: str) -> None:
    """Runs tests up to the first that fails, in this process, which ends."""
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # of commands that the tests start
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    order = CheapFirst(seconds)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "no:randomly", "--no-header", "--tb=no"]
    code = pytest.main([*options, *map(str, names)], plugins=[order])
    pathlib.Path(times).write_text(json.dumps(order.seconds))
    sys.exit(int(code))


def told(row: dict) -> str:
    return f"{row['file']}:{row['line']} {row['how']}: {row['was']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", metavar="TEXT", help="of files whose name has it alone")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("mutants.jsonl"))
    args = parser.parse_args()
    candidates = [place for place in all_places() if args.only in place[0]]
    drawn = random.Random(args.seed).sample(candidates, min(args.count, len(candidates)))
    known = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    done = {(row["file"], row["place"]): row for row in known}
    patterns, local = list(dict.fromkeys(pattern for *_, pattern in drawn)), threading.local()
    seconds: dict[str, float] = {}
    FRESH.set_forkserver_preload(LIBRARIES.split())
    os.environ |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{args.output}.cache"  # what has no fault is compiled once
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:

        def one(file: str, place: int, pattern: str) -> dict:
            if not hasattr(local, "copy"):
                local.copy = pathlib.Path(tempfile.mkdtemp(dir=folder))
                for name in ("vit_jax", "tests", "configs", "benchmarks", "pyproject.toml"):
                    source = ROOT / name
                    (shutil.copytree if source.is_dir() else shutil.copy)(source, local.copy / name)
            text, line, before, how = mutant(ROOT / file, place)
            (local.copy / file).write_text(text)
            try:
                killed, by = tried(local.copy, ROOMS[pattern], seconds, pathlib.Path(file).stem)
            finally:
                shutil.copy(ROOT / file, local.copy / file)
            return {"file": file, "place": place, "line": line, "how": how, "was": before, "killed": killed, "by": by}

        for pattern, (failed, by) in zip(
            patterns, pool.map(lambda x: tried(ROOT, ROOMS[x], seconds), patterns), strict=True
        ):
            if failed:
                sys.exit(f"error: without any fault {by or pattern} fails: mend it first")
        trials = [pool.submit(one, *x) for x in drawn if x[:2] not in done]
        for trial in concurrent.futures.as_completed(trials):
            row = trial.result()
            done[row["file"], row["place"]] = row
            with args.output.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                "killed  " if row["killed"] else "SURVIVED",
                f"{row['file']}:{row['line']}",
                row["how"],
                row["was"],
                flush=True,
            )
    rows = [done[x[:2]] for x in drawn]
    count = collections.Counter(row["file"] for row in rows)
    killed = collections.Counter(row["file"] for row in rows if row["killed"])
    print(f"\n{'file':<32} {'mutants':>8} {'killed':>7}")
    for name in sorted(count):
        print(f"{name:<32} {count[name]:>8} {killed[name] / count[name]:>7.1%}")
    print(f"{'all':<32} {len(rows):>8} {killed.total() / len(rows):>7.1%}")
    for row in rows:
        if not row["killed"]:
            print(f"survived: {told(row)}")


if __name__ == "__main__":
    main()

"""What each way of computing a training step is worth on this machine: with it and without, in turn.

    python benchmarks/tuning.py --config configs/cifar100_tiny.py:reference
    python benchmarks/tuning.py --config configs/cifar100_tiny.py:reference --only attention layers

A row is one change to the config's bare training (no augmentation, dropout or averaged weights): images/s before and
after, medians of windows that take turns, and their ratio. Compilers' flags are those of the device that is there.
The project keeps what pays; the table is in RESULTS.md. Made-up pictures where the config's own are not here.
"""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import statistics
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vit_jax import command_line, errors
from vit_jax.models import blocks, vit
from vit_jax.training.measuring import Pace, Subject, Training, bare, opened, steps_per_window

Change = Callable[[ConfigDict], contextlib.AbstractContextManager[Training]]


# Ways of making a training


def fields(**values: Any) -> Change:
    """With these fields of the config: `optim__name` is optim.name."""

    @contextlib.contextmanager
    def make(config):
        config.update_from_flattened_dict({name.replace("__", "."): value for name, value in values.items()})
        yield trained(config)

    return make


def patched(target: Any, name: str, new: Any, **values: Any) -> Change:
    """With another thing in the place of `target.name`, while it is compiled."""

    @contextlib.contextmanager
    def make(config):
        with mock.patch.object(target, name, new), fields(**values)(config) as training:
            yield training

    return make


def optimizer(made: Callable[[], optax.GradientTransformation]) -> Change:
    @contextlib.contextmanager
    def make(config):
        subject = opened(config)
        yield trained(config, subject, dataclasses.replace(subject.job.task, optimizer=made()))

    return make


def compiler_options(**options: Any) -> Change:
    compile_ = jax.stages.Lowered.compile
    return patched(jax.stages.Lowered, "compile", lambda lowered: compile_(lowered, compiler_options=options))


def random_bits(name: str) -> Change:
    @contextlib.contextmanager
    def make(config):
        usual = jax.config.values["jax_default_prng_impl"]
        jax.config.update("jax_default_prng_impl", name)
        try:
            with fields(model__dropout=0.1)(config) as training:
                yield training
        finally:
            jax.config.update("jax_default_prng_impl", usual)

    return make


def one_dispatch_a_step(config: ConfigDict) -> contextlib.AbstractContextManager[Training]:
    training = trained(config)
    training.steps_per_call = 1
    return contextlib.nullcontext(training)


def trained(config: ConfigDict, subject: Subject | None = None, task: Any = None) -> Training:
    """A training that has compiled, and makes many steps a dispatch."""
    subject = subject or opened(config)
    training = Training(subject, task)
    training.choose(config.train.steps_per_call)
    return training


# Other forms of what the model is made of


def softmax_first(self, q, k, v, *, train):
    """Attention as it is written in the paper: the weights are divided, and then multiply the values."""
    scores = jnp.einsum("bhqd,bhkd->bhqk", q / math.sqrt(q.shape[-1]), k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores).astype(self.dtype)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v)


def library_attention(implementation: str) -> Callable[..., jax.Array]:
    def attend(self, q, k, v, *, train):
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        return jax.nn.dot_product_attention(q, k, v, implementation=implementation).swapaxes(1, 2)

    return attend


class ThirtyTwoBitDropout(nn.Dropout):
    """Flax's own, which draws 32 bits for each element."""


class PlainLayerNorm(nn.LayerNorm):
    """The variance as the mean of squared distances, in a second pass, and not from the mean of the squares."""

    use_fast_variance: bool = False


class ScannedEncoder(vit.Encoder):
    """The blocks as one scan over parameters that are stacked: it compiles once whatever the depth."""

    @nn.compact
    def __call__(self, x, grid, *, train):
        x = vit.PositionEmbedding(self.position_embedding, self.dtype, name="posembed_input")(x, grid)

        def body(block, x, _):
            return block(x, grid, train), None

        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth)
        x, _ = scan(self.make_block(drop_path=0.0, name="encoderblock"), x, None)
        return nn.LayerNorm(epsilon=self.norm_epsilon, dtype=jnp.float32, name="encoder_norm")(x)


def changes(platform: str) -> dict[str, list[tuple[str, Change, Change]]]:
    """By what they concern: what is changed, before, after."""
    base = fields()
    attention = functools.partial(patched, blocks.SelfAttention, "attend")
    adam = functools.partial(optax.adam, 1e-3)
    flags: dict[str, list[dict[str, Any]]] = {
        "cpu": [
            {"xla_cpu_enable_fast_math": True},
            {"xla_cpu_prefer_vector_width": 512},
            {"xla_cpu_enable_concurrency_optimized_scheduler": False},
            {"xla_cpu_use_onednn": True},
        ],
        "gpu": [
            {"xla_gpu_triton_gemm_any": True},
            {"xla_gpu_enable_command_buffer": ""},
            {"xla_gpu_autotune_level": 0},
            {"xla_gpu_enable_latency_hiding_scheduler": True},
        ],
    }
    table: dict[str, list[tuple[str, Change, Change]]] = {
        "attention": [
            ("attention's softmax divided before the product with v", base, attention(softmax_first)),
            ("jax.nn.dot_product_attention, of XLA", base, attention(library_attention("xla"))),
        ],
        "tokens": [
            ("64 tokens and their mean, not 65 with cls", fields(model__pool="cls"), fields(model__pool="gap")),
            ("3 heads of 64, not 8 of 24", fields(model__num_heads=8), fields(model__num_heads=3)),
            ("6 heads of 32, not 8 of 24", fields(model__num_heads=8), fields(model__num_heads=6)),
        ],
        "pointwise": [
            ("GELU by tanh, not exact", fields(model__gelu="exact"), fields(model__gelu="tanh")),
            ("LayerNorm's variance in two passes", base, patched(nn, "LayerNorm", PlainLayerNorm)),
        ],
        "random": [
            ("dropout of 0.1", base, fields(model__dropout=0.1)),
            (
                "dropout's 8 bits, not 32",
                patched(blocks, "Dropout", ThirtyTwoBitDropout, model__dropout=0.1),
                fields(model__dropout=0.1),
            ),
            ("dropout's bits by rbg, not threefry", fields(model__dropout=0.1), random_bits("rbg")),
        ],
        "optimizer": [
            (
                "Adam on one vector (optax.flatten), not on the tree",
                optimizer(adam),
                optimizer(lambda: optax.flatten(adam())),
            ),
            ("averaged weights", base, fields(ema__decay=0.999)),
            ("Muon, not AdamW", fields(optim__name="adamw"), fields(optim__name="muon")),
        ],
        "layers": [
            ("layers scanned, not unrolled", base, patched(vit, "Encoder", ScannedEncoder)),
            ("layers computed again going backward (remat)", base, fields(model__remat=True)),
        ],
        "dispatch": [("many steps a dispatch, not one", one_dispatch_a_step, base)],
        "flags": [
            (" ".join(f"--{name}={value}" for name, value in one.items()), base, compiler_options(**one))
            for one in flags.get(platform, [])
        ],
    }
    if platform == "gpu":
        table["attention"].append(
            ("jax.nn.dot_product_attention, of cuDNN", base, attention(library_attention("cudnn")))
        )
    return table


# Timing


def main(arguments: list[str]) -> None:
    table = changes(jax.default_backend())
    parser = errors.ArgumentParser(prog="python benchmarks/tuning.py", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE.py[:VARIANT]")
    parser.add_argument("--only", nargs="+", choices=table, default=list(table), metavar="PART", help=", ".join(table))
    parser.add_argument("--windows", type=int, default=5, help="of each side of a row (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="least length of each (2)")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the rows as JSON")
    args, rest = parser.parse_known_args(arguments)
    config, name = command_line.parse(args.config, command_line.overrides_in(rest))
    rows = []
    print(f"{name}, bare, on {jax.devices()[0].device_kind}: images/s\n{'before':>9} {'after':>9} {'ratio':>6}  change")
    for part in args.only:
        for what, before, after in table[part]:
            row = compared(bare(config), before, after, Pace(args.windows, args.seconds))
            rows.append({"change": what, "part": part} | row)
            print(shown(rows[-1]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1))


def compared(config: ConfigDict, before: Change, after: Change, pace: Pace) -> dict[str, Any]:
    """Medians of images/s of both, and of what the change gives; or why it cannot be had here."""
    with contextlib.ExitStack() as stack:
        try:
            both = [stack.enter_context(make(config.copy_and_resolve_references())) for make in (before, after)]
        except (
            jax.errors.JaxRuntimeError,
            RuntimeError,
            ValueError,
        ) as error:  # no such flag, or kernel, on this device
            return {"error": str(error).splitlines()[0]}
        steps = [steps_per_window(training, pace.seconds) for training in both]
        turns = [[n / training(n) for training, n in zip(both, steps, strict=True)] for _ in range(pace.windows)]
    speeds = [config.train.batch_size * statistics.median(side) for side in zip(*turns, strict=True)]
    ratio = statistics.median(new / old for old, new in turns)
    return {"before": speeds[0], "after": speeds[1], "ratio": ratio}


def shown(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"{'':>26}  {row['change']}: {row['error']}"
    return f"{row['before']:>9.1f} {row['after']:>9.1f} {row['ratio']:>6.3f}  {row['change']}"


if __name__ == "__main__":
    errors.run(main)

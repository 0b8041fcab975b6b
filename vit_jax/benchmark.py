"""Compiles a config's training for TPUs that are not there, and says what it takes of each.

python -m vit_jax.benchmark --config configs/cifar100_b16.py --aot v5e:2x4 --config.mesh.fsdp=True
"""

import pathlib

from vit_jax import command_line, errors


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(
        prog="python -m vit_jax.benchmark",
        description=__doc__,
        epilog="Fields of the config can be given as to vit_jax.main: --config.mesh.fsdp=True",
    )
    parser.add_argument("--config", metavar="FILE.py[:VARIANT]", help="what would be trained (needed)")
    parser.add_argument("--aot", metavar="TOPOLOGY", help="the TPUs, as v5e:2x4 (needed); pip install 'vit_jax[tpu]'")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="also write the numbers as JSON")
    args, rest = parser.parse_known_args(arguments)
    overrides = command_line.overrides_in(rest)
    for name in ("config", "aot"):
        if getattr(args, name) is None:
            parser.error(f"--{name} is needed: --config configs/cifar100_b16.py --aot v5e:2x4")
    config, _ = command_line.parse(args.config, overrides)

    from vit_jax.training import ahead  # after the config is known to be right: it takes seconds
    from vit_jax.training.writers import write_json

    found = ahead.compile_ahead(config, args.aot)
    collectives = ", ".join(f"{number} {name}" for name, number in found["collectives"].items()) or "none"
    print(f"{found['devices']}: {found['bytes_per_chip'] / 2**30:.2f} GiB a chip")
    print(f"{found['flops_per_chip']:.3g} FLOPs a chip and step; collectives in the program: {collectives}")
    if args.json is not None:
        write_json(args.json, [found])


if __name__ == "__main__":
    errors.run(main)

"""Serves a page on which a run can be tried: python -m vit_jax.demo --workdir runs/digits

Choose a picture, or one of the test set, and see what the model takes it for and where it looks; beside that the run's
curves and, once it was evaluated, its confusions. Needs pip install "vit_jax[demo]".
"""

import pathlib
import socket

from vit_jax import command_line, errors


def main(arguments: list[str]) -> None:
    parser = errors.ArgumentParser(prog="python -m vit_jax.demo", description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="the run's folder")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen (default: 127.0.0.1, this machine alone)")
    parser.add_argument("--port", type=int, default=8000, help="where to listen (default: 8000; 0: any that is free)")
    command_line.add_run_arguments(parser, "checkpoint", "weights", "data_dir")
    args = parser.parse_args(arguments)
    try:
        import uvicorn

        from vit_jax.training import drawings, serving
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise errors.UserError(f'the page needs {error.name}: pip install "vit_jax[demo]"') from error
    listening = listen(args.host, args.port)
    subject = drawings.Subject(args.workdir, checkpoint=args.checkpoint, weights=args.weights, data_dir=args.data_dir)
    page = serving.Page(subject)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(*page.notes, f"http://{host}:{listening.getsockname()[1]}/ (Ctrl-C ends it)", sep="\n", flush=True)
    server = uvicorn.Server(uvicorn.Config(serving.make_app(page), log_level="warning", server_header=False))
    try:
        server.run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # it has answered what it was asked before


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises UserError where that cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise errors.UserError(
            f"cannot listen on {host}, port {port}: {reason}; give another --host or --port"
        ) from error


if __name__ == "__main__":
    errors.run(main)

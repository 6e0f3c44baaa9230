"""Command line of the page; server.py and torch are imported when it runs."""

import argparse
import sys
from pathlib import Path

from kolors_core.cli import parsers as cli


def parser() -> cli.Parser:
    """Build the parser of all flags."""
    top = cli.Parser(
        "ui", usage="kolors ui [flags]",
        description="Open a page to draw, compare, look inside and find images again, on this machine alone.",
        epilog="Example: kolors ui, and open the address that it prints",
    )  # fmt: skip
    add = top.add_argument
    add("--folder", type=Path, default=Path("kolors-images"), metavar="DIR",
        help="where images are kept (default: %(default)s)")  # fmt: skip
    add("--host", default="127.0.0.1",
        help="0.0.0.0 lets other machines in, with the token (default: %(default)s)")  # fmt: skip
    add("--port", type=cli.integer, default=7860, metavar="N",
        help="0 takes a free one (default: %(default)s)")  # fmt: skip
    add("--token", metavar="TEXT",
        help="must be in the address (default: none, and for other machines a random one)")  # fmt: skip
    add("-q", "--quiet", action="store_true", help="no warnings")
    model = top.add_argument_group("model")
    cli.add_model(model)
    top.set_defaults(sampler="own", schedule=None)
    return top.list_only("--folder", "--host", "--port", "--token", "-q", "-w", "--variant", "--device",
                         "--dtype", "--offload", "--vae-tiling",
                         note="More flags of the model: kolors draw --help")  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parser().parse_args(arguments)
    from kolors_core.cli.options import run_command

    return run_command(serve, options, "stopped")


def serve(options: argparse.Namespace) -> None:
    """Load the models and serve the page until Ctrl-C. ValueError, OSError."""
    from kolors_core.ui.gallery import Gallery
    from kolors_core.ui.server import PageServer, chosen_token
    from kolors_core.ui.studio import Studio

    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be from 0 to 65535, got {options.port}")
    with PageServer(options.host, options.port, chosen_token(options.host, options.token)) as server:
        server.studio = Studio(options, Gallery(options.folder))
        print(server.address, flush=True)
        print("Ctrl-C ends it.", file=sys.stderr)
        server.serve_forever()


if __name__ == "__main__":
    raise SystemExit(main())

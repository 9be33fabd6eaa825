"""Serve a DecDEC folder (or an original model) through the OpenAI routes: chats, completions, models, health.

One sequence is decoded at a time; further requests wait in a queue. The runtime is that of generate.py.
"""

import argparse
import socket
import sys
from pathlib import Path

import uvicorn

from answering import LanguageModel
from api import build_app
from decdec.errors import UserError, run
from runtime_arguments import add_runtime_arguments, make_runtime


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a taken port is found out before the model is loaded; port 0 takes a free one."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()
    except (OSError, OverflowError, UnicodeError) as error:
        raise UserError(f"--host, --port: cannot listen on {host}:{port}: {error}") from None
    return listener


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runtime_arguments(parser)
    parser.add_argument("--name", help="what requests call the model (default: the folder's own name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="default 8000; 0 takes a free one")
    parser.add_argument("--queue", type=int, default=64, metavar="N", help="requests that may wait (default 64)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.queue < 1:
        raise UserError(f"--queue: expected a positive number, got {arguments.queue}")
    listener = bind(arguments.host, arguments.port)
    model = LanguageModel(make_runtime(arguments))
    name = arguments.name or Path(arguments.model).resolve().name
    host, port = listener.getsockname()[:2]
    print(f"serving {name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    print("end it with Ctrl-C", file=sys.stderr)
    config = uvicorn.Config(build_app(model, name, arguments.queue), log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    run(main)

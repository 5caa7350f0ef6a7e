#!/usr/bin/env python3
"""Serve Lance: an OpenAI-compatible HTTP API and a web page, on one GPU, a CPU or a Mac.

    python serve.py                                        # the small Lance of this package, http://127.0.0.1:8000
    python serve.py --model_path downloads/Lance_3B --awq_dir Lance_3B-AWQ-INT4 Lance_3B-NVFP4
    python serve.py --model_path Lance_3B-AWQ-INT4 --host 0.0.0.0 --port 8000   # with LANCE_API_KEY set

Reads   MODEL_PATH, float or packed; packed folders, each of which is a model that requests name; ViT and VAE
Writes  nothing; results are kept in memory until they are fetched or newer ones need the place
Needs   requirements-serve.txt; the memory of the models (`lance-quant plan`)
Next    docs/serving.md: curl and openai examples, limits, Docker
"""

import argparse
import os
from pathlib import Path

from lance_quant.cli import script
from lance_quant.cli.task_arguments import add_lora
from lance_quant.errors import InputError
from lance_quant.kernels.choices import KERNEL_CHOICES
from lance_quant.lance.settings import OFFLOADS

_LOCAL = ("127.0.0.1", "localhost", "::1")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    parser.add_argument("--model_path", type=Path, help="Lance folder, float or packed; default: the small Lance")
    parser.add_argument("--awq_dir", type=Path, nargs="+", default=[],
                        help="packed folders to serve instead of the float weights; the first is the default model")
    parser.add_argument("--vit_path", type=Path, help="Qwen2.5-VL-ViT folder; default: in or beside MODEL_PATH")
    parser.add_argument("--vae_path", type=Path, help="Wan2.2_VAE.pth; default: in or beside MODEL_PATH")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--api_key", help="that requests must carry; better in the environment: LANCE_API_KEY")
    parser.add_argument("--no_page", action="store_true", help="serve the API alone, without the web page")
    parser.add_argument("--waiting", type=int, default=64, help="requests that may wait in line; more get 429")
    parser.add_argument("--max_seconds", type=float, default=1800, help="that a request may run")
    parser.add_argument("--max_body_mb", type=int, default=64, help="of a request's body, in megabytes")
    parser.add_argument("--kernel", choices=KERNEL_CHOICES, default="auto", help="what computes packed linears")
    parser.add_argument("--mode", choices=["ondemand", "cached"], default="ondemand",
                        help="of packed linears: compute on the packed bytes, or unpack them once")
    parser.add_argument("--offload", choices=OFFLOADS, default="none", help="where ViT and VAE are while not in use")
    parser.add_argument("--vae_tiling", action="store_true", help="decode large frames in tiles: less memory")
    parser.add_argument("--fix_quirks", action="store_true", help="repair the official code's bugs (docs/runtime.md)")
    parser.add_argument("--compile", action="store_true", help="compile the steps that recur")
    add_lora(parser)
    script.add_device(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Check, load, listen until interrupted."""
    args = parse_args(argv)
    try:
        import fastapi  # noqa: F401 - late, as the rest takes seconds: what is missing is said first
        import uvicorn
    except ImportError as error:
        raise InputError(f"{error.name} is not installed: pip install -r requirements-serve.txt") from None
    from lance_quant.serving import loading, server

    limits = server.limits_of(args.waiting, args.max_seconds, args.max_body_mb)
    loading.require_folders(args.model_path, args.awq_dir)
    key = args.api_key or os.environ.get("LANCE_API_KEY") or None
    if key is None and args.host not in _LOCAL:
        script.log.warning("--host %s lets other machines in, and no API key is set: LANCE_API_KEY=...", args.host)
    listener = server.listen(args.host, args.port)
    loaded = loading.load(args.model_path, args.awq_dir, vit=args.vit_path, vae=args.vae_path, device=args.device,
                          dtype=args.dtype, mode=args.mode, kernel=args.kernel, compile=args.compile,
                          offload=args.offload, vae_tiling=args.vae_tiling, fix_quirks=args.fix_quirks, lora=args.lora)
    hosts = [*_LOCAL, "[::1]"] if args.host in _LOCAL else None
    with server.application(loaded, limits, key, hosts, page=not args.no_page) as app:
        server.announce(listener, loaded, not args.no_page)
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


def command() -> None:
    """What the console script and `python serve.py` start."""
    script.run(main)


if __name__ == "__main__":
    command()

"""ByteDance's own code as a witness: find a checkout, or run a task through it and compare it with this runtime.

    python -m lance_quant.official find
    python -m lance_quant.official compare --task t2i --model_path downloads/Lance_3B --example_json prompts.json

Reads   a checkout of https://github.com/bytedance/Lance, which is never edited and runs in a process of its own; for
        compare also MODEL_PATH, ViT and VAE
Writes  nothing; the result is on stdout, of compare as a table and, on the last line, as JSON
Needs   the Python that the checkout's requirements are installed for; 50 GB of host memory for Lance_3B
"""

import argparse
import json
import sys

from lance_quant.cli import script, task_arguments
from lance_quant.official import checkout, request


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = script.parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    finder = commands.add_parser("find", help="say where the official source was looked for, and found",
                                 allow_abbrev=False)
    request.add_official(finder)
    comparer = commands.add_parser("compare", help="run both on one sample file, and measure the differences",
                                   allow_abbrev=False)
    task_arguments.add_model(comparer)
    task_arguments.add_task(comparer)
    request.add_official(comparer)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Find, or compare; results on stdout."""
    args = parse_args(argv)
    if args.command == "find":
        source = checkout.find(args.official_src)
        rejected = [one for one in checkout.candidates(args.official_src) if one.rejected]
        sys.stdout.write("".join(f"{one.path} ({one.via}): {one.rejected}\n" for one in rejected))
        sys.stdout.write(f"{source.path} ({source.via})\n")
        return
    from lance_quant.inference.device import device_of  # late, as torch takes seconds to import
    from lance_quant.official.compare import compare, table

    found = compare(request.request_of(args), device_of(args.device))
    sys.stdout.write(f"{table(found)}\n{json.dumps(found)}\n")


if __name__ == "__main__":
    script.run(main)

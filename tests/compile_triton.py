"""Compile the Triton kernels for GPUs that are not there, down to machine code: `python tests/compile_triton.py`.

Prints one JSON line per kernel: GPU, dtype, format, launch, bytes of shared memory, and how many that GPU has for a
block. A process of its own, because Triton's interpreter, which the tests run in, replaces the compiler. With `--all`
every format on every GPU (minutes), else those that say most.
"""

import json
import sys
import warnings
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
# First: conftest, which test_kernels imports, turns Triton's interpreter on for kernels that are defined after it.
from lance_quant.formats.int4 import Int4  # noqa: E402, I001
from lance_quant.kernels import triton_kernels  # noqa: E402
from lance_quant.kernels.ops import parts_of  # noqa: E402
from test_kernels import CODECS, random_weight  # noqa: E402

SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # CUDA's programming guide, bytes per block
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8", torch.int8: "*i8"}
FORMATS = {name: CODECS[name] for name in ("int4-g16", "int4-g32", "int4-g64", "nvfp4", "slim")}
FORMATS |= {"int4-g128": Int4(128), "int4-g256": Int4(256)}
LAUNCHES = {"gemv": 1, "tile 5": 5, "tile 17": 17, "tile 65": 65, "unpack": 0, "int8": 1}
# Those that come nearest to what a block of these GPUs may have: 90112 bytes, where groups of 64 take 69632.
WIDEST = [("float32", "int4-g128"), ("float32", "int4-g256")]
SOME = [(89, *widest, "tile 65") for widest in WIDEST]
SOME += [(gpu, "bfloat16", name, launch) for launch in ("gemv", "tile 5")
         for gpu, name in ((80, "int4-g64"), (90, "nvfp4"), (100, "slim"), (120, "nvfp4"))]
SOME += [(90, "bfloat16", "slim", "unpack"), (90, "bfloat16", "slim", "int8")]



def launched(launch, codec, dtype):
    """The kernel that a launch starts, with its arguments."""
    found = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **options: found.append((self.kernel, args, options))

    names = ("_gemv", "_tile", "_unpack", "_int8_gemv")
    kernels = {name: getattr(triton_kernels, name) for name in names}
    for name, kernel in kernels.items():
        setattr(triton_kernels, name, Recorder(kernel))
    n_in, n_out = 2048, 256
    q, x = random_weight(codec, n_out, n_in), torch.zeros(LAUNCHES[launch], n_in, dtype=dtype)
    weight, bias = (q.packed, *parts_of(q)), torch.zeros(n_out, dtype=dtype)
    if launch == "int8":
        triton_kernels.int8_gemv(x, torch.zeros(n_out, n_in, dtype=torch.int8), bias.bfloat16())
    elif launch == "unpack":
        triton_kernels.unpack(*weight, codec.group_size, dtype)
    else:
        (triton_kernels.gemv if launch == "gemv" else triton_kernels.tile)(x, *weight, bias, codec.group_size)
    for name, kernel in kernels.items():
        setattr(triton_kernels, name, kernel)
    return found[0]


def compiled(gpu, kernel, args, options):
    """As Triton does it at a launch: numbers 1 and None are constants, addresses and numbers divisible by 16 known."""
    signature, constants, known = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = options[name] if name in options else args[index]
        if name in options or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
            if isinstance(value, torch.Tensor) or value % 16 == 0:
                known[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=known)
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32))


def main():
    warnings.simplefilter("ignore")
    cases = SOME
    if "--all" in sys.argv:
        cases = [(gpu, dtype, name, launch) for gpu in SHARED for dtype in ("float32", "bfloat16", "float16")
                 for name in FORMATS for launch in LAUNCHES]
    for gpu, dtype, name, launch in cases:
        made = compiled(gpu, *launched(launch, FORMATS[name], getattr(torch, dtype)))
        print(json.dumps({"gpu": gpu, "dtype": dtype, "format": name, "launch": launch,
                          "shared": made.metadata.shared, "of": SHARED[gpu]}), flush=True)


if __name__ == "__main__":
    main()

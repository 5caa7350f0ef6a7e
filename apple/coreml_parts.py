"""The conversion of one Core ML package: apple/stateful.py traced, its caches made states, its weights packed.

The palettes are in the weights before the conversion (apple/palette.py), so packing them is lossless: only the 16
values that are there have to be found. coremltools' own k-means would take hours on a 3B model.
"""

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import torch
from torch import Tensor, nn

from apple.decoder import DecoderConfig
from apple.palette import COLORS, ROWS
from apple.stateful import END, START, Piece, example_inputs


def convert(part: nn.Module, config: DecoderConfig, piece: Piece, context: int) -> ct.models.MLModel:
    """A package whose matrices hold palettes, from a float16 module (apple/stateful.build) whose matrices consist of
    palette values. It is traced in float16 because the converter takes 33 bytes per float32 weight to find out that it
    fits float16: 11 GB for the head."""
    with torch.no_grad():
        traced = torch.jit.trace(part, example_inputs(config, piece, past=1, new=2), check_trace=False)
    caches = [name for name in ("keys", "values") if hasattr(part, name)]
    model = ct.convert(
        traced, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
        compute_precision=ct.precision.FLOAT16, inputs=_inputs(config, piece, context),
        outputs=[ct.TensorType(name="logits" if piece == END else "hidden_out", dtype=np.float16)],
        states=[ct.StateType(wrapped_type=ct.TensorType(shape=tuple(getattr(part, name).shape), dtype=np.float16),
                             name=name) for name in caches])
    palette = cto.OpPalettizerConfig(mode="custom", lut_function=indexed, granularity="per_grouped_channel",
                                     group_size=ROWS, weight_threshold=config.head_dim * ROWS)  # every matrix, no bias
    return cto.palettize_weights(model, cto.OptimizationConfig(op_type_configs={"linear": palette, "gather": palette}))


def indexed(group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Palette float16 [16], ascending, and indices uint8 [n] of n float16 weights with at most 16 values.

    mode="unique" would sort the weights, which takes most of the time of a conversion, and goes wrong with NumPy 2.3.5
    on an AMD Zen 5: its float16 sort leaves large arrays unsorted, too many values are found, and indices take 6 bits.
    """
    bits = np.ascontiguousarray(group).reshape(-1).view(np.uint16)
    found = np.flatnonzero(np.bincount(bits, minlength=1 << 16)).astype(np.uint16).view(np.float16)
    assert len(found) <= COLORS, f"{len(found)} values in a group"
    found = found[found.astype(np.float32).argsort(kind="stable")]
    index_of = np.zeros(1 << 16, dtype=np.uint8)
    index_of[found.view(np.uint16)] = np.arange(len(found))
    return np.pad(found, (0, COLORS - len(found))), index_of[bits]


def _inputs(config: DecoderConfig, piece: Piece, context: int) -> list[ct.TensorType]:
    new, so_far = ct.RangeDim(1, context, default=1), ct.RangeDim(1, context, default=1)
    if piece == START:
        return [ct.TensorType(name="ids", shape=(1, new), dtype=np.int32)]
    shapes = {"hidden": (1, new, config.hidden_size)}
    if piece != END:
        shapes |= {"cos": (new, config.head_dim), "sin": (new, config.head_dim), "mask": (new, so_far)}
    return [ct.TensorType(name=name, shape=shape, dtype=np.float16) for name, shape in shapes.items()]


def dense_weights(model: ct.models.MLModel) -> list[Tensor]:
    """Every matrix of a package as float16, read back out of its palettes, in program order."""
    # The program behind the model: coremltools 9.0's get_weights_metadata fails on operations that take lists.
    program = cto.decompress_weights(model)._mil_program
    values = [operation.outputs[0].val for function in program.functions.values() for operation in function.operations
              if operation.op_type == "const"]
    return [torch.from_numpy(value) for value in values if isinstance(value, np.ndarray) and value.ndim == 2]


def palette_count(model: ct.models.MLModel) -> int:
    """How many weights a package stores as palettes."""
    program = model.get_spec().mlProgram
    (function,) = program.functions.values()
    (block,) = function.block_specializations.values()
    return sum(operation.type == "constexpr_lut_to_dense" for operation in block.operations)

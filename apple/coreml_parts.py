"""The conversion of one Core ML package: apple/stateful.py traced, its caches made states, its weights packed.

The palettes are in the weights before the conversion (apple/palette.py), so packing them is lossless: the converter
only has to find the 16 values that are there. coremltools' own k-means would take hours on a 3B model.
"""

from collections.abc import Mapping

import coremltools as ct
import coremltools.optimize.coreml as cto
import numpy as np
import torch
from torch import Tensor

from apple.decoder import DecoderConfig
from apple.palette import ROWS
from apple.stateful import END, START, Piece, build, example_inputs


def convert(tensors: Mapping[str, Tensor], config: DecoderConfig, piece: Piece, context: int) -> ct.models.MLModel:
    """A package whose matrices hold palettes, from float16 tensors that consist of palette values already."""
    part = build(tensors, config, piece, context)
    with torch.no_grad():
        traced = torch.jit.trace(part, example_inputs(config, piece, past=1, new=2), check_trace=False)
    caches = [name for name in ("keys", "values") if hasattr(part, name)]
    model = ct.convert(
        traced, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS18, skip_model_load=True,
        compute_precision=ct.precision.FLOAT16, inputs=_inputs(config, piece, context),
        outputs=[ct.TensorType(name="logits" if piece == END else "hidden_out", dtype=np.float16)],
        states=[ct.StateType(wrapped_type=ct.TensorType(shape=tuple(getattr(part, name).shape), dtype=np.float16),
                             name=name) for name in caches])
    del part, traced  # float32 copies of all weights
    palette = cto.OpPalettizerConfig(mode="unique", granularity="per_grouped_channel", group_size=ROWS,
                                     weight_threshold=config.head_dim * ROWS)  # every matrix, no bias
    return cto.palettize_weights(model, cto.OptimizationConfig(op_type_configs={"linear": palette, "gather": palette}))


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

"""vLLM's 4-bit weight layouts: AutoAWQ's GEMM words (INT4) and ModelOpt's NVFP4, repacked bit for bit.

    AWQ        w[i, o] = (code[i, o] - zero[i // g, o]) * scale[i // g, o]      inputs first, eight outputs in a word
    ModelOpt   w[o, i] = E2M1[code[o, i]] * E4M3[weight_scale[o, i // 16]] * weight_scale_2

Nothing is rounded anew: codes, zero points and scales are those of the packed folder. What a layout cannot hold exactly
is refused. The order of AWQ's nibbles comes from its CUDA kernel (llm-awq, arXiv:2306.00978): nibble i of a word,
counted from the lowest, belongs to output AWQ_ORDER[i] of the word's eight.

Shape suffixes: o out, i in.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lance_quant.errors import InputError
from lance_quant.formats import nvfp4
from lance_quant.formats.int4 import Int4Weight, unpack_nibbles
from lance_quant.formats.nvfp4 import Nvfp4Weight
from lance_quant.storage.tensor_file import TensorSpec

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WORD = len(AWQ_ORDER)  # codes in 32 bits
GROUP_SIZES = (128, 64, 32)  # what vLLM's Marlin kernel takes, largest first


def awq_words(code_oi: Tensor) -> Tensor:
    """uint8 [out, in] codes 0..15 -> int32 [in, out/8]."""
    n_out, n_in = code_oi.shape
    lanes = code_oi.view(n_out // WORD, WORD, n_in)
    words = torch.zeros(n_out // WORD, n_in, dtype=torch.int32)
    for nibble, output in enumerate(AWQ_ORDER):
        words |= lanes[:, output].int() << 4 * nibble
    return words.t().contiguous()


def awq_group_size(linears: Sequence[str], sizes: Sequence[int]) -> int:
    """The one group size in which linears that vLLM fuses are stored: the largest that divides all of theirs.

    A group of 128 is two groups of 64 with the same scale and zero point, so the values stay the same.

    Args:
        linears: their names, for the message.
        sizes: group sizes in the packed folder.

    Raises:
        InputError: none of vLLM's sizes divides them all.
    """
    for size in GROUP_SIZES:
        if all(own % size == 0 for own in sizes):
            return size
    raise InputError(f"group size {min(sizes)} of {linears[sizes.index(min(sizes))]}: vLLM's kernels take groups of "
                     f"{', '.join(map(str, GROUP_SIZES))} inputs; pack with one of these as --group_size")


def awq_specs(shape: Sequence[int], group_size: int) -> dict[str, TensorSpec]:
    """Suffix -> dtype and shape of a linear [out, in] in AWQ's layout.

    Raises:
        InputError: 8 does not divide `out`.
    """
    n_out, n_in = shape
    if n_out % WORD:
        raise InputError(f"a linear with {n_out} outputs has no AWQ layout: it packs {WORD} outputs in a word")
    groups = n_in // group_size
    return {"qweight": TensorSpec(torch.int32, (n_in, n_out // WORD)),
            "qzeros": TensorSpec(torch.int32, (groups, n_out // WORD)),
            "scales": TensorSpec(torch.bfloat16, (groups, n_out))}


def awq_tensors(q: Int4Weight, group_size: int) -> dict[str, Tensor]:
    """A packed INT4 weight [out, in] in AWQ's layout, by suffix; `group_size` divides its own (see awq_group_size)."""
    n_in, groups = 2 * q.packed.shape[1], q.scale.shape[1]
    repeats = n_in // groups // group_size
    scale, zero = (part.repeat_interleave(repeats, 1) for part in (q.scale, q.zero))
    return {"qweight": awq_words(unpack_nibbles(q.packed)), "qzeros": awq_words(zero), "scales": scale.t().contiguous()}


def modelopt_specs(shape: Sequence[int]) -> dict[str, TensorSpec]:
    """Suffix -> dtype and shape of a linear [out, in] in ModelOpt's NVFP4 layout."""
    n_out, n_in = shape
    return {"weight": TensorSpec(torch.uint8, (n_out, n_in // 2)),
            "weight_scale": TensorSpec(torch.float8_e4m3fn, (n_out, n_in // nvfp4.BLOCK)),
            "weight_scale_2": TensorSpec(torch.float32, ())}


def modelopt_tensors(q: Nvfp4Weight, global_scale: float, linear: str) -> dict[str, Tensor]:
    """A packed NVFP4 weight [out, in] in ModelOpt's layout, by suffix.

    Args:
        global_scale: a power of two, one for all linears that vLLM fuses (see shared_global_scale).
        linear: the weight's name, for the message.

    Raises:
        InputError: a block scale is no E4M3 number times `global_scale`, as in files of the published recipe, whose
            block scales are bfloat16.
    """
    steps = nvfp4.scale_values(q) / global_scale  # exact: a power of two
    if not torch.equal(nvfp4.round_e4m3(steps.clamp(nvfp4.MIN_E4M3, nvfp4.E4M3_MAX)), steps):
        raise InputError(f"block scales of {linear} are no E4M3 numbers times {global_scale:g}, which is all that "
                         "ModelOpt's layout holds (the published recipe's are bfloat16): pack the float checkpoint "
                         "anew with nvfp4_apply.py, whose scales are exact with and without --slim")
    return {"weight": q.packed, "weight_scale": nvfp4.encode_e4m3(steps).view(torch.float8_e4m3fn),
            "weight_scale_2": torch.tensor(global_scale, dtype=torch.float32)}


def shared_global_scale(weights: Sequence[Nvfp4Weight], known: Sequence[float | None]) -> float:
    """The one power of two for linears that vLLM fuses.

    Args:
        weights: the packed weights.
        known: the global scale that the meta gives for each; None in files of the published recipe.
    """
    if None not in known:
        return max(known)  # type: ignore[type-var,return-value]
    return nvfp4.global_scale_for(nvfp4.E2M1_MAX * max(float(nvfp4.scale_values(q).max()) for q in weights))

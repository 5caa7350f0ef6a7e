"""Calibration captures: what enters the first decoder layer while Lance runs, stored as GPTQ's calibration set.

From it every layer's inputs can be made again (layer_inputs.py).

A capture is a list of calls of the decoder (decoder_calls.py), in order. Each has its streams, rotary terms, causal
flag, and the cache rows that it reads with their lengths; keys and values are not stored, since running the calls in
order makes them again. Tokens that were decoded one by one are one causal call, which computes the same; how many
is noted.

The file is a safetensors file: `call.N.und`, `call.N.gen` [b, t, hidden] (b = 1 where all rows read the same),
`call.N.cos`, `call.N.sin` [b, 1, t, head_dim], and `capture`, a JSON text as bytes.
"""

import json
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from lance_quant.calibration.activation_stats import model_fingerprint
from lance_quant.calibration.decoder_calls import DecoderCall
from lance_quant.distributed import ALONE, Team
from lance_quant.errors import InputError
from lance_quant.formats.layout import SUFFIX
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import Lance, Streams
from lance_quant.storage.atomic import parse_json, whole_file
from lance_quant.storage.output_place import require_free
from lance_quant.storage.schema import Count, Schema, parse
from lance_quant.storage.tensor_file import Checkpoint, TensorFile, require_finite, write_tensors

log = logging.getLogger("lance_quant")

FORMAT = 2
# Most tokens in a file, counted once per cache row: 44k latent tokens are four per input of a real down_proj, which
# is where more stop to matter. 1.1 GB of float32 hidden states while they run again, float and packed together.
LIMIT = 1 << 16
_THINNEST = 64  # denoising steps are thinned to every 64th before whole samples are dropped
_SPREAD = 31  # odd: steps that are left of one sample are others than those of the next
_GOLDEN = 0x9E3779B1  # 2^32 over the golden ratio, see _is_left


@dataclass
class _Entry:
    """A recorded call.

    number: what it is thinned by.
    read: whether a later call read what it left in the cache.
    open: whether no later call has used its rows, so that one may still read it.
    """

    number: int
    call: DecoderCall
    read: bool = False
    open: bool = True

    def precedes(self, call: DecoderCall) -> None:
        """Note what a later call does with its rows."""
        ends = {row: length + self.call.length for row, length in zip(self.call.rows, self.call.lengths, strict=True)}
        shared = [(ends[row], length) for row, length in zip(call.rows, call.lengths, strict=True) if row in ends]
        self.open = self.open and not shared
        self.read = self.read or any(length >= end for end, length in shared)


class CallRecorder:
    """Collects calls through a hook on the decoder. Subsamples evenly when there are too many tokens.

    Causal calls and what later ones read from the cache are kept; calls that leave nothing there (denoising steps) are
    thinned to every second, fourth, ..., and after that whole samples are, to about as many. This depends on sample
    and place in it alone, so that processes that share the samples keep together what one process keeps.

    Args:
        limit: tokens that are kept, see LIMIT.
    """

    def __init__(self, model: Lance, limit: int = LIMIT):
        self._model, self._limit = model, limit
        self._numbers: weakref.WeakKeyDictionary[CacheRow, int] = weakref.WeakKeyDictionary()
        self._rows = self._sample = self._step = 0
        self._kept: dict[int, list[_Entry]] = {}  # by sample
        self._finished = 0  # tokens of all samples but the running one
        self._stride = self._sample_stride = 1

    def __enter__(self) -> "CallRecorder":
        self._handle = self._model.language_model.model.register_forward_pre_hook(self._observe, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def begin(self, sample: int) -> None:
        """Calls from now on are those of a sample; samples come in ascending order."""
        if sample != self._sample:
            self._drop(self._sample, running=False)
            self._finished += self._tokens_of(self._sample)
        self._sample, self._step = sample, 0

    @property
    def calls(self) -> list[DecoderCall]:
        """What is kept, in order."""
        return [call for calls in self._by_sample() for call in calls]

    def _by_sample(self) -> list[list[DecoderCall]]:
        return [[entry.call for entry in entries if self._keeps(sample, entry)]
                for sample, entries in self._kept.items()]

    def _observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("streams", "rope", "rows", "causal"), args, strict=False)) | kwargs
        cos, sin = given["rope"]
        call = DecoderCall(tuple(self._number(row) for row in given["rows"]),
                           tuple(row.length for row in given["rows"]), given["causal"],
                           {expert: _stored(x) for expert, x in given["streams"].items()}, (_stored(cos), _stored(sin)))
        call.decoded = int(call.causal and call.length == 1)
        entries = self._kept.setdefault(self._sample, [])
        if entries and call.continues(entries[-1].call):
            entries[-1].call = entries[-1].call.joined(call)
        else:
            for entry in entries:
                entry.precedes(call)
            entries.append(_Entry(_SPREAD * self._sample + self._step, call))
            self._step += 1
        self._thin()

    def _number(self, row: CacheRow) -> int:
        if row not in self._numbers:
            self._numbers[row] = self._rows
            self._rows += 1
        return self._numbers[row]

    def _keeps(self, sample: int, entry: _Entry) -> bool:
        needed = entry.read or entry.call.causal
        return _is_left(sample, self._sample_stride) and (needed or entry.number % self._stride == 0)

    def _tokens(self) -> int:
        return self._finished + self._tokens_of(self._sample)

    def _tokens_of(self, sample: int) -> int:
        return sum(entry.call.tokens for entry in self._kept.get(sample, []) if self._keeps(sample, entry))

    def _thin(self) -> None:
        while self._tokens() > self._limit and self._sample_stride <= _most_stride(self._sample):
            self._coarsen()
        self._drop(self._sample, running=True)

    def _drop(self, sample: int, running: bool) -> None:
        """Forget a sample's calls that are not kept; not those of the running one that a later call may yet read."""
        running = running and _is_left(sample, self._sample_stride)
        if sample in self._kept:
            self._kept[sample] = [entry for entry in self._kept[sample]
                                  if self._keeps(sample, entry) or (running and entry.open)]

    def _coarsen(self) -> None:
        if self._stride < _THINNEST:
            self._stride *= 2
        else:
            self._sample_stride *= 2
        self._recount()

    def _recount(self) -> None:
        """After a change of strides."""
        past = [sample for sample in self._kept if sample != self._sample]
        for sample in past:
            self._drop(sample, running=False)
        self._finished = sum(self._tokens_of(sample) for sample in past)

    def _pooled(self, team: Team) -> list[DecoderCall]:
        """What the processes of a team keep together, in the order of the samples; complete on the leader."""
        strides, sample_strides, last = zip(*team.everyone((self._stride, self._sample_stride, self._sample)),
                                            strict=True)
        self._stride, self._sample_stride = max(strides), max(sample_strides)
        self._recount()
        while sum(team.everyone(self._tokens())) > self._limit and self._sample_stride <= _most_stride(max(last)):
            self._coarsen()
        own, numbers, calls = self._by_sample(), dict[tuple[int, int], int](), list[DecoderCall]()
        for sample, part in enumerate(team.collect(own, sum(team.everyone(len(own))))):
            for call in part:
                rows = tuple(numbers.setdefault((sample, row), len(numbers)) for row in call.rows)
                calls.append(replace(call, rows=rows))
        return calls

    def save(self, path: Path, task: str, fingerprint: str, team: Team = ALONE) -> None:
        """Write the capture, whole or not at all; of a team, what all of them recorded, by its leader.

        Args:
            fingerprint: of the model, see activation_stats.model_fingerprint.

        Raises:
            InputError: the file exists, or no call was made.
        """
        calls = self._pooled(team)
        if not team.leads:
            return
        if not calls:
            raise InputError("nothing to capture: the model was never called")
        facts = {"format": FORMAT, "task": task, "model": fingerprint, "config": asdict(self._model.config),
                 "calls": [{"rows": call.rows, "lengths": call.lengths, "causal": call.causal,
                            "decoded": call.decoded} for call in calls]}
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        tensors = {"capture": text, **{f"call.{index}.{key}": x for index, call in enumerate(calls)
                                       for key, x in (*call.streams.items(), *zip(("cos", "sin"), call.rope,
                                                                                  strict=True))}}
        with whole_file(Path(path)) as partial:
            write_tensors(partial, tensors)
        log.info("captured %d calls, %d tokens: %s", len(calls), sum(call.tokens for call in calls), path)


def _stored(x: Tensor) -> Tensor:
    """A copy on the CPU; rows that are the same memory are stored once."""
    x = x.detach()
    return (x[:1] if x.stride(0) == 0 else x).cpu().clone()


def _is_left(sample: int, stride: int) -> bool:
    """Whether a sample is among the one in `stride` that are kept: an even choice with no period, since sample files
    have periods of their own, like a question of each kind in turn. A larger stride keeps fewer of the same."""
    return sample * _GOLDEN % (1 << 32) < (1 << 32) // stride


def _most_stride(last: int) -> int:
    """Beyond, the first of the samples is left alone: others up to `last` are 0.44 / last or more into the unit."""
    return 4 * (last + 1)


@contextmanager
def recording(model: Lance, path: Path | None, task: str, fingerprint: str,
              team: Team = ALONE) -> Iterator[Callable[[int], None]]:
    """Capture what runs in the block into a file; do nothing where `path` is None.

    Yields what to call with the index of each sample before it runs (CallRecorder.begin).

    Raises:
        InputError: the file exists.
    """
    if path is None:
        yield lambda sample: None
        return
    if team.leads:
        require_free(path)
    with CallRecorder(model) as recorder:
        yield recorder.begin
    recorder.save(path, task, fingerprint, team)


class _Call(Schema):
    """What a capture records of a call beside its tensors, see DecoderCall."""

    rows: Annotated[list[Count], Field(min_length=1)]
    lengths: list[Count]
    causal: bool
    decoded: Count


class _Facts(Schema):
    """What a capture records beside tensors."""

    format: Literal[2]
    model: str
    config: dict[str, Any]
    calls: Annotated[list[_Call], Field(min_length=1)]


def load(path: Path, fingerprint: str) -> tuple[LanceConfig, list[DecoderCall]]:
    """Read a capture of the model with this fingerprint.

    Raises:
        InputError: not a capture, of another format, or of another model.
    """
    file = TensorFile(path)
    try:
        if "capture" not in file.specs:
            raise InputError(f"{path} is not a capture: make one with awq_calibrate_single.py --capture")
        facts = parse(_Facts, parse_json(file.read("capture").numpy().tobytes(), f"{path}: its record"),
                      f"capture {path}", "capture again")
        if facts.model != fingerprint:
            raise InputError(f"{path} was captured from another model: fingerprint {facts.model[:12]}, this "
                             f"checkpoint has {fingerprint[:12]}; calibrate on this checkpoint")
        config = LanceConfig.of(facts.config, f"configuration in capture {path}")
        return config, [_call(file, index, entry) for index, entry in enumerate(facts.calls)]
    finally:
        file.close()


def _call(file: TensorFile, index: int, entry: "_Call") -> DecoderCall:
    rows = tuple(entry.rows)

    def read(key: str) -> Tensor:
        if f"call.{index}.{key}" not in file.specs:
            raise InputError(f"capture {file.path} lacks call.{index}.{key}: capture again")
        x = file.read(f"call.{index}.{key}", torch.float32)
        require_finite(x, f"capture {file.path}: call.{index}.{key}")
        return x.expand(len(rows), *x.shape[1:])

    streams: Streams = {expert: read(expert) for expert in SUFFIX if f"call.{index}.{expert}" in file.specs}
    return DecoderCall(rows, tuple(entry.lengths), entry.causal, streams, (read("cos"), read("sin")), entry.decoded)


def load_of(src: Path, paths: Sequence[Path]) -> tuple[LanceConfig, list[DecoderCall], list[dict[str, Any]]]:
    """Captures of a checkpoint, see `load_all`."""
    with Checkpoint(src) as source:
        return load_all(paths, model_fingerprint(source))


def load_all(paths: Sequence[Path], fingerprint: str) -> tuple[LanceConfig, list[DecoderCall], list[dict[str, Any]]]:
    """Several captures of one model as one, with distinct row numbers, and a line on each for the meta.

    Raises:
        InputError: two have the same content, or see `load`.
    """
    calls: list[DecoderCall] = []
    facts: list[dict[str, Any]] = []
    for path in paths:
        config, more = load(path, fingerprint)
        first = 1 + max((row for call in calls for row in call.rows), default=-1)
        calls += [replace(call, rows=tuple(row + first for row in call.rows)) for call in more]
        with Checkpoint(path) as file:
            fingerprint_of = file.fingerprint(file.specs)
            if any(fact["fingerprint"] == fingerprint_of for fact in facts):
                raise InputError(f"capture {path} is given twice, or is a copy of another one: its tokens would count "
                                 "double; give each once")
            facts.append({"fingerprint": fingerprint_of, "calls": len(more),
                          "tokens": sum(call.tokens for call in more)})
    return config, calls, facts

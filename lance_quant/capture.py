"""What enters the first decoder layer while Lance runs, stored, and run again layer by layer.

GPTQ needs the Gram matrix of every linear's inputs: 485 MB for one real down_proj, 35 GB for all. So the inputs of
layer 0 are stored instead (`recording`) and every layer's are made again when its turn comes (`Replay`), with the real
attention: once through the float layer and once through the layer as it is packed so far. Two layers' weights and one
linear's Gram matrix are in memory at a time.

A capture is a list of calls of the decoder, in order. Each has its streams, rotary terms, causal flag, and the cache
rows that it reads with their lengths; keys and values are not stored, since running the calls in order makes them
again. Tokens that were decoded one by one are one causal call, which computes the same.

The file is a safetensors file: `call.N.und`, `call.N.gen` [b, t, hidden] (b = 1 where all rows read the same),
`call.N.cos`, `call.N.sin` [b, 1, t, head_dim], and `capture`, a JSON text as bytes.
"""

import json
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lance_quant import gptq, layout
from lance_quant.distributed import ALONE, Team
from lance_quant.errors import InputError
from lance_quant.files import require_free, whole_file
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import Lance, Layer, Rope, Streams
from lance_quant.layout import SUFFIX, Expert
from lance_quant.ours import Weights
from lance_quant.stats import model_fingerprint
from lance_quant.tensorfile import Checkpoint, TensorFile, TensorFileWriter, TensorSpec

log = logging.getLogger("lance_quant")

FORMAT = 1
# Most tokens in a file, counted once per cache row: 44k latent tokens are four per input of a real down_proj, which
# is where more stop to matter. 1.1 GB of float32 hidden states while they are replayed, float and packed together.
LIMIT = 1 << 16
_BATCH = 4096  # tokens of calls that are replayed as one; short calls are slow one by one
_PIECE = 1024  # tokens that go through an MLP at once; the inputs of a real down_proj are 45 MB
_NORMS = {"attn_in": "input_layernorm", "mlp_in": "post_attention_layernorm", "mlp_out": "post_attention_layernorm"}
_THINNEST = 64  # denoising steps are thinned to every 64th before whole samples are dropped
_SPREAD = 31  # odd: steps that are left of one sample are others than those of the next


@dataclass
class Call:
    """One call of the decoder.

    rows: numbers of the cache rows, unique in a capture
    lengths: of each row's past when the call was made
    streams: expert -> [b, t, hidden]; b is 1 where all rows read the same
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    causal: bool
    streams: Streams
    rope: Rope

    @property
    def length(self) -> int:
        """Tokens per row."""
        return sum(x.shape[1] for x in self.streams.values())

    @property
    def tokens(self) -> int:
        """Tokens in all rows together."""
        return len(self.rows) * self.length

    def continues(self, last: "Call") -> bool:
        """Whether both are causal, on the same rows, with the tokens of one right behind those of the other."""
        return (self.causal and last.causal and self.rows == last.rows
                and all(a == b + last.length for a, b in zip(self.lengths, last.lengths, strict=True)))

    def joined(self, more: "Call") -> "Call":
        """Itself and a call that continues it, as one."""
        streams = {expert: torch.cat([x, more.streams[expert]], 1) for expert, x in self.streams.items()}
        return replace(self, streams=streams,
                       rope=tuple(torch.cat(parts, 2) for parts in zip(self.rope, more.rope, strict=True)))

    def beside(self, other: "Call") -> bool:
        """Whether both can be one call with more rows: the same shapes, and neither reads what the other leaves.

        A row may occur twice: each occurrence overwrites its place behind the same past just before it is read.
        """
        past = dict(zip(self.rows, self.lengths, strict=True))
        return (self.causal == other.causal and self.streams.keys() == other.streams.keys()
                and all(x.shape[1] == other.streams[expert].shape[1] for expert, x in self.streams.items())
                and all(past.get(row, length) == length for row, length in zip(other.rows, other.lengths, strict=True)))

    def stacked(self, other: "Call") -> "Call":
        """Both as one call with more rows."""
        return Call(self.rows + other.rows, self.lengths + other.lengths, self.causal,
                    {expert: torch.cat([x, other.streams[expert]]) for expert, x in self.streams.items()},
                    tuple(torch.cat(parts) for parts in zip(self.rope, other.rope, strict=True)))


@dataclass
class _Entry:
    """A recorded call.

    number: what it is thinned by.
    read: whether a later call read what it left in the cache.
    open: whether no later call has used its rows, so that one may still read it.
    """

    number: int
    call: Call
    read: bool = False
    open: bool = True

    def precedes(self, call: Call) -> None:
        """Note what a later call does with its rows."""
        ends = {row: length + self.call.length for row, length in zip(self.call.rows, self.call.lengths, strict=True)}
        shared = [(ends[row], length) for row, length in zip(call.rows, call.lengths, strict=True) if row in ends]
        self.open = self.open and not shared
        self.read = self.read or any(length >= end for end, length in shared)


class Recorder:
    """Collects calls through a hook on the decoder. Subsamples evenly when there are too many tokens.

    Causal calls and what later ones read from the cache are kept; calls that leave nothing there (denoising steps) are
    thinned to every second, fourth, ..., and after that whole samples are. This depends on sample and place in it
    alone, so that processes that share the samples keep together what one process keeps.

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

    def __enter__(self) -> "Recorder":
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
    def calls(self) -> list[Call]:
        """What is kept, in order."""
        return [call for calls in self._by_sample() for call in calls]

    def _by_sample(self) -> list[list[Call]]:
        return [[entry.call for entry in entries if self._keeps(sample, entry)]
                for sample, entries in self._kept.items()]

    def _observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("streams", "rope", "rows", "causal"), args, strict=False)) | kwargs
        call = Call(tuple(self._number(row) for row in given["rows"]), tuple(row.length for row in given["rows"]),
                    given["causal"], {expert: _stored(x) for expert, x in given["streams"].items()},
                    tuple(_stored(x) for x in given["rope"]))
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
        wanted = sample % self._sample_stride == 0
        return wanted and (entry.read or entry.call.causal or entry.number % self._stride == 0)

    def _tokens(self) -> int:
        return self._finished + self._tokens_of(self._sample)

    def _tokens_of(self, sample: int) -> int:
        return sum(entry.call.tokens for entry in self._kept.get(sample, []) if self._keeps(sample, entry))

    def _thin(self) -> None:
        while self._tokens() > self._limit and self._sample_stride <= self._sample + 1:
            self._coarsen()
        self._drop(self._sample, running=True)

    def _drop(self, sample: int, running: bool) -> None:
        """Forget a sample's calls that are not kept; not those of the running one that a later call may yet read."""
        running = running and sample % self._sample_stride == 0
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

    def _pooled(self, team: Team) -> list[Call]:
        """What the processes of a team keep together, in the order of the samples; complete on the leader."""
        strides, sample_strides, last = zip(*team.everyone((self._stride, self._sample_stride, self._sample)),
                                            strict=True)
        self._stride, self._sample_stride = max(strides), max(sample_strides)
        self._recount()
        while sum(team.everyone(self._tokens())) > self._limit and self._sample_stride <= max(last) + 1:
            self._coarsen()
        own, numbers, calls = self._by_sample(), {}, []
        for sample, part in enumerate(team.collect(own, sum(team.everyone(len(own))))):
            for call in part:
                rows = tuple(numbers.setdefault((sample, row), len(numbers)) for row in call.rows)
                calls.append(replace(call, rows=rows))
        return calls

    def save(self, path: Path, task: str, fingerprint: str, team: Team = ALONE) -> None:
        """Write the capture, whole or not at all; of a team, what all of them recorded, by its leader.

        Args:
            fingerprint: of the model, see stats.model_fingerprint.

        Raises:
            InputError: the file exists, or no call was made.
        """
        calls = self._pooled(team)
        if not team.leads:
            return
        if not calls:
            raise InputError("nothing to capture: the model was never called")
        facts = {"format": FORMAT, "task": task, "model": fingerprint, "config": asdict(self._model.config),
                 "calls": [{"rows": call.rows, "lengths": call.lengths, "causal": call.causal} for call in calls]}
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        tensors = {"capture": text, **{f"call.{index}.{key}": x for index, call in enumerate(calls)
                                       for key, x in (*call.streams.items(), *zip(("cos", "sin"), call.rope,
                                                                                  strict=True))}}
        _write(Path(path), tensors)
        log.info("captured %d calls, %d tokens: %s", len(calls), sum(call.tokens for call in calls), path)


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    specs = {name: TensorSpec(x.dtype, tuple(x.shape)) for name, x in tensors.items()}
    with whole_file(path) as partial, TensorFileWriter(partial, specs) as writer:
        for name, x in tensors.items():
            writer.write(name, x)


def _stored(x: Tensor) -> Tensor:
    """A copy on the CPU; rows that are the same memory are stored once."""
    x = x.detach()
    return (x[:1] if x.stride(0) == 0 else x).cpu().clone()


@contextmanager
def recording(model: Lance, path: Path | None, task: str, fingerprint: str,
              team: Team = ALONE) -> Iterator[Callable[[int], None]]:
    """Capture what runs in the block into a file; do nothing where `path` is None.

    Yields what to call with the index of each sample before it runs (Recorder.begin).

    Raises:
        InputError: the file exists.
    """
    if path is None:
        yield lambda sample: None
        return
    if team.leads:
        require_free(path)
    with Recorder(model) as recorder:
        yield recorder.begin
    recorder.save(path, task, fingerprint, team)


def load(path: Path, fingerprint: str) -> tuple[LanceConfig, list[Call]]:
    """Read a capture of the model with this fingerprint.

    Raises:
        InputError: not a capture, of another format, or of another model.
    """
    file = TensorFile(path)
    try:
        if "capture" not in file.specs:
            raise InputError(f"{path} is not a capture: make one with awq_calibrate_single.py --capture")
        facts = json.loads(file.read("capture").numpy().tobytes())
        if facts["format"] != FORMAT:
            raise InputError(f"{path} is a capture of format {facts['format']}, not {FORMAT}; capture again")
        if facts["model"] != fingerprint:
            raise InputError(f"{path} was captured from another model: fingerprint {facts['model'][:12]}, this "
                             f"checkpoint has {fingerprint[:12]}; calibrate on this checkpoint")
        config = LanceConfig(**facts["config"] | {"mrope_section": tuple(facts["config"]["mrope_section"])})
        return config, [_call(file, index, entry) for index, entry in enumerate(facts["calls"])]
    finally:
        file.close()


def _call(file: TensorFile, index: int, entry: dict[str, Any]) -> Call:
    rows = tuple(entry["rows"])

    def read(key: str) -> Tensor:
        x = file.read(f"call.{index}.{key}", torch.float32)
        return x.expand(len(rows), *x.shape[1:])

    streams: Streams = {expert: read(expert) for expert in SUFFIX if f"call.{index}.{expert}" in file.specs}
    return Call(rows, tuple(entry["lengths"]), entry["causal"], streams, (read("cos"), read("sin")))


class Replay:
    """The inputs of each layer in turn, in the float model and in the packed one: see ours.Activations.

    Args:
        config: of the model.
        calls: of one capture or several, with distinct row numbers.
        device: where layers run and Gram matrices are summed; hidden states wait on the CPU.
        facts: which captures these are.
    """

    def __init__(self, config: LanceConfig, calls: Sequence[Call], device: torch.device,
                 facts: Sequence[dict[str, Any]] = ()):
        self._config, self._device, self.facts = config, device, facts
        self._exact = self._packed = _batched(calls)
        self._attended = False  # whether the states are those between attention and MLP
        self._ends: dict[int, int] = {}
        for call in calls:
            for row, length in zip(call.rows, call.lengths, strict=True):
                self._ends[row] = max(self._ends.get(row, 0), length + call.length)
        self._found: dict[str, gptq.Moments] = {}

    @torch.no_grad()
    def moments(self, group: layout.Group, target: Weights, current: Weights) -> gptq.Moments | None:
        """See ours.Activations; places come in the order of ours.PLACES. Where attention was run, both experts are
        measured at once; elsewhere one at a time, since a Gram matrix of down_proj is as large as a layer."""
        assert group.place.startswith("mlp") or not self._attended, "the attention of this layer is behind us"
        if group.place.startswith("mlp") and not self._attended:
            self._go_on(self._past_attention, group.layer, target, current)
            self._attended = True
        if not any(group.expert in call.streams for call in self._exact):
            return None
        if group.name not in self._found:
            wanted = [other for other in layout.groups(group.layer) if other.place == group.place
                      and (group.place == "attn_out" or other.expert == group.expert)
                      and any(other.expert in call.streams for call in self._exact)]
            self._found = self._measure(wanted, target, current)
        return self._found.pop(group.name)

    def _measure(self, groups: Sequence[layout.Group], target: Weights,
                 current: Weights) -> dict[str, gptq.Moments]:
        # What is packed so far shows in the inputs only behind the first packed linear of the model.
        paired = any(a is not b for a, b in zip(self._exact, self._packed, strict=True)) \
            or any(current[name] is not target[name] for name in target)
        sums = {}
        for group in groups:
            weight = target[f"{group.linears[0]}.weight"]
            sums[group.name] = gptq.Sums(weight.shape[1], self._device, paired,
                                         weight if group.norm is None else None)
        exact, packed = self._inputs(groups, target, self._exact), self._inputs(groups, current, self._packed)
        for (name, x, stream), (_, xq, stream_q) in zip(exact, packed, strict=True):
            sums[name].add(xq, x, stream - stream_q)
        return {name: part.moments() for name, part in sums.items()}

    def _inputs(self, groups: Sequence[layout.Group], weights: Weights,
                calls: Sequence[Call]) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Group, its inputs [tokens, in] and the residual stream [tokens, hidden] beside them, piece by piece."""
        layer, place = layer_around(self._config, groups[0].layer, weights), groups[0].place
        if place == "attn_out":
            yield from self._attention_outputs(groups, layer, calls)
            return
        (group,) = groups
        norm, mlp = (getattr(layer, part + SUFFIX[group.expert]) for part in (_NORMS[place], "mlp"))
        mlp.down_proj = nn.Identity()  # what is left of the MLP gives down_proj's inputs
        for call in calls:
            if group.expert in call.streams:
                for stream in call.streams[group.expert].flatten(0, -2).split(_PIECE):
                    stream = stream.to(self._device)
                    yield group.name, norm(stream) if place.endswith("_in") else mlp(norm(stream)), stream

    def _attention_outputs(self, groups: Sequence[layout.Group], layer: Layer,
                           calls: Sequence[Call]) -> Iterator[tuple[str, Tensor, Tensor]]:
        seen: dict[str, Tensor] = {}
        for group in groups:
            def observe(_: nn.Module, args: tuple[Tensor, ...], name: str = group.name) -> None:
                seen[name] = args[0].flatten(0, -2)

            layer.get_submodule(_inside(group.linears[0], group.layer)).register_forward_pre_hook(observe)
        for call, _ in zip(calls, self._after_attention(layer, calls), strict=True):
            for group in groups:
                if group.expert in call.streams:
                    stream = call.streams[group.expert].to(self._device)
                    yield group.name, seen.pop(group.name), stream.flatten(0, -2)

    def _after_attention(self, layer: Layer, calls: Iterable[Call]) -> Iterator[Streams]:
        """Each call's streams with what attention adds to them."""
        for suffix in SUFFIX.values():
            setattr(layer, f"mlp{suffix}", _Zero())
        rows = {row: self._row(end) for row, end in self._ends.items()}
        for call in calls:
            for row, length in zip(call.rows, call.lengths, strict=True):
                rows[row].length = length
            streams = {expert: x.to(self._device) for expert, x in call.streams.items()}
            rope = tuple(x.to(self._device) for x in call.rope)
            yield layer(streams, rope, [rows[row] for row in call.rows], 0, call.causal)

    def _row(self, capacity: int) -> CacheRow:
        return CacheRow(*torch.empty(2, 1, self._config.num_key_value_heads, capacity, self._config.head_dim,
                                     device=self._device))

    @torch.no_grad()
    def advance(self, layer: int, target: Weights, current: Weights) -> None:
        """See ours.Activations."""
        if not self._attended:
            self._go_on(self._past_attention, layer, target, current)
        self._go_on(self._past_mlp, layer, target, current)
        self._attended = False

    def _go_on(self, step: Callable[[Layer, Sequence[Call]], list[Call]], index: int, target: Weights,
               current: Weights) -> None:
        """Replace the states of both models."""
        self._exact, self._packed = (step(layer_around(self._config, index, weights), calls)
                                     for weights, calls in ((target, self._exact), (current, self._packed)))

    def _past_attention(self, layer: Layer, calls: Sequence[Call]) -> list[Call]:
        return [replace(call, streams={expert: x.cpu() for expert, x in streams.items()})
                for call, streams in zip(calls, self._after_attention(layer, calls), strict=True)]

    def _past_mlp(self, layer: Layer, calls: Sequence[Call]) -> list[Call]:
        return [replace(call, streams={expert: self._fed(layer, expert, x) for expert, x in call.streams.items()})
                for call in calls]

    def _fed(self, layer: Layer, expert: Expert, streams: Tensor) -> Tensor:
        norm, mlp = (getattr(layer, part + SUFFIX[expert]) for part in (_NORMS["mlp_in"], "mlp"))
        pieces = (x.to(self._device) for x in streams.flatten(0, -2).split(_PIECE))
        return torch.cat([(x + mlp(norm(x))).cpu() for x in pieces]).view(streams.shape)

    def hidden(self) -> Iterator[tuple[Call, Call]]:
        """The calls as they stand, in the float model and in the packed one: after the last layer, its outputs."""
        return zip(self._exact, self._packed, strict=True)

    def save(self, path: Path) -> None:
        """See ours.Activations: the hidden states of both models."""
        path.unlink(missing_ok=True)  # of a layer that was not journalled
        _write(path, {f"{which}.{index}.{expert}": x for which, calls in self._states()
                      for index, call in enumerate(calls) for expert, x in call.streams.items()})

    def load(self, path: Path) -> None:
        """See ours.Activations."""
        file = TensorFile(path)
        self._exact, self._packed = (
            [replace(call, streams={expert: file.read(f"{which}.{index}.{expert}") for expert in call.streams})
             for index, call in enumerate(calls)]
            for which, calls in self._states())
        file.close()

    def _states(self) -> list[tuple[str, list[Call]]]:
        return [("exact", self._exact), ("packed", self._packed)]


class _Zero(nn.Module):
    """An MLP that adds nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _batched(calls: Iterable[Call]) -> list[Call]:
    out: list[Call] = []
    for call in calls:
        if out and out[-1].tokens + call.tokens <= _BATCH and out[-1].beside(call):
            out[-1] = out[-1].stacked(call)
        else:
            out.append(call)
    return out


def layer_around(config: LanceConfig, index: int, weights: Weights) -> Layer:
    """The runtime's layer around these tensors, without copying them."""
    with torch.device("meta"):
        layer = Layer(config)
    given = {_inside(name, index): tensor for name, tensor in weights.items()}
    layer.load_state_dict({**layer.state_dict(), **given}, assign=True)  # an expert that is not given stays on meta
    return layer.requires_grad_(False)


def _inside(name: str, index: int) -> str:
    return name.removeprefix(f"{layout.LAYERS}.{index}.")


def replay_of(src: Path, paths: Sequence[Path], device: torch.device) -> Replay:
    """The replay of some captures of a checkpoint.

    Raises:
        InputError: see `load`; also a checkpoint that is none.
    """
    with Checkpoint(src) as source:
        fingerprint = model_fingerprint(source)
    config, calls, facts = load_all(paths, fingerprint)
    return Replay(config, calls, device, facts)


def load_all(paths: Sequence[Path], fingerprint: str) -> tuple[LanceConfig, list[Call], list[dict[str, Any]]]:
    """Several captures of one model as one, with distinct row numbers, and a line on each for the meta. See `load`."""
    calls: list[Call] = []
    facts = []
    for path in paths:
        config, more = load(path, fingerprint)
        first = 1 + max((row for call in calls for row in call.rows), default=-1)
        calls += [replace(call, rows=tuple(row + first for row in call.rows)) for call in more]
        with Checkpoint(path) as file:
            facts.append({"fingerprint": file.fingerprint(file.specs), "calls": len(more),
                          "tokens": sum(call.tokens for call in more)})
    return config, calls, facts

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
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lance_quant import gptq, layout
from lance_quant.errors import InputError
from lance_quant.files import require_free, whole_file
from lance_quant.lance.cache import CacheRow
from lance_quant.lance.config import LanceConfig
from lance_quant.lance.mot import Lance, Layer, Rope, Streams
from lance_quant.layout import SUFFIX
from lance_quant.ours import Weights
from lance_quant.stats import model_fingerprint
from lance_quant.tensorfile import Checkpoint, TensorFile, TensorFileWriter, TensorSpec

log = logging.getLogger("lance_quant")

FORMAT = 1
# Most tokens in a file, counted once per cache row: 44k latent tokens are four per input of a real down_proj, which
# is where more stop to matter. 1.1 GB of float32 hidden states while they are replayed, float and packed together.
LIMIT = 1 << 16
_BATCH = 4096  # tokens of calls that are replayed as one; short calls are slow one by one
_THINNEST = 64  # denoising steps are thinned to every 64th before whole requests are dropped


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


class Recorder:
    """Collects calls through a hook on the decoder. Subsamples evenly when there are too many tokens.

    What later calls read from the cache is kept; calls that leave nothing there (denoising steps) are thinned to every
    second, fourth, ... in order, and after that whole requests are.

    Args:
        limit: tokens that are kept, see LIMIT.
    """

    def __init__(self, model: Lance, limit: int = LIMIT):
        self._model, self._limit = model, limit
        self._numbers: weakref.WeakKeyDictionary[CacheRow, int] = weakref.WeakKeyDictionary()
        self._request: dict[int, int] = {}  # row -> request
        self._kept: list[tuple[int, Call]] = []  # running number, call
        self._rows = self._calls = 0
        self._stride = self._request_stride = 1

    def __enter__(self) -> "Recorder":
        self._handle = self._model.language_model.model.register_forward_pre_hook(self._observe, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    @property
    def calls(self) -> list[Call]:
        """What is kept, in order."""
        return [call for _, call in self._kept]

    def _observe(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(("streams", "rope", "rows", "causal"), args, strict=False)) | kwargs
        call = Call(tuple(self._number(row) for row in given["rows"]), tuple(row.length for row in given["rows"]),
                    given["causal"], {expert: _stored(x) for expert, x in given["streams"].items()},
                    tuple(_stored(x) for x in given["rope"]))
        request = next((self._request[row] for row in call.rows if row in self._request), self._rows)
        self._request.update(dict.fromkeys(call.rows, request))
        if self._kept and call.continues(self._kept[-1][1]):
            self._kept[-1] = self._kept[-1][0], self._kept[-1][1].joined(call)
        else:
            self._kept.append((self._calls, call))
            self._calls += 1
        self._thin()

    def _number(self, row: CacheRow) -> int:
        if row not in self._numbers:
            self._numbers[row] = self._rows
            self._rows += 1
        return self._numbers[row]

    def _thin(self) -> None:
        while True:
            self._kept = self._worth_keeping()
            if sum(call.tokens for call in self.calls) <= self._limit or self._request_stride > self._rows:
                return
            if self._stride < _THINNEST:
                self._stride *= 2
            else:
                self._request_stride *= 2

    def _worth_keeping(self) -> list[tuple[int, Call]]:
        """Calls of the requests that are kept, and of those that leave nothing behind every stride-th."""
        if self._stride == self._request_stride == 1:
            return self._kept
        end: dict[int, int] = {}  # longest past of a row that a later call reads
        kept = []
        for number, call in reversed(self._kept):
            read = any(end.get(row, 0) >= length + call.length
                       for row, length in zip(call.rows, call.lengths, strict=True))
            last = not any(row in end for row in call.rows)  # what comes next may still read it
            end.update({row: max(length, end.get(row, 0)) for row, length in zip(call.rows, call.lengths, strict=True)})
            wanted = self._request[call.rows[0]] % self._request_stride == 0
            if wanted and (read or last or number % self._stride == 0):
                kept.append((number, call))
        return kept[::-1]

    def save(self, path: Path, task: str, fingerprint: str) -> None:
        """Write the capture, whole or not at all.

        Args:
            fingerprint: of the model, see stats.model_fingerprint.

        Raises:
            InputError: the file exists, or no call was made.
        """
        if not self._kept:
            raise InputError("nothing to capture: the model was never called")
        facts = {"format": FORMAT, "task": task, "model": fingerprint, "config": asdict(self._model.config),
                 "calls": [{"rows": call.rows, "lengths": call.lengths, "causal": call.causal} for call in self.calls]}
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        tensors = {"capture": text, **{f"call.{index}.{key}": x for index, call in enumerate(self.calls)
                                       for key, x in (*call.streams.items(), *zip(("cos", "sin"), call.rope,
                                                                                  strict=True))}}
        _write(Path(path), tensors)
        log.info("captured %d calls, %d tokens: %s", len(self._kept), sum(call.tokens for call in self.calls), path)


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
def recording(model: Lance, path: Path | None, task: str, fingerprint: str) -> Iterator[None]:
    """Capture what runs in the block into a file; do nothing where `path` is None.

    Raises:
        InputError: the file exists.
    """
    if path is None:
        yield
        return
    require_free(path)
    with Recorder(model) as recorder:
        yield
    recorder.save(path, task, fingerprint)


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
        self._ends: dict[int, int] = {}
        for call in calls:
            for row, length in zip(call.rows, call.lengths, strict=True):
                self._ends[row] = max(self._ends.get(row, 0), length + call.length)
        self._found: dict[str, gptq.Moments] = {}

    @torch.no_grad()
    def moments(self, group: layout.Group, target: Weights, current: Weights) -> gptq.Moments | None:
        """See ours.Activations. Both experts of a place are measured in one pass, except at down_proj, where one Gram
        matrix is as large as a layer."""
        wanted = [other for other in layout.groups(group.layer) if other.place == group.place
                  and (other.expert == group.expert or group.place != "mlp_out")]
        wanted = [other for other in wanted if any(other.expert in call.streams for call in self._exact)]
        if group not in wanted:
            return None
        if group.name not in self._found:
            self._found = self._measure(wanted, target, current)
        return self._found.pop(group.name)

    def _measure(self, groups: Sequence[layout.Group], target: Weights,
                 current: Weights) -> dict[str, gptq.Moments]:
        # What is packed so far shows in the inputs only behind the first packed linear of the model.
        paired = any(a is not b for a, b in zip(self._exact, self._packed, strict=True)) \
            or any(current[name] is not target[name] for name in target)
        sums = {group.name: gptq.Sums(target[f"{group.linears[0]}.weight"].shape[1], self._device, paired)
                for group in groups}
        exact, packed = self._watched(groups, target, self._exact), self._watched(groups, current, self._packed)
        for seen, seen_packed in zip(exact, packed, strict=True):
            for name, x in seen.items():
                sums[name].add(seen_packed[name], x)
        return {name: part.moments() for name, part in sums.items()}

    def _watched(self, groups: Sequence[layout.Group], weights: Weights,
                 calls: Sequence[Call]) -> Iterator[dict[str, Tensor]]:
        """Per call the inputs [tokens, in] of each group."""
        index = groups[0].layer
        layer, seen = _layer(self._config, index, weights), {}
        if groups[0].place == "attn_in":  # needs no attention
            for call in calls:
                yield {group.name: layer.get_submodule(_inside(group.norm, index))(
                    call.streams[group.expert].to(self._device)).flatten(0, -2)
                    for group in groups if group.expert in call.streams}
            return
        for group in groups:
            def observe(_: nn.Module, args: tuple[Tensor, ...], name: str = group.name) -> None:
                seen[name] = args[0].flatten(0, -2)

            layer.get_submodule(_inside(group.linears[0], index)).register_forward_pre_hook(observe)
        for _ in self._outputs(layer, calls):
            yield dict(seen)
            seen.clear()

    def _outputs(self, layer: Layer, calls: Iterable[Call]) -> Iterator[Streams]:
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
        self._exact = self._after(layer, target, self._exact)
        self._packed = self._after(layer, current, self._packed)

    def _after(self, index: int, weights: Weights, calls: Sequence[Call]) -> list[Call]:
        outputs = self._outputs(_layer(self._config, index, weights), calls)
        return [replace(call, streams={expert: x.cpu() for expert, x in streams.items()})
                for call, streams in zip(calls, outputs, strict=True)]


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


def _batched(calls: Iterable[Call]) -> list[Call]:
    out: list[Call] = []
    for call in calls:
        if out and out[-1].tokens + call.tokens <= _BATCH and out[-1].beside(call):
            out[-1] = out[-1].stacked(call)
        else:
            out.append(call)
    return out


def _layer(config: LanceConfig, index: int, weights: Weights) -> Layer:
    """The runtime's layer around these tensors, without copying them."""
    with torch.device("meta"):
        layer = Layer(config)
    layer.load_state_dict({_inside(name, index): tensor for name, tensor in weights.items()}, assign=True)
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
    calls: list[Call] = []
    facts = []
    for path in paths:
        config, more = load(path, fingerprint)
        first = 1 + max((row for call in calls for row in call.rows), default=-1)
        calls += [replace(call, rows=tuple(row + first for row in call.rows)) for call in more]
        with Checkpoint(path) as file:
            facts.append({"fingerprint": file.fingerprint(file.specs), "calls": len(more),
                          "tokens": sum(call.tokens for call in more)})
    return Replay(config, calls, device, facts)

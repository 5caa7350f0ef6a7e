"""Decoder calls: the batches of a calibration set, which can run as one, and which read what others leave in the KV
cache.

A request is a chain of calls on cache rows of its own; calls of different requests know nothing of each other.
"""

from collections.abc import Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from lance_quant.formats.layout import Expert
from lance_quant.lance.mot import Rope, Streams


@dataclass
class DecoderCall:
    """One call of the decoder.

    rows: numbers of the cache rows, unique in a capture
    lengths: of each row's past when the call was made
    streams: expert -> [b, t, hidden]; b is 1 where all rows read the same
    decoded: of a causal call, how many tokens at its end came one by one: those that the tokens of an answer are read
        off
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    causal: bool
    streams: Streams
    rope: Rope
    decoded: int = 0

    @property
    def length(self) -> int:
        """Tokens per row."""
        return sum(x.shape[1] for x in self.streams.values())

    @property
    def tokens(self) -> int:
        """Tokens in all rows together."""
        return len(self.rows) * self.length

    def continues(self, last: "DecoderCall") -> bool:
        """Whether both are causal, on the same rows, with the tokens of one right behind those of the other."""
        return (self.causal and last.causal and self.rows == last.rows
                and all(a == b + last.length for a, b in zip(self.lengths, last.lengths, strict=True)))

    def joined(self, more: "DecoderCall") -> "DecoderCall":
        """Itself and a call that continues it, as one."""
        streams = {expert: torch.cat([x, more.streams[expert]], 1) for expert, x in self.streams.items()}
        cos, sin = (torch.cat(parts, 2) for parts in zip(self.rope, more.rope, strict=True))
        return replace(self, streams=streams, decoded=self.decoded + 1 if more.length == 1 else 0, rope=(cos, sin))

    def beside(self, other: "DecoderCall") -> bool:
        """Whether both can be one call with more rows: the same shapes, and neither reads what the other leaves.

        A row may occur twice: each occurrence overwrites its place behind the same past just before it is read.
        """
        past = dict(zip(self.rows, self.lengths, strict=True))
        return (self.shape() == other.shape()
                and all(past.get(row, length) == length for row, length in zip(other.rows, other.lengths, strict=True)))

    def shape(self) -> tuple[Hashable, ...]:
        """What calls must have in common to be stacked."""
        return self.causal, self.decoded, tuple((expert, x.shape[1]) for expert, x in self.streams.items())


def batched(calls: Iterable[DecoderCall], most: int) -> list[DecoderCall]:
    """The same in fewer calls: short ones are slow one by one.

    Requests of the same shapes run side by side, and in a request, steps that read the same past.

    Args:
        most: tokens of a call, and of requests that run side by side; a single one may have more.
    """
    alike: dict[Hashable, list[list[DecoderCall]]] = {}
    for request in requests(calls):
        alike.setdefault(_shape(request), []).append(request)
    out: list[DecoderCall] = []
    for group in alike.values():
        each = max(1, most // sum(call.tokens for call in group[0]))
        for start in range(0, len(group), each):
            merged: list[DecoderCall] = []
            for call in (stacked(part) for part in zip(*group[start:start + each], strict=True)):
                if merged and merged[-1].tokens + call.tokens <= most and merged[-1].beside(call):
                    merged[-1] = stacked([merged[-1], call])
                else:
                    merged.append(call)
            out += merged
    return out


def stacked(calls: Sequence[DecoderCall]) -> DecoderCall:
    """Calls of the same shape as one with all their rows."""
    if len(calls) == 1:
        return calls[0]
    streams = {expert: torch.cat([call.streams[expert] for call in calls]) for expert in calls[0].streams}
    cos, sin = zip(*(call.rope for call in calls), strict=True)
    return DecoderCall(sum((call.rows for call in calls), ()), sum((call.lengths for call in calls), ()),
                       calls[0].causal, streams, (torch.cat(cos), torch.cat(sin)), calls[0].decoded)


def requests(calls: Iterable[DecoderCall]) -> list[list[DecoderCall]]:
    """Calls that share cache rows, directly or through others, in the order of their first calls."""
    of_row: dict[int, list[DecoderCall]] = {}
    out: list[list[DecoderCall]] = []
    for call in calls:
        known = list({id(of_row[row]): of_row[row] for row in call.rows if row in of_row}.values())
        request = known[0] if known else []
        if not known:
            out.append(request)
        for other in known[1:]:  # two rows that were read for themselves so far
            out = [part for part in out if part is not other]
            request += other
            of_row.update({row: request for row, found in of_row.items() if found is other})
        request.append(call)
        of_row.update(dict.fromkeys(call.rows, request))
    return out


def _shape(request: Sequence[DecoderCall]) -> Hashable:
    """Equal for requests that can run side by side."""
    names: dict[int, int] = {}  # rows by their first appearance
    return tuple((call.shape(), call.lengths, tuple(names.setdefault(row, len(names)) for row in call.rows))
                 for call in request)


def with_outputs(calls: Sequence[DecoderCall]) -> dict[int, Expert]:
    """Places of the calls that something comes out of, and the expert that gives it: of calls that no later one reads,
    latents, and tokens that an answer is read off."""
    out: dict[int, Expert] = {}
    read: dict[int, int] = {}  # row -> the longest past that a later call reads
    for place in reversed(range(len(calls))):
        call = calls[place]
        if not _is_read(call, read) and ("gen" in call.streams or call.decoded):
            out[place] = "gen" if "gen" in call.streams else "und"
        _note(call, read)
    return dict(sorted(out.items()))


def with_what_they_read(calls: Sequence[DecoderCall], wanted: Collection[int]) -> list[int]:
    """Places of some calls and of all that these read, in order."""
    kept: list[int] = []
    read: dict[int, int] = {}
    for place in reversed(range(len(calls))):
        if place in wanted or _is_read(calls[place], read):
            kept.append(place)
            _note(calls[place], read)
    return kept[::-1]


def thinned(calls: Sequence[DecoderCall], most: int) -> list[DecoderCall]:
    """Fewer calls, evenly chosen among those that something comes out of, with all that these read.

    Args:
        most: tokens of the calls that answers come out of and what they read, and of those of latents; a single one may
            have more.
    """
    outputs = with_outputs(calls)
    if not outputs:
        return list(calls)
    kept: set[int] = set()
    for expert in sorted(set(outputs.values())):
        places = [place for place, other in outputs.items() if other == expert]
        kept.update(_some(calls, places, most))
    return [calls[place] for place in sorted(kept)]


def _some(calls: Sequence[DecoderCall], places: Sequence[int], most: int) -> list[int]:
    """As many of some places, evenly spread, as have at most so many tokens with what they read; at least one."""
    count = len(places)
    while True:
        chosen = with_what_they_read(calls, [places[index * len(places) // count] for index in range(count)])
        tokens = sum(calls[place].tokens for place in chosen)
        if tokens <= most or count == 1:
            return chosen
        count = max(1, min(count - 1, count * most // tokens))


def _is_read(call: DecoderCall, read: dict[int, int]) -> bool:
    return any(read.get(row, 0) > length for row, length in zip(call.rows, call.lengths, strict=True))


def _note(call: DecoderCall, read: dict[int, int]) -> None:
    for row, length in zip(call.rows, call.lengths, strict=True):
        read[row] = max(length, read.get(row, 0))

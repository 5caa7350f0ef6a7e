"""Activation statistics for AWQ (arXiv:2306.00978): measured while Lance runs, saved, merged, read by the quantizers.

The file is the published one (`torch.save`, format 1: per linear `sum_abs`, `n_tokens`, `n_calls`) with what it lacks
added where old readers do not look: `sum_sq` and `max_abs` per linear, and a top-level list `runs` that says of which
model, task, seed and samples the numbers are. Sums are kept, not means, so that files add. A published file, which has
none of this, is accepted: second moments then fall back to squared means, and its content stands in for its run id.
"""

import hashlib
import io
import json
import logging
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, JsonValue
from torch import Tensor, nn

from lance_quant import __version__
from lance_quant.distributed import Team
from lance_quant.errors import InputError
from lance_quant.formats import layout
from lance_quant.storage import torch_file
from lance_quant.storage.atomic import whole_file
from lance_quant.storage.schema import Count, Positive, Schema, parse
from lance_quant.storage.tensor_file import Checkpoint

log = logging.getLogger("lance_quant")

FORMAT = 1
_ROWS = 1024  # tokens per step of an accumulation: bounds its temporaries


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """What identifies the model that statistics belong to: the language model's tensors, not the ViT's."""
    return checkpoint.fingerprint(name for name in checkpoint.specs if name.startswith(layout.LLM_PREFIX))


@dataclass(frozen=True)
class LinearStats:
    """Sums over the tokens that reached one linear.

    sum_abs: [in] sum of |x|
    sum_sq:  [in] sum of x^2, None in published files
    max_abs: [in] largest |x|, None in published files
    """

    sum_abs: Tensor
    sum_sq: Tensor | None
    max_abs: Tensor | None
    n_tokens: int
    n_calls: int

    @property
    def mean_square(self) -> Tensor:
        """[in] mean of x^2, float32; the squared mean of |x| (too small for heavy tails) where sum_sq is unknown."""
        if self.sum_sq is None:
            return (self.sum_abs.double() / self.n_tokens).square().float()
        return (self.sum_sq.double() / self.n_tokens).float()


_AGAIN = "make it again with awq_calibrate_single.py"
_ROUNDING = 1e-2  # of stored bfloat16 sums, a hundredth is twice it
_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class _Run(Schema):
    """A calibration run, as far as merging and converting go by it."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, JsonValue]  # a description: nothing but what JSON can hold
    run_id: str
    model: str | None = None
    weight: Positive = 1.0


class _Facts(Schema):
    """What a statistics file holds beside the sums."""

    task: str | None = None
    tasks: list[str] = []
    runs: list[_Run] = []
    n_linears: Count | None = None


@dataclass(frozen=True)
class ActStats:
    """Statistics of one calibration run, or of several merged ones.

    linears: module name (without ".weight") -> LinearStats, only where at least one token arrived
    tasks: one per run, as in the published files
    runs: one dict per run: run_id, task, model (fingerprint) and whatever describes it (seed, samples, versions, ...)
    n_linears: how many linears were watched, with or without tokens
    """

    linears: dict[str, LinearStats]
    tasks: list[str]
    runs: list[dict[str, Any]]
    n_linears: int

    @classmethod
    def load(cls, path: Path) -> "ActStats":
        """Read a statistics file, ours or a published one.

        Raises:
            InputError: missing, unreadable, of another format, or with NaN, negative sums or unequal widths.
        """
        data = torch_file.load(path, "statistics file", _AGAIN)
        if not isinstance(data, dict) or repr(data.get("format")) != repr(FORMAT) or not isinstance(data.get("stats"),
                                                                                                    dict):
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise InputError(f"{path} is not a statistics file of format {FORMAT} (found: {found})")
        linears = {name: _entry(name, entry, path) for name, entry in data["stats"].items()}
        beside = {key: value for key, value in data.items() if key != "stats"}
        facts = parse(_Facts, beside, f"statistics file {path}", _AGAIN)
        tasks = facts.tasks or [facts.task or Path(path).stem]
        runs = data.get("runs") or [{"run_id": _content_id(linears), "task": " + ".join(tasks)}]
        seen = {name: entry for name, entry in linears.items() if entry.n_tokens}
        return cls(seen, tasks, runs, len(linears) if facts.n_linears is None else facts.n_linears)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all. InputError if it exists."""
        tasks = {"task": self.tasks[0]} if len(self.tasks) == 1 else {}
        value = {"format": FORMAT, **tasks, "tasks": self.tasks, "n_linears": self.n_linears,
                 "stats": {name: _saved(entry) for name, entry in self.linears.items()},
                 "runs": self.runs, "tool": f"lance-quant {__version__}"}
        buffer = io.BytesIO()  # torch.save reports a full disk as a RuntimeError without its cause
        torch.save(value, buffer)
        with whole_file(Path(path)) as partial:
            partial.write_bytes(buffer.getbuffer())

    def require_model(self, fingerprint: str, widths: Mapping[str, int]) -> None:
        """Raise InputError unless the statistics can be those of a model.

        Args:
            fingerprint: of the checkpoint, see `model_fingerprint`. Runs that name another one are refused; runs that
                name none (published files) get one warning.
            widths: input width of every quantizable linear of the checkpoint.
        """
        strange = [name for name, entry in self.linears.items() if widths.get(name) != entry.sum_abs.numel()]
        if strange:
            raise InputError(f"statistics of another model: {len(strange)} linears are absent from this checkpoint or "
                             f"have another width, first {strange[:5]}")
        named = [run.get("model") for run in self.runs]
        if any(model not in (None, fingerprint) for model in named):
            raise InputError("statistics of another model: they were measured on weights with fingerprint "
                             f"{next(m for m in named if m not in (None, fingerprint))[:12]}, this checkpoint has "
                             f"{fingerprint[:12]}; calibrate on this checkpoint")
        if None in named:
            log.warning("the statistics do not say which model they were measured on; widths and names fit")


def _entry(name: str, entry: Any, path: Path) -> LinearStats:
    if not isinstance(entry, dict) or not isinstance(entry.get("sum_abs"), Tensor):
        raise InputError(f"{path}: entry {name} has no sum_abs")
    n_tokens, n_calls = (_count(entry.get(key), f"{path}: {key} of {name}") for key in ("n_tokens", "n_calls"))
    shape = entry["sum_abs"].shape
    sum_abs = _checked_sums(entry["sum_abs"], shape, f"{path}: sum_abs of {name}")
    sum_sq, max_abs = (None if entry.get(key) is None else _checked_sums(entry[key], shape, f"{path}: {key} of {name}")
                       for key in ("sum_sq", "max_abs"))
    if max_abs is not None and n_tokens and bool((max_abs.double() * n_tokens * (1 + _ROUNDING) < sum_abs).any()):
        raise InputError(f"{path}: max_abs of {name} is below the mean of the same activations; {_AGAIN}")
    return LinearStats(sum_abs, sum_sq, max_abs, n_tokens, n_calls)


def _count(value: Any, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
        raise InputError(f"{what} is {str(value)[:80]}, not a count")
    return value


def _checked_sums(value: Any, shape: torch.Size, what: str) -> Tensor:
    if not isinstance(value, Tensor) or value.dtype not in _PLAIN or value.dim() != 1 or value.shape != shape \
            or value.layout != torch.strided or value.is_meta or not len(value):
        raise InputError(f"{what} is not a float tensor of one dimension and the width of sum_abs")
    if not torch.isfinite(value).all() or (value < 0).any() or (value > torch.finfo(torch.float32).max).any():
        raise InputError(f"{what} holds NaN, Inf, a negative number or one beyond float32; calibrate again")
    return value


def _saved(entry: LinearStats) -> dict[str, Any]:
    sums = {key: getattr(entry, key) for key in ("sum_abs", "sum_sq", "max_abs")}
    return {**{key: value.float() for key, value in sums.items() if value is not None},
            "n_tokens": entry.n_tokens, "n_calls": entry.n_calls}


def _content_id(linears: Mapping[str, LinearStats]) -> str:
    digest = hashlib.sha256()
    for name, entry in sorted(linears.items()):
        digest.update(f"{name} {entry.n_tokens}\n".encode() + entry.sum_abs.float().numpy().tobytes())
    return f"content-{digest.hexdigest()[:32]}"


def merge(parts: Sequence[ActStats], weights: Sequence[float] | None = None) -> ActStats:
    """Add statistics of several runs of one model.

    Tokens count alike, so a task with more of them weighs more. A weight multiplies a part's tokens: its token count is
    rounded to whole tokens and its sums follow, so that its means stay what they are; max_abs is not weighted.

    Raises:
        InputError: nothing to merge, weights that are not positive or not one per part, a run that is listed twice,
            parts of different models (fingerprint, number of layers, width of a linear).
    """
    if not parts:
        raise InputError("nothing to merge")
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if len(weights) != len(parts) or not all(0 < weight < float("inf") for weight in weights):
        raise InputError(f"{len(parts)} statistics need as many positive weights, not {weights}")
    runs = [{**run, "weight": run.get("weight", 1.0) * weight} if weight != 1 else run
            for part, weight in zip(parts, weights, strict=True) for run in part.runs]
    _require_one_model(parts, runs)
    linears: dict[str, LinearStats] = {}
    for part, weight in zip(parts, weights, strict=True):
        for name, entry in part.linears.items():
            entry = _weighted(entry, weight)
            linears[name] = _added(name, linears[name], entry) if name in linears else entry
    _warn_of_lost_squares(parts, linears)
    return ActStats(linears, [task for part in parts for task in part.tasks], runs, len(linears))


def _warn_of_lost_squares(parts: Sequence[ActStats], merged: Mapping[str, LinearStats]) -> None:
    lost = [name for name, entry in merged.items() if entry.sum_sq is None
            and any(name in part.linears and part.linears[name].sum_sq is not None for part in parts)]
    if lost:
        log.warning("%d linears lose their second moments because one of the files has none (a published one); first: "
                    "%s", len(lost), ", ".join(lost[:5]))


def _require_one_model(parts: Sequence[ActStats], runs: Sequence[Mapping[str, Any]]) -> None:
    ids = [run["run_id"] for run in runs]
    twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
    if twice:
        raise InputError(f"a run is listed twice, its tokens would count double: {', '.join(twice)}")
    models = sorted({run["model"] for run in runs if run.get("model")})
    if len(models) > 1:
        raise InputError(f"statistics of different models: fingerprints {', '.join(model[:12] for model in models)}")
    # Experts may differ (x2t runs have no gen tokens), depth may not.
    depths = sorted({layout.num_layers(part.linears) for part in parts if part.linears})
    if len(depths) > 1:
        raise InputError(f"statistics of different models: {' and '.join(map(str, depths))} layers")


def _weighted(entry: LinearStats, weight: float) -> LinearStats:
    if weight == 1:
        return entry
    tokens = max(1, round(entry.n_tokens * weight))
    factor = tokens / entry.n_tokens
    return replace(entry, n_tokens=tokens, sum_abs=entry.sum_abs.double() * factor,
                   sum_sq=None if entry.sum_sq is None else entry.sum_sq.double() * factor)


def _added(name: str, a: LinearStats, b: LinearStats) -> LinearStats:
    widths = a.sum_abs.numel(), b.sum_abs.numel()
    if widths[0] != widths[1]:
        raise InputError(f"statistics of different models: {name} has {widths[0]} and {widths[1]} inputs")

    def both(combine: Callable[[Tensor, Tensor], Tensor], x: Tensor | None, y: Tensor | None) -> Tensor | None:
        return None if x is None or y is None else combine(x.double(), y.double())

    return LinearStats(a.sum_abs.double() + b.sum_abs.double(), both(torch.add, a.sum_sq, b.sum_sq),
                       both(torch.maximum, a.max_abs, b.max_abs), a.n_tokens + b.n_tokens, a.n_calls + b.n_calls)


def coverage(stats: ActStats, linears: Iterable[str]) -> str:
    """A table of how many of these linears have data, per expert, and a sentence for an expert that has none."""
    names = list(linears)
    lines = ["expert  linears with data  tokens per linear"]
    for expert in layout.EXPERTS:
        own = [name for name in names if layout.expert_of(name) == expert]
        tokens = [stats.linears[name].n_tokens for name in own if name in stats.linears]
        span = f"{min(tokens)} .. {max(tokens)}" if tokens else "-"
        lines.append(f"{expert:<6}  {f'{len(tokens)} of {len(own)}':<17}  {span}")
    for expert, what in zip(layout.EXPERTS, ("text and picture", "latent"), strict=True):
        if not any(layout.expert_of(name) == expert for name in stats.linears):
            lines.append(f"No {what} token was seen: the {expert} expert will be rounded without a search.")
    return "\n".join(lines)


class Collector:
    """Measures the inputs of named linears while a model runs, as a context manager.

        with Collector(model, layout.linears(n)) as collector:
            ...run the model...
        collector.stats("t2i", {"model": fingerprint, "seed": 42}).save(path)

    Sums are float64 on the linear's device (float32 on Apple GPUs, which have no float64) and cost one pass over the
    activation; linears that are handed the same tensor in turn (q/k/v, gate/up) share that pass.

    Raises:
        InputError: a name is no module of the model.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]):
        self._modules = dict(model.named_modules())
        self._names = list(names)
        missing = [name for name in self._names if name not in self._modules]
        if missing:
            raise InputError(f"{len(missing)} linears are not in the model, first {missing[:5]}")
        self._sums: dict[str, list[Tensor]] = {}
        self._tokens = dict.fromkeys(self._names, 0)
        self._calls = dict.fromkeys(self._names, 0)
        self._last: tuple[weakref.ref, int | None, list[Tensor]] | None = None
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "Collector":
        for name in self._names:
            self._handles.append(self._modules[name].register_forward_pre_hook(self._hook(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = None

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach()
            self._calls[name] += 1
            if x.numel() == 0:
                return
            self._tokens[name] += x.numel() // x.shape[-1]
            sums = self._sums_of(args[0])
            if name not in self._sums:
                self._sums[name] = [part.clone() for part in sums]
                return
            total = self._sums[name]
            total[0] += sums[0]
            total[1] += sums[1]
            total[2] = torch.maximum(total[2], sums[2])

        return observe

    def _sums_of(self, x: Tensor) -> list[Tensor]:
        version = None if x.is_inference() else x._version  # changes when x is modified in place
        if self._last is None or self._last[0]() is not x or self._last[1] != version:
            self._last = (weakref.ref(x), version, _sums(x.detach().reshape(-1, x.shape[-1])))
        return self._last[2]

    def pool(self, team: Team) -> None:
        """Add up what the processes of a team measured, on all of them; all watch the same linears."""
        widths = {name: width for part in team.everyone({name: sums[0].numel() for name, sums in self._sums.items()})
                  for name, width in part.items()}
        names = [name for name in self._names if name in widths]
        counts = torch.tensor([[self._tokens[name], self._calls[name]] for name in self._names])
        team.add(counts)
        for name, (tokens, calls) in zip(self._names, counts.tolist(), strict=True):
            self._tokens[name], self._calls[name] = tokens, calls
        for name in names:
            none = [torch.zeros(widths[name])] * 3
            added, largest = torch.stack([part.cpu().double() for part in self._sums.get(name, none)]).split([2, 1])
            team.add(added)
            team.maximum(largest)
            self._sums[name] = [*added, *largest]

    def stats(self, task: str, run: Mapping[str, Any] | None = None) -> ActStats:
        """What was measured, as one run of `task`; `run` is kept with it. Its run_id, unless it has one, follows from
        its content, so that repeating a run does not make another one; an empty description gets a random id.

        Raises:
            InputError: no linear saw a token, or an activation was NaN or Inf.
        """
        if not self._sums:
            raise InputError(f"no token reached any of the {len(self._names)} linears")
        linears = {}
        for name in (name for name in self._names if name in self._sums):
            sum_abs, sum_sq, max_abs = (part.cpu() for part in self._sums[name])
            if not all(torch.isfinite(part).all() for part in (sum_abs, sum_sq, max_abs)):
                raise InputError(f"an activation at the input of {name} is NaN or Inf")
            linears[name] = LinearStats(sum_abs, sum_sq, max_abs, self._tokens[name], self._calls[name])
        text = json.dumps({**(run or {}), "task": task}, sort_keys=True, default=str)
        run_id = hashlib.sha256(text.encode()).hexdigest()[:32] if run else uuid.uuid4().hex
        described = {"run_id": run_id, **(run or {}), "task": task}
        return ActStats(linears, [task], [described], len(self._names))


def _sums(x: Tensor) -> list[Tensor]:
    """Sum of |x|, sum of x^2 and largest |x| over the rows of [tokens, in]."""
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    total = [torch.zeros(x.shape[1], dtype=wide, device=x.device) for _ in range(3)]
    for rows in x.split(_ROWS):
        size = rows.to(wide).abs_()
        total[2] = torch.maximum(total[2], size.amax(0))
        total[0] += size.sum(0)
        total[1] += size.square_().sum(0)
    return total

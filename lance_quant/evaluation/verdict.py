"""Verdicts: a comparison in sentences, how much smaller, how close to the baseline, which variant is closer.

Which is closer is a paired bootstrap: the interval of the mean difference over the same samples. Where it holds 0, the
samples show no difference, whatever the means say.
"""

from lance_quant.evaluation.compare import EQUAL, RunEntry, Section, metrics_of, samples_of, weights_of
from lance_quant.evaluation.metrics import bootstrap
from lance_quant.lance.settings import TASKS
from lance_quant.storage.atomic import size_text

_FEW = 20  # samples below which an interval is said to be rough (metrics.bootstrap)
# Rules of thumb for PSNR in dB of 8-bit pictures; lossy codecs are used at 30 to 50.
_INVISIBLE, _SLIGHT = 40, 30
_NOUNS = {"image": "picture", "video": "clip"}


def verdict(section: Section) -> list[str]:
    """Sentences on every run, then on which is closest."""
    makes = TASKS[section["task"]].makes
    say = _answers if makes == "text" else _pictures
    sentences = [f"{run['name']}: {_smaller(section, run)} {say(run, makes)}" for run in section["runs"]]
    return [*_no_float(section), *sentences, *_closest(section), *_rough(section)]


def _no_float(section: Section) -> list[str]:
    """What stands for the float model, where that was not there."""
    name = section.get("reference")
    if name is None:
        return []
    size = size_text(section["baseline"]["model"]["bytes"])
    if not section["runs"]:
        return [f"{name} ({size}) ran alone: no float weights, no baseline and no second packed folder to compare it "
                "with. Nothing here says how close it is to the float model."]
    return [f"No float weights and no baseline: {name} ({size}), quantized itself, is the reference. \"Baseline\" "
            "means it, and no figure says how close anything is to the float model."]


def _smaller(section: Section, run: RunEntry) -> str:
    source, packed = section["baseline"]["model"]["bytes"], run["model"]["bytes"]
    times = f"{source / packed:.1f} times smaller" if packed < source else "not smaller"
    return f"{size_text(packed)} instead of {size_text(source)}, {times}."


def _answers(run: RunEntry, _: str) -> str:
    exact = sum(sample["exact"] == 1 for sample in run["samples"])
    return (f"{exact} of {_count(len(run['samples']), 'answer')} are the baseline's, letter for letter. Along the "
            f"baseline's answers both models hold the same token for the likeliest at "
            f"{_percent(run['summary']['top1'])} of the places.")


def _pictures(run: RunEntry, makes: str) -> str:
    error, interval, psnr = run["summary"]["velocity_error"], run["intervals"]["velocity_error"], run["summary"]["psnr"]
    noun, count = _NOUNS[makes], len(run["samples"])
    between = f" (95 % interval: {_percent(interval[0])} to {_percent(interval[1])})" if interval else ""
    step = f"A denoising step is off by {_percent(error)}{between}."
    if psnr == EQUAL:
        return f"{step} All {_count(count, noun)} equal the baseline's, pixel for pixel."
    equal = f"{run['equal_samples']} of {_count(count, noun)} equal the baseline's, pixel for pixel; the others are " \
        if run["equal_samples"] else f"The {noun}s are "
    return f"{step} {equal}{_seen(psnr)} (PSNR {psnr:.1f} dB)."


def _seen(psnr: float | str | None) -> str:
    assert isinstance(psnr, float)
    if psnr >= _INVISIBLE:
        return "so close that nobody sees a difference"
    if psnr >= _SLIGHT:
        return "slightly different, as one sees when flipping between them"
    return "visibly different, which need not mean worse: look at them"


def _closest(section: Section) -> list[str]:
    """How the run with the smallest error compares with each of the others."""
    metric = metrics_of(section["task"])[0]
    measured = [(mean, index) for index, run in enumerate(section["runs"])
                if isinstance(mean := run["summary"][metric.key], float)]
    if len(measured) < 2:
        return []
    best, *others = (section["runs"][index] for _, index in sorted(measured))
    closer: list[str] = []
    alike: list[str] = []
    for other in others:
        rows = zip(other["samples"], best["samples"], strict=True)
        differences = [theirs[metric.key] - ours[metric.key] for theirs, ours in rows]
        interval = bootstrap(differences, weights_of(metric, best["samples"]))
        (closer if interval and interval.low > 0 else alike).append(other["name"])
    said = []
    if closer:
        said.append(f"{best['name']} is closer to the baseline than {_listed(closer)}, by {metric.heading}.")
    if alike:
        said.append(f"Between {best['name']} and {_listed(alike)} these samples show no clear difference.")
    return said


def _rough(section: Section) -> list[str]:
    count = len(samples_of(section))
    if count >= _FEW or not section["runs"]:
        return []
    return [f"{_count(count, 'sample')} is no basis for a judgement: take more." if count == 1 else
            f"{count} samples are few: the intervals are rough, take {_FEW} or more."]


def _count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def _percent(value: float | str | None) -> str:
    return f"{100 * value:.3g} %" if isinstance(value, float) else "an unknown share"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"

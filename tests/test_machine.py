"""The report of a machine: wrong kernels are found, what fails is said, and both files have it. On tiny sizes."""

import json

import pytest
import torch
from conftest import CPU

from benchmarks import child, kernel_checks, linear_kernels, machine
from lance_quant.kernels import dispatch
from lance_quant.kernels.reference import Reference

JOB = machine.Job(CPU, torch.float32, 1, machine.SIZES["tiny"], compiled=False)


@pytest.fixture
def here(monkeypatch):
    """Sections run in this process, where they cost no imports."""
    def stream(work, *args, seconds):
        try:
            yield from work(*args)
        except ValueError as error:
            raise child.Died(f"Traceback ...\nValueError: {error}") from error

    monkeypatch.setattr(machine, "stream", stream)
    monkeypatch.setattr(machine, "in_child", lambda function, *args: function(*args))


def checked(kernel="reference", form="int4", dtype=torch.float32):
    q = kernel_checks.with_zero_row(kernel_checks.random_weight(kernel_checks.FORMATS[form], 64, 128, CPU))
    return list(kernel_checks.linear_checks(kernel, form, kernel_checks.FORMATS[form], q, dtype, CPU))


@pytest.mark.parametrize("form", kernel_checks.FORMATS)
@pytest.mark.parametrize("dtype", kernel_checks.LIMITS, ids=str)
def test_the_definition_is_right_and_not_by_a_wide_margin(form, dtype):
    """A result of one rounding is near its limit where rounding is coarse: 0.4 of it, measured."""
    found = checked(form=form, dtype=dtype)
    assert [one.rows for one in found] == list(kernel_checks.ROWS) and all(one.ok for one in found)
    if dtype != torch.float32:
        assert max(one.error for one in found) > 0.1 * kernel_checks.LIMITS[dtype]


@pytest.mark.parametrize("change, note", [
    (lambda y: y * 1.01, ""), (lambda y: y.fill_(torch.nan), "not finite"), (lambda y: y.double(), "float64"),
    (lambda y: y[:, :-1], "gave (1, 63)"), (lambda y: y.index_add(1, torch.tensor([1]), torch.ones(len(y), 1) * 1e-6),
                                            "of zero weights, is not its bias")])
def test_a_kernel_that_is_wrong_is_found(monkeypatch, change, note):
    class Wrong(Reference):
        def linear(self, *args):
            return change(super().linear(*args))

    monkeypatch.setattr(dispatch, "choose", lambda *_: Wrong())
    found = checked()
    assert not any(one.ok for one in found) and note in found[0].note
    result = {"sections": {"kernels": {"rows": [one.row() for one in found], "failed": None}}}
    assert len(machine.problems(result)) == len(found)


def test_a_kernel_that_raises_is_a_problem_and_the_next_check_goes_on(monkeypatch):
    class Raises(Reference):
        def linear(self, x, *args):
            if len(x) == 5:
                raise RuntimeError("CUDA error: an illegal memory access\nmore")
            return super().linear(x, *args)

    monkeypatch.setattr(dispatch, "choose", lambda *_: Raises())
    found = checked()
    assert [one.ok for one in found] == [True, False, True, True]
    assert found[1].note == "RuntimeError: CUDA error: an illegal memory access"


def test_a_kernel_that_is_not_for_this_machine_is_left_out_with_its_reason():
    (found,) = checked("triton")
    assert isinstance(found, kernel_checks.LeftOut) and "it runs on CUDA" in found.why


def test_attention_is_compared_on_every_path_there_is():
    found = list(kernel_checks.attention_checks(CPU, torch.float32, (4, 2), 32, 18, 30))
    assert [one.kernel for one in found if isinstance(one, kernel_checks.Check)][::2] == ["chosen by torch", "math"]
    assert all(one.ok and one.ms > 0 for one in found if isinstance(one, kernel_checks.Check))


def test_models_as_users_run_them_are_compared_with_the_reference():
    found = list(machine.steps(JOB))
    assert {(row["what"], row["format"]) for row in found} == {
        (what, form) for what in kernel_checks.OUTCOMES for form in ("float32", "int4", "nvfp4")}
    assert all(row["ok"] for row in found)


def test_both_files_have_every_section_and_what_ended_one_early(here, tmp_path, monkeypatch, capsys):
    def broken(job):
        yield {"way": "first", "seconds": 1.0}
        raise ValueError("a section of no use")

    monkeypatch.setitem(machine.SECTIONS, "linears", (broken, 0.5))
    out = tmp_path / "machine"
    machine.main(["--out", str(out), "--size", "tiny", "--device", "cpu", "--threads", "1", "--sections", "attention",
                  "linears", "decoding", "denoising", "loading", "memory"])
    result = json.loads((out / "machine.json").read_text(encoding="utf-8"))
    sections = result["sections"]
    assert list(sections) == ["attention", "linears", "decoding", "denoising", "loading", "memory"]
    assert sections["linears"]["rows"] and "a section of no use" in sections["linears"]["failed"]
    assert [row["way"] for row in sections["loading"]["rows"]] == ["awq_apply.py", "load float", "load int4"]
    assert sections["memory"]["rows"][1]["weights"] < sections["memory"]["rows"][0]["weights"]
    page = (out / "machine.html").read_text(encoding="utf-8")
    assert all(f'<h2 id="{name}">' in page for name in sections) and "a section of no use" in page
    assert result["hardware"]["device"] in page and "http" not in page
    said = capsys.readouterr().out.splitlines()
    assert "PROBLEM  linears: ValueError: a section of no use" in said and json.loads(said[-1])["problems"] == 1


def test_linears_are_reported_by_ratio(monkeypatch):
    monkeypatch.setattr(linear_kernels, "_TURNS", (2, 2))
    monkeypatch.setattr(linear_kernels, "_COLD", 1)
    (row, *_) = rows = list(machine.linears(JOB))
    assert {"bf16", "fp32", "published"} <= set(row["ours_is_faster_by"])
    result = {"sections": {"linears": {"rows": rows, "failed": None}}}
    assert len(machine.summary(result)) == 1 + len(rows)


def test_a_machine_is_given_some_time():
    with pytest.raises(machine.InputError, match="--minutes 0: there must be some time"):
        machine.parse_args(["--out", "x", "--minutes", "0"])

"""The probe finds what depends on its batch, and says that nothing does where the programs keep their promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from native_runs import ENGINES

from chipbus.kernels.numerics import NumericsReport, RowClasses, Widths, probe_classes
from chipbus.kernels.qwen3.model import ModelSpec
from chipbus.kernels.torch_kernels import KERNELS, BoundTask, Kernel

SMALL = Widths(hidden=64, inner=96, heads=4, kv_heads=2, head_dim=24, vocab=500)


@pytest.mark.slow
@pytest.mark.guarantee("K25")
@pytest.mark.parametrize("isa", ENGINES)
@pytest.mark.parametrize("weights", ["", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_probe_finds_this_machine_batch_invariant(dtype: str, weights: str, isa: str) -> None:
    before = torch.get_num_threads()
    report = probe_classes(dtype, 1, SMALL, weights=weights, isa=isa)
    assert report.problems == ()
    engine = "torch" if isa == "none" else f"native, {isa}"
    numbers = f"{dtype} with int8 weights" if weights else dtype
    head, first, *_ = str(report).splitlines()
    assert head == f"{engine}: {numbers}, 1 threads: batch-invariant"
    assert first.startswith("  linear qkv, 64 to 192: the same bits in all")
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.guarantee("K26")
def test_the_probe_names_an_operation_whose_rows_depend_on_their_number(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KERNELS["rms_norm"]

    def bind(task: BoundTask) -> Callable[[], None]:
        run, out = honest.bind(task), task.tensor(2)

        def skewed() -> None:
            run()
            if out.shape[0] > 500:
                out.mul_(1.01)

        return skewed

    monkeypatch.setitem(KERNELS, "rms_norm", Kernel(bind, returns=False))  # type: ignore[arg-type]
    report = probe_classes("float32", 1, SMALL, isa="none")
    assert len(report.problems) == 1
    assert "norm: 2 classes: 8, 16, 24, 32" in report.problems[0]
    assert report.problems[0].endswith("384, 448 | 512, 640, 768, 896, 1024")
    assert "batch and chunks show in the last bits" in str(report)


def test_a_report_says_which_cases_agree() -> None:
    kept, split = RowClasses("norm", (("8", "16"),)), RowClasses("linear", (("8",), ("16", "32")))
    report = NumericsReport(engine="native, avx2", dtype="float32", threads=2, operations=(kept, split))
    assert str(report).splitlines() == [
        "native, avx2: float32, 2 threads: batch and chunks show in the last bits",
        "  norm: the same bits in all 2 cases",
        "  linear: 2 classes: 8 | 16, 32",
    ]


def test_widths_are_those_of_the_model(checkpoint: Callable[[str], object]) -> None:
    spec = ModelSpec.from_directory(checkpoint("tied"))  # type: ignore[arg-type]
    assert Widths.of(spec) == Widths(hidden=64, inner=128, heads=4, kv_heads=2, head_dim=32, vocab=515)

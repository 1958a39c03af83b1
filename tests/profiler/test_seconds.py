"""The time model: rates fitted to measured calls, and predictions from them."""

from dataclasses import asdict

import pytest
import torch
from torch import nn

from memsave.host_bytes import TO_DEVICE, TO_HOST
from memsave.profiler.seconds import OTHER, SMALL_BYTES, TimeModel, fit, kind_rate, measure_times
from memsave.profiler.work import Work

CPU = torch.device("cpu")


@pytest.mark.parametrize("rate", [(1e-5, 0, 0), (0, 2e-10, 0), (1e-6, 0, 3e-10), (1e-6, 1e-11, 1e-10)])
def test_the_fit_finds_the_rates(rate):
    works = [Work(1, flops, size) for flops in (1e6, 1e8, 1e9) for size in (1e5, 1e7)]
    found = fit([(work, rate[0] + rate[1] * work.flops + rate[2] * work.bytes) for work in works])
    assert found == pytest.approx(rate, rel=1e-6, abs=1e-18)


def test_no_rate_is_negative():
    samples = [(Work(1, 0, 1e6), 3e-3), (Work(1, 0, 2e6), 2e-3), (Work(1, 0, 4e6), 1e-3)]
    assert min(fit(samples)) == 0
    assert max(fit(samples)) > 0


def test_small_calls_say_nothing_about_the_rate_per_byte():
    small = [(Work(1, 0, size), 1e-5) for size in (8, 80, 800)]
    assert kind_rate(small, per_byte=1e-10) == (pytest.approx(1e-5), 0.0, 1e-10)
    large = [(Work(1, 0, size), 1e-5 + 2e-10 * size) for size in (SMALL_BYTES, 100 * SMALL_BYTES)]
    assert kind_rate(small + large, per_byte=1.0) == pytest.approx((1e-5, 0.0, 2e-10), rel=1e-6)


def test_small_products_still_give_the_rate_per_flop():
    products = [(Work(1, flops, 100), 1e-5 + 1e-9 * flops) for flops in (0, 1e4, 1e6)]
    assert kind_rate(products, per_byte=1.0) == pytest.approx((1e-5, 1e-9, 0.0), rel=1e-6)


def test_of_two_calibrations_the_one_with_larger_calls_has_the_rates():
    one = TimeModel({"mm": (1.0, 0, 0), "add": (1.0, 0, 0)}, host=1.0, largest={"mm": 10, "add": 20}, calls=5)
    other = TimeModel({"mm": (2.0, 0, 0), "add": (2.0, 0, 0), "div": (2.0, 0, 0)}, 2.0,
                      largest={"mm": 20, "add": 10, "div": 1}, calls=9)  # fmt: skip
    for merged in (one.with_kinds_of(other), other.with_kinds_of(one)):
        assert {kind: rate[0] for kind, rate in merged.rates.items()} == {"mm": 2.0, "add": 1.0, "div": 2.0}
        assert (merged.host, merged.largest) == (2.0, {"mm": 20, "add": 20, "div": 1})


@pytest.mark.parametrize("host", [2.0, 50.0])
@pytest.mark.parametrize("concurrent", [False, True])
def test_copies_are_predicted_without_overlap(concurrent, host):
    model = TimeModel({OTHER: (3.0, 0, 0)}, host=host, concurrent=concurrent)
    work = {"mm float32": Work(1)}
    copies = {TO_HOST: Work(1, bytes=10), TO_DEVICE: Work(1, bytes=20)}
    with_rates = model.with_rates({TO_HOST: (0.0, 0.0, 0.5), TO_DEVICE: (1.0, 0.0, 0.25)})
    assert with_rates.seconds({**work, **copies}) == model.seconds(work) + 5 + 1 + 5


def test_seconds_add_up_on_a_cpu_and_overlap_on_a_gpu():
    work = {"mm float32": Work(10, 100, 0), "unknown float32": Work(10, 0, 50, 25)}
    model = TimeModel({"mm float32": (1.0, 0.5, 0), OTHER: (0, 0, 2.0)}, host=3.0, fresh=4.0)
    inside, outside = 10 + 50 + 100 + 100, 60
    assert model.seconds(work) == inside + outside
    on_gpu = TimeModel(model.rates, host=3.0, fresh=4.0, concurrent=True)
    assert on_gpu.seconds(work) == inside
    assert TimeModel(model.rates, host=30.0, concurrent=True).seconds(work) == 600


def test_an_operator_has_the_rates_of_its_other_dtype_if_it_has_none():
    model = TimeModel({"norm bfloat16": (1.0, 0, 0), OTHER: (3.0, 0, 0)})
    assert model.seconds({"norm float32": Work(1)}) == 1
    assert model.seconds({"mean float32": Work(1)}) == 3


def test_the_model_is_written_and_read():
    model = TimeModel({"mm float32": (1.0, 0.5, 0.0)}, 3.0, 4.0, True, {"mm float32": 9.0}, 5)
    content = asdict(model)
    content["rates"] = {kind: list(rate) for kind, rate in content["rates"].items()}
    assert TimeModel.from_dict(content) == model


def test_a_measured_model_predicts_its_own_step(monkeypatch):
    """With a clock of our own: products take a nanosecond per FLOP, everything else a microsecond."""
    now = [0.0]

    class Slow(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            is_product = func is torch.ops.aten.mm.default
            now[0] += 1e-9 * 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[1] if is_product else 1e-6
            return result

    monkeypatch.setattr("memsave.profiler.seconds.step_clock", lambda device: lambda: now[0])
    linear = nn.Linear(128, 256, bias=False)  # more than SMALL_BYTES

    def run():
        for count in (1, 10, 100):
            linear(torch.ones(count, 128)).sum().backward()

    with Slow():
        model = measure_times(run, device=CPU)
    assert model.rates["mm float32"][1] == pytest.approx(1e-9, rel=1e-3)
    assert model.host == pytest.approx(0, abs=1e-12)
    assert model.seconds({"mm float32": Work(1, 1e6, 0)}) == pytest.approx(1e-3, rel=1e-2)

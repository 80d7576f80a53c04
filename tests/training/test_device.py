"""Training on a device, held against the processor: the same numbers, and nothing computed where it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from tests import devices
from tests.architectures import OWN, Bits, make_base
from tests.devices import DEVICE, Broken, Tape, of_pretence, pretended
from tests.training.rows import CLASSIFY, examples, make_run, random_lora, random_model, random_rows
from tunesmith.decoder import loading, replays
from tunesmith.decoder.llama import Llama
from tunesmith.errors import InvalidRequest
from tunesmith.rundir import RunDir
from tunesmith.training import device, folded, host, memory, native, passes
from tunesmith.training.attention import FlashRows
from tunesmith.training.factors import TrainableLora
from tunesmith.training.folded import FoldedLlama
from tunesmith.training.frozen import PlainWeights
from tunesmith.training.gradients import Learner, Lesson
from tunesmith.training.kernels import Eager
from tunesmith.training.loop import train
from tunesmith.training.sites import SharedSite
from tunesmith.training.workers import Workers

ROUNDING = 5e-4
"""More than in `test_metamorphic`: every product is another, and what Adam makes of a gradient near 0 is its sign."""


FEW = 512
"""Tokens that a model knows: products of bf16 are slow where the processor has none."""


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def each(_: Workers, work: Callable[[Any], Any], loads: Sequence[Any], *, sharing: bool = True) -> list[Any]:
        return [work(load) for load in loads]

    monkeypatch.setattr(Workers, "each", each)  # other threads know nothing of the device
    with pretended():
        yield


def _run(folder: Path, base: Path, *, on: str, **changes: Any) -> RunDir:
    hyperparameters = replace(CLASSIFY, **changes)
    run_dir = make_run(folder, base, train=examples(11), valid=examples(5), hyperparameters=hyperparameters)
    run_dir.write_spec(replace(run_dir.read_spec(), device=on, precision="float32"))
    return run_dir


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Of a kind and so many bits. Made before there is a device: transformers has uses of its own for the name."""
    kind, bits = request.param
    return make_base(tmp_path / "base", OWN[kind], bits=bits)


@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("lora", ("llama", 32)),
        ("lora", ("qwen3", 16)),
        ("lora", ("qwen2", 4)),
        ("full", ("llama", 32)),
        ("full", ("qwen3", 4)),
    ],
    indirect=["base"],
    ids=str,
)
def test_a_run_on_a_device_is_the_same_but_for_rounding(tmp_path: Path, base: Path, pretend: None, method: str) -> None:
    changes: dict[str, Any] = {"method": method}
    if method == "full":
        changes |= {"learning_rate_multiplier": 0.001}
    here, there = (_run(tmp_path / on, base, on=on, **changes) for on in ("cpu", DEVICE))

    outcomes = [train(run_dir) for run_dir in (here, there)]

    assert outcomes[0] == outcomes[1]
    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    ours, theirs = (load_file(run_dir.adapter / name) for run_dir in (there, here))
    assert max(float((ours[key] - theirs[key]).abs().max()) for key in theirs) < ROUNDING
    rows = [[line.split(",") for line in run.results.read_text().splitlines()] for run in (here, there)]
    assert rows[0][0] == rows[1][0]
    for mine, other in zip(rows[1][1:], rows[0][1:], strict=True):
        numbers = [[float(cell) for cell in row if cell] for row in (mine, other)]
        assert numbers[0] == pytest.approx(numbers[1], abs=2e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_stopped_at_every_step_the_bytes_stay(
    tiny_base: Path, tmp_path: Path, pretend: None, precision: Literal["float32", "bfloat16"]
) -> None:
    whole, halting = (_run(tmp_path / name, tiny_base, on=DEVICE, best_epoch=True) for name in ("whole", "halting"))
    for run_dir in (whole, halting):
        run_dir.write_spec(replace(run_dir.read_spec(), precision=precision))
    train(whole)
    while train(halting, stop_asked=lambda: True) is None:
        pass
    for name in ("results.csv", "progress.jsonl", "parity.json", "adapter/adapter_model.safetensors"):
        assert (whole.path / name).read_bytes() == (halting.path / name).read_bytes(), name


def test_a_run_does_not_go_on_elsewhere(tiny_base: Path, tmp_path: Path, pretend: None) -> None:
    run_dir = _run(tmp_path / "run", tiny_base, on=DEVICE)
    train(run_dir, stop_asked=lambda: True)
    run_dir.write_spec(replace(run_dir.read_spec(), device="cpu"))
    with pytest.raises(native.KernelsChanged, match=DEVICE):
        train(run_dir)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_said(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"trained on {name}, .* it finds 0 .* TUNESMITH_TRAINER_DEVICE"):
        device.prepare(name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the device was asked for attention over rows of any lengths, and for its gradient."""
    found: Counter[str] = Counter()
    for operation, compute in devices.OF_DEVICES.items():

        def counted(*args: Any, compute: Callable[..., Any] = compute) -> Any:
            found[compute.__name__.strip("_")] += 1
            return compute(*args)

        monkeypatch.setitem(devices.OF_DEVICES, operation, counted)
    return found


@of_pretence
@pytest.mark.parametrize(
    "model",
    [random_model(bias=True), random_model(heads=3, kv_heads=3), random_model(qk_norm=True, tied=False)],
    ids=["grouped", "plain", "norms"],
)
def test_attention_over_rows_of_any_lengths_is_that_of_groups(
    pretend: None, calls: Counter[str], model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [(40, 3), (9, 1), (100, 20), (1, 1), (30, 2), (31, 1)]
    there = model.over([weight.to(DEVICE) for weight in model.parameters()])
    rows, found = random_rows(lengths), []
    for by_groups in (True, False):
        factors = TrainableLora(random_lora(model.config.layout, rank=4, alpha=8.0, seed=3).to(torch.device(DEVICE)))
        with Workers(1) as workers, monkeypatch.context() as patched:
            if by_groups:
                patched.setattr(device, "attention", lambda *_: None)
            device._attention.cache_clear()
            learner = Learner(there, factors.site_outputs, workers, beat=lambda: None, dtype=torch.bfloat16)
            calls.clear()
            (tally,) = learner.learn([Lesson(factors, rows, prompt_loss_weight=0.1, max_tokens=160)])
        found.append((tally, factors.flat_gradient.to("cpu")))
        passes = 2 * model.config.layers
        assert calls == ({} if by_groups else {"flash": passes, "flash_backward": passes})
    (one, gradient), (other, expected) = found
    assert one.loss == pytest.approx(other.loss, abs=2e-3)
    assert (gradient - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(("room", "embedding"), [(True, False), (False, True)], ids=["held", "made, embedding"])
def test_recorded_passes_are_those_that_were_recorded(
    pretend: None, monkeypatch: pytest.MonkeyPatch, room: bool, embedding: bool
) -> None:
    model = random_model(bias=True, qk_norm=True, vocabulary=FEW)
    there = model.over([weight.to(DEVICE) for weight in model.parameters()])
    monkeypatch.setattr(device, "has_room", lambda *_: room)
    steps = [[(10, 3), (9, 1), (18 + step, 7)] for step in range(2)] + [[(60, 20)]] * 2
    if not embedding:  # the first is of the frame above, the others differ in nothing but the longest row
        steps += [[(20, 6), (20, 6)], [(40, 2), (9, 1)], [(40, 2), (9, 1)]]
        monkeypatch.setattr(passes, "LEAST_FRAMED_CELLS", 16)
    tape, found = Tape(), []
    for recorder in (None, tape):
        monkeypatch.setattr(replays, "recorder_of", lambda _, recorder=recorder: recorder)
        lora = random_lora(model.config.layout, rank=4, alpha=8.0, seed=3)
        lora = lora if embedding else replace(lora, embedding=None)
        jobs = [TrainableLora(each.to(torch.device(DEVICE))) for each in (lora, lora, replace(lora, scale=3.0))]
        tallies = []
        with Workers(1) as workers:
            learner = Learner(there, jobs[0].site_outputs, workers, beat=lambda: None, dtype=torch.bfloat16)
            for index, lengths in enumerate(steps):
                rows = [random_rows(lengths, seed=3 * index + job, vocabulary=FEW) for job in range(3)]
                tallies += learner.learn(
                    [Lesson(*each, prompt_loss_weight=0.1) for each in zip(jobs, rows, strict=True)]
                )
                for job in jobs:
                    job.flat.add_(job.flat_gradient, alpha=-0.1)
        found.append((tallies, [job.flat.to("cpu") for job in jobs]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(one, other) for one, other in zip(found[0][1], found[1][1], strict=True))
    # Jobs that differ in numbers alone share recordings. The first pass of a shape is computed, the second recorded.
    shapes = 2 if embedding else 3
    assert tape.recorded == 2 * shapes
    assert tape.replayed == 3 * len(steps) - 2 * shapes


def test_a_pass_in_a_frame_is_the_same_but_for_rounding(pretend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(bias=True, vocabulary=FEW)
    there = model.over([weight.to(DEVICE) for weight in model.parameters()])
    for lengths in ([(40, 3), (9, 1)], [(1, 1)], [(63, 5)], [(64, 5), (30, 30), (1, 1), (2, 1)], [(270, 1)]):
        found = []
        for most in (2_048, 0):
            monkeypatch.setattr(folded, "MOST_FRAMED_TOKENS", most)
            factors = TrainableLora(
                random_lora(model.config.layout, rank=4, alpha=8.0, seed=3).to(torch.device(DEVICE))
            )
            with Workers(1) as workers:
                learner = Learner(there, factors.site_outputs, workers, beat=lambda: None, dtype=torch.bfloat16)
                (tally,) = learner.learn(
                    [Lesson(factors, random_rows(lengths, vocabulary=FEW), prompt_loss_weight=0.1)]
                )
            found.append((tally, factors.flat_gradient.to("cpu")))
        (one, gradient), (other, expected) = found
        assert (one.sequences, one.tokens, one.weight) == (other.sequences, other.tokens, other.weight)
        assert one.loss == pytest.approx(other.loss, abs=2e-3)
        assert (gradient - expected).norm() < 0.02 * expected.norm()


def test_a_run_of_recorded_steps_has_the_same_bytes(
    tiny_base: Path, tmp_path: Path, pretend: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = Tape()
    runs = [_run(tmp_path / name, tiny_base, on=DEVICE) for name in ("plain", "recorded", "halting", "broken")]
    for run_dir, recorder in zip(runs, (None, tape, Tape(), Broken()), strict=True):
        monkeypatch.setattr(replays, "recorder_of", lambda _, recorder=recorder: recorder)
        run_dir.write_spec(replace(run_dir.read_spec(), precision="bfloat16"))
        while train(run_dir, stop_asked=lambda run_dir=run_dir: run_dir is runs[2]) is None:
            pass
    for name in ("results.csv", "progress.jsonl", "parity.json", "adapter/adapter_model.safetensors"):
        assert len({(run_dir.path / name).read_bytes() for run_dir in runs}) == 1, name
    assert tape.replayed > 2 * tape.recorded > 0


def _wrong(*args: Any) -> Any:
    out, *rest = devices._flash(*args)
    return (out * 1.1, *rest)


def _by_chance(*args: Any) -> Any:
    out, *rest = devices._flash(*args)
    return (out + 1e-2 * torch.randn_like(out), *rest)


def _not_built(*args: Any) -> Any:
    raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device", 209)


def _missing(*args: Any) -> Any:
    raise RuntimeError("FlashAttention only supports Ampere GPUs or newer")


@of_pretence
@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        (_wrong, "other numbers than attention by groups"),
        (_by_chance, "other bits the second time"),
        (_missing, "only supports Ampere"),
        (_not_built, "no kernel image"),
    ],
)
def test_a_kernel_that_is_not_right_is_not_used(
    pretend: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kernel: Any, reason: str
) -> None:
    model = random_model()
    there = model.over([weight.to(DEVICE) for weight in model.parameters()])
    told = []
    for op in (devices._flash, kernel):
        monkeypatch.setitem(devices.OF_DEVICES, torch.ops.torch_attn._varlen_attn.default, op)
        device._attention.cache_clear()
        assert isinstance(device.attention(there, torch.bfloat16), FlashRows) == (op is devices._flash)
        told.append(device.description(there, torch.bfloat16))
    assert reason in caplog.text
    assert ["rows" in each for each in told] == [True, False]  # a run that began with one does not go on with the other
    device._attention.cache_clear()


@of_pretence
def test_where_memory_ran_out_it_is_not_settled(pretend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    there = model.over([weight.to(DEVICE) for weight in model.parameters()])

    def short(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    device._attention.cache_clear()
    with monkeypatch.context() as patched:
        patched.setitem(devices.OF_DEVICES, torch.ops.torch_attn._varlen_attn.default, short)
        with pytest.raises(torch.OutOfMemoryError):
            device.attention(there, torch.bfloat16)
    assert isinstance(device.attention(there, torch.bfloat16), FlashRows)


@pytest.mark.parametrize("room", [True, False])
def test_a_learner_holds_weights_where_there_is_room(
    pretend: None, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    model = random_model()
    there = model.over([weight.to(DEVICE) for weight in model.parameters()])
    factors = TrainableLora(random_lora(model.config.layout, rank=4, alpha=8.0, seed=3).to(torch.device(DEVICE)))
    asked: list[int] = []
    monkeypatch.setattr(device, "has_room", lambda _, n_bytes: asked.append(n_bytes) or room)
    with Workers(1) as workers:
        learner = Learner(there, factors.site_outputs, workers, beat=lambda: None, dtype=torch.bfloat16)
    assert asked == [2 * sum(weight.numel() for weight in model.parameters() if weight.dim() > 1)]
    assert isinstance(learner._by_hand, FoldedLlama)
    (site, *_) = learner._by_hand._weights.layers(single=False)[0].values()
    assert isinstance(site, SharedSite)
    assert (site.base() is site.base()) == room


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 16, 4])
def test_weights_made_for_each_product_give_the_same_to_the_bit(tmp_path: Path, bits: Bits, dtype: torch.dtype) -> None:
    model = loading.load(make_base(tmp_path / "base", OWN["qwen2"], bits=bits), lean=True)
    assert isinstance(model, Llama)
    rows, found = random_rows([(40, 3), (9, 1), (100, 20)]), []
    for held in (True, False):
        factors = TrainableLora(random_lora(model.config.layout, rank=4, alpha=8.0, seed=3))
        with Workers(1) as workers:
            learner = Learner(model, factors.site_outputs, workers, beat=lambda: None, dtype=dtype, kernels=Eager())
            weights = PlainWeights(model, factors.site_outputs, dtype, Eager(), held=held)
            learner._by_hand = FoldedLlama(model, weights, Eager())
            (tally,) = learner.learn([Lesson(factors, rows, prompt_loss_weight=0.1)])
        found.append((tally, factors.flat_gradient.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_what_is_held_of_weights_leaves_most_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setattr(device, "free_bytes", lambda at: 1000 if at == cuda else 0)
    assert [device.has_room(cuda, n_bytes) for n_bytes in (250, 251)] == [True, False]
    assert device.has_room(torch.device("cpu"), 1 << 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_are_computed_again_give_the_same_to_the_bit(dtype: torch.dtype) -> None:
    model = random_model(bias=True)
    rows = random_rows([(40, 3), (9, 1), (100, 20)])
    found = []
    asked: list[int] = []
    for free in (None, 1 << 40, 1):
        factors = TrainableLora(random_lora(model.config.layout, rank=4, alpha=8.0, seed=3))
        with Workers(1) as workers:
            learner = Learner(model, factors.site_outputs, workers, beat=lambda: None, dtype=dtype, kernels=Eager())

            def free_bytes(free: int | None = free) -> int:
                assert free is not None
                asked.append(free)
                return free

            weights = PlainWeights(model, factors.site_outputs, dtype, Eager())
            learner._by_hand = FoldedLlama(model, weights, Eager(), None if free is None else free_bytes)
            (tally,) = learner.learn([Lesson(factors, rows, prompt_loss_weight=0.1)])
        found.append((tally, factors.flat_gradient.clone()))
    assert asked == [1 << 40, 1]
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][1], found[2][1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
def test_kernels_by_the_compiler_are_those_of_torch() -> None:
    compiled, eager = device.Compiled(), Eager()
    compiled.try_out(torch.device("cpu"))
    chance = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=chance)

    for n_tokens in (5, 48):
        x_ND, added_ND, gate_up = random(n_tokens, 64), random(n_tokens, 64).bfloat16(), random(n_tokens, 96).bfloat16()
        results = []
        for way in (compiled, eager):
            x = x_ND.clone()
            normed, inverse = way.norm(x, added_ND, 1e-5, torch.bfloat16)
            grad = torch.ones_like(x)
            rounded = way.norm_backward(added_ND, normed, inverse, grad)
            product = way.swiglu(gate_up)
            back = way.swiglu_backward(gate_up, product)
            logits = x_ND.clone()
            nll, right = way.loss(logits, torch.arange(n_tokens), torch.full((n_tokens,), 0.5))
            results.append((x, normed, inverse, grad, rounded, product, back, logits, nll, right.float()))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)  # what is between is rounded to bf16


@pytest.mark.parametrize(
    ("error", "shortage", "lost"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory", 2), True, False),
        (torch.AcceleratorError("CUDA error: device-side assert triggered", 710), False, True),
        (RuntimeError("shape mismatch"), False, False),
    ],
)
def test_faults_of_a_gpu_are_told_apart(tmp_path: Path, error: Exception, shortage: bool, lost: bool) -> None:
    assert memory.is_shortage(error) == shortage
    assert memory.is_lost(error) == lost
    run_dir = RunDir(tmp_path)
    if shortage or lost:  # no outcome: the run goes on when it is started again
        with pytest.raises(SystemExit, match="memory" if shortage else "GPU"):
            host.failure(run_dir, error)
    else:
        assert host.failure(run_dir, error).status == "failed"

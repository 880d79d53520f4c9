"""The autoscaler's decisions: on single loads, and on traces of hours against a pool that is a fluid."""

import math
from dataclasses import asdict
from itertools import pairwise

import pytest
from autoscaling_traces import MORNING, burst, constant, diurnal, noisy, ramp, sawtooth, step
from hypothesis import example, given, settings
from hypothesis import strategies as st

from octavo.cluster.app import build_app
from octavo.cluster.autoscaling import SPARE, Autoscaler, Load, Sample, load_of, sample_of
from octavo.cluster.autoscaling_policy import METRICS, samples_of
from octavo.cluster.autoscaling_simulation import Machine, simulate
from octavo.cluster.config import Autoscaling, DeploymentConfig
from octavo.engine.build import build_engine
from octavo.engine.config import EngineConfig
from octavo.engine.errors import ConfigError
from octavo.engine.params import SamplingParams
from octavo.engine.types import EngineStats, Request

SETTINGS = Autoscaling(min_replicas=1, max_replicas=20)
MACHINE = Machine()  # two requests per second at most
HOUR = 3600.0


def moves(history):
    """(time, from, to) of every change of the target."""
    return [(b.at, a.target, b.target) for a, b in pairwise(history) if a.target != b.target]


def cost(history):
    """Replica seconds ÷ those of an oracle that always has just what the load needs, at once."""
    return sum(m.target for m in history) / sum(max(1, math.ceil(m.needed)) for m in history)


def first_at(history, replicas):
    return next(m.at for m in history if m.target >= replicas)


def settled(scaler, load, target, seconds, start=0.0):
    """The target after `seconds` of one and the same load."""
    for tenth in range(round(seconds * 10) + 1):
        target = scaler.decide(load, target, start + tenth / 10).replicas
    return target


# ── single decisions ──────────────────────────────────────────────────────────────────────────────────────────────────


def full(replicas, **more):
    return Load(**{"replicas": replicas, "requests": 1, "prompt_rate": 1000.0 * replicas, "full_rate": 1000.0, **more})


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (full(2), 2),
        (full(2, queued_tokens=2 * 4096), 2),
        (full(2, queued_tokens=60_000), 3),  # 2,000 tokens/s arrive, and 1,000 more would drain the queue in a minute
        (full(2, queued_tokens=60_000, growth=5000.0), 8),
        (full(2, queued_tokens=60_000, growth=-1000.0), 2),  # it will be gone in a minute as it is
        (full(2, queued_tokens=9000, growth=5000.0), 3),  # 3 hold so much within the target
        (full(2, kv_held=1.7), 3),
        (full(2, kv_held=1.5, kv_wanted=0.5, queued_tokens=2000), 3),
        (full(2, kv_held=1.0, kv_wanted=40.0, queued_tokens=4000, growth=0.0), 3),  # bounded as the queue is
        (full(2, queued_tokens=1e9, growth=1e6), 20),
        (full(2, prompt_rate=0.0, full_rate=0.0, queued_tokens=1e6), 3),
    ],
)
def test_more_at_once_and_only_after_the_delay(load, wanted):
    delay = SETTINGS.upscale_delay_s
    assert settled(Autoscaler(SETTINGS), load, 2, delay - 0.2) == 2
    assert settled(Autoscaler(SETTINGS), load, 2, delay) == wanted


def test_a_break_in_the_wish_for_more_starts_the_delay_anew():
    scaler, much, little = Autoscaler(SETTINGS), full(2, kv_held=1.9), full(2, kv_held=1.2)
    target = settled(scaler, much, 2, 9.0)
    target = settled(scaler, little, target, 1.0, start=9.1)
    assert settled(scaler, much, target, 9.0, start=10.2) == 2
    assert settled(scaler, much, 2, 1.5, start=19.3) == 3


def test_ttft_asks_for_more_and_stops_where_that_is_of_no_use():
    slow = Autoscaling(max_replicas=20, target_ttft_s=1.0)
    assert settled(Autoscaler(slow), full(4, ttft_s=1.4), 4, 10) == 6
    assert settled(Autoscaler(slow), full(4, ttft_s=9.0), 4, 10) == 8
    scaler = Autoscaler(slow)
    assert settled(scaler, full(2, ttft_s=1.2), 2, 10) == 3
    # All are there, and the first token takes as long as before: it is the prompts that are long.
    assert settled(scaler, full(3, ttft_s=1.15), 3, 200, start=20) == 3
    assert settled(scaler, full(3, ttft_s=0.9), 3, 1, start=300) == 3
    assert settled(scaler, full(3, ttft_s=1.3), 3, 20, start=310) == 4


def test_fewer_slowly_and_never_below_what_the_running_kv_needs():
    idle = Load(replicas=20, requests=1, kv_held=0.1)
    assert settled(Autoscaler(SETTINGS), idle, 20, SETTINGS.downscale_delay_s - 0.2) == 20
    assert settled(Autoscaler(SETTINGS), idle, 20, SETTINGS.downscale_delay_s) == 15
    held = Load(replicas=20, requests=1, kv_held=16.99 * SPARE * SETTINGS.target_kv_usage)
    assert settled(Autoscaler(SETTINGS), held, 20, SETTINGS.downscale_delay_s) == 17
    assert settled(Autoscaler(SETTINGS), held, 17, 10 * SETTINGS.downscale_delay_s) == 17


def test_what_once_was_too_much_for_few_is_not_left_to_few():
    scaler = Autoscaler(SETTINGS)
    target = settled(scaler, full(1, queued_tokens=9000, generation_rate=300.0), 1, 10)
    assert target == 2
    same = {"generation_rate": 300.0, "prompt_rate": 1000.0}
    assert settled(scaler, full(2, **same), 2, HOUR, start=20) == 2
    less = {name: 0.6 * rate for name, rate in same.items()}
    assert settled(scaler, full(2, **less), 2, 301, start=5000) == 1


def test_a_queue_before_anything_was_computed_is_no_measure():
    scaler = Autoscaler(SETTINGS)
    assert settled(scaler, Load(replicas=1, requests=9, queued_tokens=1e5), 1, 10) == 2
    assert settled(scaler, Load(replicas=2), 2, 301, start=20) == 1


def test_to_zero_and_back():
    settings = Autoscaling(min_replicas=0, max_replicas=4, downscale_to_zero_delay_s=60)
    idle, scaler = Load(replicas=1), Autoscaler(settings)
    assert settled(scaler, idle, 1, 59) == 1
    assert scaler.decide(Load(replicas=1, requests=0.2), 1, 59.5).replicas == 1
    assert settled(scaler, idle, 1, 59, start=59.6) == 1
    assert settled(scaler, idle, 1, 61, start=59.6) == 0
    assert settled(scaler, Load(), 0, 1000, start=130) == 0
    assert scaler.decide(Load(waiting=3), 0, 2000).replicas == 1  # at once
    assert settled(scaler, Load(), 1, 600, start=2000) == 1  # it is starting; nothing is known of the load
    assert settled(Autoscaler(SETTINGS), idle, 1, HOUR) == 1  # min_replicas


# ── hours of load ─────────────────────────────────────────────────────────────────────────────────────────────────────


@settings(max_examples=5, deadline=None, derandomize=True)
@example(rate=3.0, prompt=193.0, output=115.0, start_s=1.0, pool=20_000.0)  # its KV pool is full, not its queue
@given(
    rate=st.floats(0.0, 30.0),
    prompt=st.floats(50, 4000),
    output=st.floats(20, 1000),
    start_s=st.floats(1, 120),
    pool=st.floats(20_000, 500_000),
)
def test_a_constant_load_is_left_alone_for_good(rate, prompt, output, start_s, pool):
    machine = Machine(prompt_tokens=prompt, generation_tokens=output, start_s=start_s, pool_tokens=pool)
    history = simulate(SETTINGS, constant(rate), 2 * HOUR, machine)
    assert all(at < HOUR for at, _, _ in moves(history)), moves(history)
    if history[-1].target < SETTINGS.max_replicas:
        assert history[-1].wait_s * machine.capacity_s * prompt <= SETTINGS.target_queued_tokens + prompt


@settings(max_examples=3, deadline=None, derandomize=True)
@given(rate=st.floats(0.5, 20.0), every_s=st.sampled_from([1.0, 20.0, 120.0]), seed=st.integers(0, 999))
def test_noise_around_a_level_does_not_make_it_flap(rate, every_s, seed):
    history = simulate(SETTINGS, noisy(rate, 0.2, every_s, seed), 4 * HOUR)
    late = [(before, after) for at, before, after in moves(history) if at > HOUR]
    ups = sum(after > before for before, after in late)
    downs = len(late) - ups
    assert min(ups, downs) == 0, moves(history)
    assert len(late) <= 2, moves(history)


def test_step():
    history = simulate(SETTINGS, step(1, 8, at=600), HOUR)
    assert first_at(history, 4) <= 640  # what 8 requests/s need, half a minute after they began
    assert moves(history)[0][2] >= 4  # in one go
    assert max(m.target for m in history) <= 8
    assert all(m.wait_s < 5 for m in history if m.at > 600 + 240)
    down = simulate(SETTINGS, step(8, 1, at=1200), 2 * HOUR)
    assert down[-1].target == 1
    assert all(before - after == 1 for at, before, after in moves(down) if at > 1200)


def test_ramp():
    history = simulate(SETTINGS, ramp(16, HOUR), HOUR)
    assert cost(history) < 1.2
    assert max(m.wait_s for m in history) < 30
    assert len(moves(history)) <= 12


def test_burst():
    history = simulate(SETTINGS, burst(1, 20, at=600, duration=30), 2 * HOUR)
    ups = [move for move in moves(history) if move[2] > move[1]]
    assert len(ups) <= 2
    assert first_at(history, 2) < 630
    assert all(m.wait_s < 1 for m in history if m.at > 780)
    assert history[-1].target == 1


def test_diurnal():
    history = simulate(SETTINGS, diurnal(0.5, 9.5, period=12 * HOUR), 24 * HOUR, step_s=2.0)
    assert cost(history) < 1.15
    assert max(m.wait_s for m in history) < 10
    assert len(moves(history)) <= 20  # four up and four down a period


def test_sawtooth():
    history = simulate(SETTINGS, sawtooth(1, 9, period=1200), 4 * HOUR)
    assert cost(history) < 1.5
    assert len(moves(history)) / 12 <= 4  # per tooth
    # Only the first teeth hurt: then it is remembered how much was too much.
    assert sum(m.wait_s for m in history if m.at > HOUR) / (3 * HOUR) < 2


def test_a_morning_from_zero_to_zero():
    settings = Autoscaling(min_replicas=0, initial_replicas=0, max_replicas=8, downscale_to_zero_delay_s=300)
    history = simulate(settings, MORNING, 3 * HOUR)
    assert first_at(history, 1) <= 1  # the first request brings the model here
    assert first_at(history, 3) <= 20 * 60 + 60  # the newsletter
    assert history[-1].target == 0
    assert max(m.target for m in history) <= 7
    assert cost([m for m in history if m.needed]) < 1.8


# ── what it is told ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_load_is_what_the_samples_say():
    a = [Sample(at, 2, 100 * at, 0.5, 0.1, 1000 + 50 * at, 10 * at, at, 0.2 * at) for at in range(10, 21)]
    b = [Sample(at, 4, 0.0, 0.3, 0.0, 30 * at, 5 * at, 3 * at, 0.6 * at) for at in range(10, 21)]
    load = load_of([a, b, []], waiting=3)
    assert (load.replicas, load.requests, load.waiting) == (2, 6, 3)
    assert load.queued_tokens == pytest.approx(1500)
    assert load.growth == pytest.approx(100)
    assert (load.kv_held, load.kv_wanted) == (pytest.approx(0.8), pytest.approx(0.1))
    assert (load.prompt_rate, load.generation_rate) == (pytest.approx(80), pytest.approx(15))
    assert load.full_rate == pytest.approx(50)  # the other one has no queue
    assert load.ttft_s == pytest.approx(0.2)
    assert load_of([]) == Load()
    assert load_of([[Sample(1.0)]]).is_idle


def test_a_sample_is_what_the_engine_says():
    stats = EngineStats(
        num_running=2, num_waiting=3, waiting_tokens=300, prefill_tokens=20, kv_blocks_total=100, kv_blocks_held=40,
        prompt_tokens=1000, prefix_hits=400, generation_tokens=50, first_tokens=4, first_token_s=2.0,
    )  # fmt: skip
    sample = sample_of(stats, block_size=16, at=7.0)
    assert sample == Sample(7.0, 5, 320, 0.4, 0.2, 600, 50, 4, 2.0)


def test_serves_series_become_samples():
    class Point:
        def __init__(self, timestamp, value):
            self.timestamp, self.value = timestamp, value

    wanted = [Sample(float(at), *(at + number for number in range(len(METRICS)))) for at in (1, 2)]
    raw = {name: {"a": [Point(s.at, getattr(s, name)) for s in wanted], "b": []} for name in METRICS}
    assert samples_of(raw) == [wanted, []]
    assert samples_of({}) == []
    assert set(METRICS) == asdict(wanted[0]).keys() - {"at"}


def test_an_engine_measures_its_first_tokens():
    core = build_engine(EngineConfig(model="fake:step_ms=5", max_num_seqs=1)).core
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True)
    for name in "ab":
        core.add(Request(name, (1, 2, 3), params))
    while core.has_work:
        core.step()
    stats = core.stats()
    assert stats.first_tokens == 2
    assert stats.first_token_s >= 0.005 * (1 + 4)  # b waits for a's three steps
    core.add(Request("c", (1, 2, 3), params))
    core.abort("c")
    assert core.stats().first_tokens == 2


@pytest.mark.parametrize("name", ["fake:", "fake:step_ms=0.5,token_us=2,kv_position_ns=1", "fake"])
def test_a_fake_may_be_slow(name):
    config = EngineConfig(model=name)
    assert config.is_fake
    build_engine(config).core.close()


@pytest.mark.parametrize("name", ["fake:step=1", "fake:step_ms=slow", "fake:step_ms"])
def test_a_fake_with_unknown_costs_is_refused(name):
    with pytest.raises(ConfigError, match="is no cost of a fake model"):
        build_engine(EngineConfig(model=name))


def test_serve_is_told_to_leave_it_to_the_policy():
    config = DeploymentConfig.from_mapping({"model": "fake", "autoscaling": {"min_replicas": 0, "max_replicas": 3}})
    app = build_app(config)
    (pool,) = app._bound_deployment.init_args[1]
    told = pool._bound_deployment._deployment_config.autoscaling_config
    assert (told.min_replicas, told.initial_replicas, told.max_replicas) == (0, 1, 3)
    assert (told.upscale_delay_s, told.downscale_delay_s, told.downscale_to_zero_delay_s) == (0, 0, 0)
    assert told.policy.policy_kwargs["downscale_delay_s"] == 300
    policy = told.policy.get_policy()(**told.policy.policy_kwargs)
    assert callable(policy)

"""What routing costs, and what it brings.

    python benchmarks/routing.py

Cost: the time of one decision at many replicas with a full index, for prompts that are cached (whole on some replicas,
partly on others) and prompts nobody knows. Hashing of the prompt's blocks is shown apart.

Gain: the policies on simulated pools (octavo.cluster.routing.simulation: real schedulers, virtual clock, made-up step
times): hit rate = prompt tokens found cached ÷ prompt tokens; TTFT from arrival to the first token, in virtual time.
Several seeds of each workload; the same for every policy.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from metrics import percentile
from report import console, save, show, table

from octavo.cluster.routing.fleet import Fleet, Placing
from octavo.cluster.routing.policies import POLICIES, make_policy
from octavo.cluster.routing.simulation import Served, Simulation, Workload
from octavo.cluster.routing.workloads import Conversations, Strangers, SystemPrompts
from octavo.engine.core.blocks import BlockChanges
from octavo.engine.core.prefix import NAME_BYTES, Chain
from octavo.engine.types import EngineStats

BLOCK_SIZE = 16
GOAL_US = 100.0
GOAL_LOSS = 0.05  # prefix against least_loaded where nothing is shared

WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "conversations": lambda seed: Conversations(160, 2.0, seed=seed),
    "system prompts": lambda seed: SystemPrompts(800, 40.0, seed=seed),
    "system prompts, in bursts": lambda seed: SystemPrompts(800, 40.0, burst=16, seed=seed),
    "strangers": lambda seed: Strangers(800, 36.0, seed=seed),
    "strangers, in bursts": lambda seed: Strangers(800, 30.0, burst=24, seed=seed),
    "strangers, very skewed": lambda seed: Strangers(800, 24.0, spread=1.6, seed=seed),
}


@dataclass(frozen=True, slots=True)
class Decision:
    """Times in µs, percentiles over prompts. after: what is remembered after the decision."""

    prompt: str
    num_tokens: int
    hash_p50_us: float
    decision_p10_us: float
    decision_p50_us: float
    decision_p99_us: float
    after_p50_us: float


def full_fleet(replicas: int, blocks: int) -> tuple[Fleet, list[str]]:
    """A fleet whose index holds `blocks` names, and that has heard of everybody."""
    fleet = Fleet(make_policy("prefix"), blocks)
    names = [f"{index:032x}" for index in range(replicas)]
    fleet.set_replicas({name: index % 4 == 0 for index, name in enumerate(names)})
    rng = random.Random(0)
    for name in names:
        noise = os.urandom(NAME_BYTES * (blocks // replicas))
        some = tuple(noise[at : at + NAME_BYTES] for at in range(0, len(noise), NAME_BYTES))
        fleet.change(name, BlockChanges(stored=some))
        stats = EngineStats(num_running=rng.randrange(60), num_waiting=2, waiting_tokens=rng.randrange(4000))
        fleet.observe(name, stats, 0.0)
    return fleet, names


def decisions(fleet: Fleet, replicas: Sequence[str], num_tokens: int, known: bool, count: int) -> Decision:
    rng = random.Random(f"{num_tokens} {known}")
    prompts = [tuple(rng.choices(range(1 << 17), k=num_tokens)) for _ in range(count)]
    chains, hashing, deciding, after = [], [], [], []
    for prompt in prompts:
        chain = Chain(prompt, BLOCK_SIZE)
        begin = time.perf_counter()
        names = tuple(chain.names(len(chain)))
        hashing.append(time.perf_counter() - begin)
        if known:
            for replica in rng.sample(replicas, 12):
                share = rng.choice((1.0, 1.0, rng.random()))
                fleet.change(replica, BlockChanges(stored=names[: int(share * len(names))]))
        chains.append(chain if known else Chain(prompt, BLOCK_SIZE))
    spent = [0.0]
    fleet.metrics.decided = spent.append  # type: ignore[method-assign]  # the fleet's own measurement
    for chain in chains:
        placing = Placing(num_tokens, chain)
        begin = time.perf_counter()
        fleet.place(placing)
        after.append(time.perf_counter() - begin - spent[-1])
        deciding.append(spent[-1])
        assert known or not placing.predicted
        fleet.ended(placing)
    micro = [[1e6 * seconds for seconds in times] for times in (hashing, deciding, after)]
    hash_us, decision_us, after_us = micro
    return Decision(
        "cached" if known else "unknown",
        num_tokens,
        median(hash_us),
        percentile(decision_us, 10),
        median(decision_us),
        percentile(decision_us, 99),
        median(after_us),
    )


def measure_cost(args: argparse.Namespace) -> list[Decision]:
    fleet, replicas = full_fleet(args.replicas, args.blocks)
    found = [
        decisions(fleet, replicas, num_tokens, known, args.decisions)
        for num_tokens in (1024, 32768)
        for known in (True, False)
    ]
    shown = table(("prompt", "tokens", "hashing all of it", "decision p10", "p50", "p99", "after it", "goal", ""))
    for each in found:
        shown.add_row(
            each.prompt,
            str(each.num_tokens),
            f"{each.hash_p50_us:.0f} µs",
            f"{each.decision_p10_us:.1f} µs",
            f"{each.decision_p50_us:.1f} µs",
            f"{each.decision_p99_us:.1f} µs",
            f"{each.after_p50_us:.1f} µs",
            f"{GOAL_US:.0f} µs",
            verdict(each.decision_p50_us <= GOAL_US),
        )
    show(f"Decision at {args.replicas} replicas, {len(fleet.index):,} blocks in the index", shown)
    return found


def measure_gain(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    results: dict[str, dict[str, Any]] = {}
    for name, workload in WORKLOADS.items():
        results[name] = {}
        for policy in POLICIES:
            with console.status(f"{name}: {policy}"):
                served = [x for seed in range(args.seeds) for x in simulate(policy, workload(seed), args.ingresses)]
            results[name][policy] = summary(served)
    shown = table(("workload", "policy", "requests", "hit rate", "TTFT mean", "p50", "p99", ""), left=2)
    for name, by_policy in results.items():
        for policy, found in by_policy.items():
            shown.add_row(
                name if policy == "prefix" else "",
                policy,
                str(found["requests"]),
                f"{100 * found['hit_rate']:.1f} %",
                *(f"{1000 * found[key]:.1f} ms" for key in ("ttft_mean_s", "ttft_p50_s", "ttft_p99_s")),
                judge(by_policy) if policy == "prefix" else "",
            )
        shown.add_section()
    show(f"Four simulated replicas behind {args.ingresses} ingress(es)", shown)
    return results


def simulate(policy: str, workload: Workload, ingresses: int) -> list[Served]:
    random.seed(0)  # the policies' chance
    return Simulation([Fleet(make_policy(policy), 1 << 20) for _ in range(ingresses)], 4).run(workload)


def summary(served: Sequence[Served]) -> dict[str, Any]:
    ttfts = [each.ttft_s for each in served]
    return {
        "requests": len(served),
        "hit_rate": sum(each.cached for each in served) / sum(len(each.arrival.prompt) for each in served),
        "predicted_tokens": sum(each.predicted for each in served),
        "found_tokens": sum(each.cached for each in served),
        "ttft_mean_s": fmean(ttfts),
        "ttft_p50_s": median(ttfts),
        "ttft_p99_s": percentile(ttfts, 99),
    }


def judge(by_policy: dict[str, dict[str, Any]]) -> str:
    """Where something is shared prefix must beat round_robin, else be as good as least_loaded."""
    prefix, turns, least = (by_policy[name] for name in ("prefix", "round_robin", "least_loaded"))
    if prefix["hit_rate"] > 0.01:
        return verdict(prefix["hit_rate"] > turns["hit_rate"] and prefix["ttft_mean_s"] < turns["ttft_mean_s"])
    return verdict(prefix["ttft_mean_s"] <= (1 + GOAL_LOSS) * least["ttft_mean_s"])


def verdict(met: bool) -> str:
    return "[green]met[/green]" if met else "[red]missed[/red]"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of a routing decision; policies on simulated pools.")
    parser.add_argument("--replicas", type=int, default=100, help="of the decision")
    parser.add_argument("--blocks", type=int, default=1 << 20, help="in the index of the decision")
    parser.add_argument("--decisions", type=int, default=200, help="per kind of prompt")
    parser.add_argument("--ingresses", type=int, default=1, help="of the simulated pools")
    parser.add_argument("--seeds", type=int, default=2, help="of each workload")
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    cost = measure_cost(args)
    gain = measure_gain(args)
    save("routing", vars(args), {"decision": [asdict(each) for each in cost], "policies": gain})


if __name__ == "__main__":
    main()

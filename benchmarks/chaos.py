"""Chaos: a served model under load while its processes are killed and stopped, and whether anybody could tell.

    python benchmarks/chaos.py --minutes 10

Clients ask from a set of questions whose right answers were learned from the same deployment while nothing was wrong.
Then, one fault after the other, a rank, a replica, an ingress, the controller or a whole node gets SIGKILL, or SIGSTOP.
Printed: requests sent and how they ended (the goal is 0 wrong, 0 lost, 0 hung), and per kind of fault how long streams
stood still and until everything was there again. The exit code is 1 if the goal is missed.

An ingress cannot hand over its clients' connections: those that break within seconds of an ingress or a node being
killed are that fault's doing, and the client asks again. Any other broken connection misses the goal.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from chaos_cluster import Broken, wait_until_well
from chaos_load import Asked, Clients, questions
from report import console
from rich.table import Table

VOCAB, LONGEST = 256, 1024
FAULTS = ("kill rank", "stop rank", "kill replica", "stop replica", "kill ingress", "kill controller", "kill node")
RECOVERY_S = 90.0
CUTTING = ("kill ingress", "kill node")  # with these, connections go
CUT_WITHIN_S = 5.0
STALL_S = 0.5  # a gap between tokens longer than this, begun before a fault's recovery, counts as its doing


@dataclass(slots=True)
class Fault:
    kind: str
    at: float  # time.monotonic()
    pid: int | None = None  # of the victim
    well_after_s: float | None = None
    stalls_s: list[float] = field(default_factory=list)


def make_model(folder: Path) -> Path:
    """A small random Llama with a byte tokenizer: quick to load, and its steps take long enough to be hit."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.4,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {f"<{i}>": i for i in range(len(letters), VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def main() -> int:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="octavo-chaos-") as folder:
        model = "fake:step_ms=4" if args.fake else str(make_model(Path(folder) / "tiny"))
        deployment = {
            "model": model,
            "served_model_name": "tiny",
            "num_replicas": args.replicas,
            "num_ingresses": args.ingresses,
            "num_cpus": 1,
            "engine": {
                "tensor_parallel_size": args.tp,
                "pipeline_parallel_size": args.pp,
                "max_model_len": 2048,
                "num_gpu_blocks_override": 1024,
                "max_num_seqs": 64,
                "batch_invariant": not args.fake,
            },
            "log_level": "warning",
        }
        # A node more than is needed, so that a lost one's replicas find a place.
        cluster = Broken(deployment, num_nodes=args.replicas + 1, cpus_per_node=args.tp * args.pp)
        try:
            cluster.start()
            return run(cluster, args)
        finally:
            cluster.stop()


def run(cluster: Broken, args: argparse.Namespace) -> int:
    clients = Clients(cluster.url, "tiny", questions(args.questions, VOCAB, LONGEST // 2, args.seed))
    asyncio.run(clients.learn())
    clients.log.clear()
    console.print(f"learned {args.questions} answers; breaking things for {args.minutes:g} minutes")
    # The clients have a thread of their own: Ray starts nodes on the main one only.
    load = threading.Thread(target=lambda: asyncio.run(clients.run(args.concurrency, args.seed)))
    load.start()
    try:
        faults = break_things(cluster, args)
    finally:
        clients.stop()
        load.join()
    attribute_stalls(faults, clients.log)
    return report(faults, clients.log)


def break_things(cluster: Broken, args: argparse.Namespace) -> list[Fault]:
    """One fault after the other, each when the one before it is healed and `every_s` has passed."""
    draw = random.Random(args.seed)
    ends = time.monotonic() + args.minutes * 60
    faults: list[Fault] = []
    kinds: list[str] = []
    while time.monotonic() < ends:
        time.sleep(args.every)
        if not kinds:
            kinds = draw.sample(args.faults, len(args.faults))
        fault = strike(cluster, kinds.pop(), draw)
        if fault is None:
            continue
        if wait_until_well(cluster, RECOVERY_S, gone=fault.pid):
            fault.well_after_s = time.monotonic() - fault.at
        said = "not well again" if fault.well_after_s is None else f"well after {fault.well_after_s:.1f} s"
        console.print(f"  {fault.kind}: {said}")
        faults.append(fault)
    return faults


def strike(cluster: Broken, kind: str, draw: random.Random) -> Fault | None:
    """None: there is no such process."""
    action, role = kind.split()
    if role == "node":
        index = draw.randrange(len(cluster.nodes))
        fault = Fault(kind, time.monotonic())
        cluster.kill_node(index)
        time.sleep(3.0)
        cluster.replace_node(index)
        return fault
    victims = [process for process in cluster.processes() if process.role == role]
    if not victims:
        return None
    victim = draw.choice(victims)
    fault = Fault(kind, time.monotonic(), victim.pid)
    cluster.signal(victim, signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    return fault


def attribute_stalls(faults: Sequence[Fault], log: Sequence[Asked]) -> None:
    """To each fault the longest gap of every stream that stood still across it."""
    for fault in faults:
        until = fault.at + (fault.well_after_s or RECOVERY_S)
        for asked in log:
            times = [asked.began_at, *asked.token_times]
            gaps = [b - a for a, b in pairwise(times) if a < until and b > fault.at]
            if gaps and max(gaps) > STALL_S:
                fault.stalls_s.append(max(gaps))


def report(faults: Sequence[Fault], log: Sequence[Asked]) -> int:
    table = Table(title="Faults")
    for column in ("fault", "times", "streams stalled", "stall p50 s", "stall p99 s", "well again p50 s", "worst s"):
        table.add_column(column, justify="left" if column == "fault" else "right")
    for kind in dict.fromkeys(fault.kind for fault in faults):
        some = [fault for fault in faults if fault.kind == kind]
        stalls = sorted(stall for fault in some for stall in fault.stalls_s)
        wells = sorted(RECOVERY_S if fault.well_after_s is None else fault.well_after_s for fault in some)
        table.add_row(
            kind,
            str(len(some)),
            str(len(stalls)),
            *(f"{percentile(stalls, p):.2f}" if stalls else "-" for p in (50, 99)),
            f"{statistics.median(wells):.1f}",
            f"{wells[-1]:.1f}",
        )
    console.print(table)
    ends = Counter(asked.outcome for asked in log)
    tokens = sum(len(asked.token_times) for asked in log)
    cut = [at for asked in log for at in asked.cut_at]
    unexplained = [at for at in cut if not explained(at, faults)]
    console.print(
        f"sent {len(log)}, right {ends['right']}, wrong {ends['wrong']}, lost {ends['lost']}, hung {ends['hung']}, "
        f"ended with an error {ends['error']}; {tokens} chunks; connections cut {len(cut)}, "
        f"{len(unexplained)} of them by no fault (asked again), "
        f"refusals {sum(asked.refused for asked in log)} (asked again)"
    )
    for asked in log:
        if asked.outcome != "right":
            console.print(f"  {asked.outcome}: question {asked.question}: {asked.said}")
    unwell = sum(fault.well_after_s is None for fault in faults)
    if unwell:
        console.print(f"{unwell} faults were not healed within {RECOVERY_S:g} s")
    for at in unexplained:
        before = [fault for fault in faults if fault.at <= at]
        said = f"{at - before[-1].at:.1f} s after '{before[-1].kind}'" if before else "before any fault"
        console.print(f"  a connection broke {said}")
    good = ends["right"] == len(log) and not unwell and not unexplained
    console.print("goal reached" if good else "goal missed")
    return 0 if good else 1


def explained(cut_at: float, faults: Sequence[Fault]) -> bool:
    """Connections break with the process that holds them, when it breaks, and only then."""
    return any(fault.kind in CUTTING and 0 <= cut_at - fault.at < CUT_WITHIN_S for fault in faults)


def percentile(values: Sequence[float], p: float) -> float:
    return values[min(len(values) - 1, int(len(values) * p / 100))]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fake", action="store_true", help="an engine without a model: its ranks start at once")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--every", type=float, default=3, help="seconds of peace between faults")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--ingresses", type=int, default=2)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=6)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())

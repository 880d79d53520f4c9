"""An Overview as tables for people. Knows rich; asks nobody anything."""

from __future__ import annotations

import time
from collections.abc import Iterable

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from octavo.cluster.overview import ENGINE, Deployment, Overview, Replica
from octavo.engine.types import EngineStats

COLOURS = {
    "RUNNING": "green",
    "HEALTHY": "green",
    "THERE": "green",
    "STARTING": "yellow",
    "DEPLOYING": "yellow",
    "UPDATING": "yellow",
    "UPSCALING": "yellow",
    "DOWNSCALING": "yellow",
    "STOPPING": "yellow",
    "RECOVERING": "yellow",
}


def render(overview: Overview, trouble: str | None = None) -> RenderableType:
    """`trouble`: why this is an old overview, if it is one."""
    parts: list[RenderableType] = [_headline(overview)]
    parts += [Text(line, style="bold red") for line in _warnings(overview, trouble)]
    for deployment in overview.deployments:
        parts += ["", _deployment(deployment, overview)]
    unplanned = [r for r in overview.replicas if r.deployment not in {d.name for d in overview.deployments}]
    if unplanned:
        parts += ["", _replicas(unplanned, overview)]
    if any(replica.status for replica in overview.replicas):
        parts += ["", _ranks(overview)]
    if overview.failures:
        parts += ["", Text("last failures", style="bold")]
        parts += [Text(str(failure), style="red") for failure in overview.failures]
    return Group(*parts)


def span(seconds: float) -> str:
    """`12 s`, `3 min`, `4 h 05`, `12 d`."""
    seconds = max(0.0, seconds)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    if seconds < 172800:
        return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:02.0f}"
    return f"{seconds / 86400:.0f} d"


def _headline(overview: Overview) -> Text:
    status = overview.app_status or "UNKNOWN"
    line = Text.assemble(("octavo", "bold"), " ", (status, COLOURS.get(status, "bold red")))
    if overview.deployed_at is not None:
        line.append(f"  deployed {span(overview.at - overview.deployed_at)} ago")
    stats = overview.stats
    speeds = [r.tokens_per_s for r in overview.replicas if r.tokens_per_s is not None]
    if speeds:
        line.append(f"  {sum(speeds):,.0f} tokens/s")
    if any(r.status for r in overview.replicas):
        line.append(f"  {stats.num_running} running, {stats.num_waiting} waiting")
    line.append(f"  {time.strftime('%H:%M:%S', time.localtime(overview.at))}", style="dim")
    return line


def _warnings(overview: Overview, trouble: str | None) -> Iterable[str]:
    if trouble is not None:
        yield trouble
    if overview.controller is not None:
        yield f"{overview.controller}: nothing is replaced or scaled until it is back."
    if overview.app_message:
        yield overview.app_message.strip()
    for replica in overview.replicas:
        if replica.trouble is not None:
            yield f"Replica {replica.id} of {replica.deployment} on {replica.node}: {replica.trouble}"
    for node, status in overview.proxies:
        if status not in ("HEALTHY", "STARTING"):
            yield f"The proxy on {node} is {status}."


def _deployment(deployment: Deployment, overview: Overview) -> RenderableType:
    replicas = [replica for replica in overview.replicas if replica.deployment == deployment.name]
    running = sum(replica.state == "RUNNING" for replica in replicas)
    title = Text.assemble(
        (deployment.name, "bold"),
        " ",
        (deployment.status, COLOURS.get(deployment.status, "bold red")),
        f"  {running} of {deployment.wanted} replica{'s' if deployment.wanted != 1 else ''}",
    )
    parts: list[RenderableType] = [title]
    if deployment.message:
        parts.append(Text(deployment.message.strip(), style="yellow"))
    if replicas:
        parts.append(_replicas(replicas, overview))
    return Group(*parts)


def _replicas(replicas: list[Replica], overview: Overview) -> Table:
    engines = any(replica.deployment.startswith(ENGINE) for replica in replicas)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("replica", "state", "node"):
        table.add_column(name, overflow="fold")
    columns = ("age", "run", "wait", "queued", "KV", "hits", "TTFT", "tok/s") if engines else ("age",)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for replica in replicas:
        state = Text(replica.state, style=COLOURS.get(replica.state, "bold red"))
        if replica.trouble is not None:
            state = Text("SILENT", style="bold red")
        age = span(overview.at - replica.started_at) if replica.started_at is not None else ""
        cells: list[RenderableType] = [replica.id, state, replica.node, age]
        if engines:
            cells += _load(replica)
        table.add_row(*cells)
    return table


def _load(replica: Replica) -> list[RenderableType]:
    if replica.status is None:
        return [""] * 7
    stats = replica.status.stats
    speed = "" if replica.tokens_per_s is None else f"{replica.tokens_per_s:,.0f}"
    return [
        str(stats.num_running),
        str(stats.num_waiting),
        f"{stats.waiting_tokens:,}",
        f"{stats.kv_usage:.0%}",
        hit_rate(stats),
        "–" if replica.ttft_s is None else _short(replica.ttft_s),
        speed,
    ]


def _short(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def hit_rate(stats: EngineStats) -> str:
    """Part of the looked-up prompt tokens that were in the prefix cache, since start."""
    return f"{stats.prefix_hits / stats.prefix_queries:.0%}" if stats.prefix_queries else "–"


def _ranks(overview: Overview) -> Table:
    names = dict(overview.nodes)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("replica", "rank", "stage", "tp", "node", "pid", "GPU", "sign of life"):
        table.add_column(name, justify="left" if name in ("replica", "node") else "right")
    for replica in overview.replicas:
        for rank in replica.status.ranks if replica.status is not None else ():
            table.add_row(
                replica.id if rank.rank == 0 else "",
                str(rank.rank),
                str(rank.stage),
                str(rank.tp_rank),
                names.get(rank.node, rank.node[:6]) if rank.node else replica.node,
                str(rank.pid),
                "–" if rank.gpu is None else str(rank.gpu),
                f"{rank.heartbeat_age_s:.1f} s ago",
            )
    return table

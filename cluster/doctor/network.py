"""What addresses, links, clocks and collectives mean. Pure."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable, Sequence

from octavo.cluster.doctor.facts import Collective, Link, NodeFacts, Survey
from octavo.cluster.doctor.verdicts import Check, Finding, Verdict, counted, fail, spent, warn

CLOCK_WARN_S = 0.5  # traces and logs of two nodes no longer tell what came first
CLOCK_FAIL_S = 30.0  # certificates and tokens are refused
SLOW_LINK_S = 0.005  # every layer of a tensor-parallel model waits for two of these
VIRTUAL = ("docker", "br-", "virbr", "veth", "podman")
BIND_ADVICE = "Start Ray there with --node-ip-address of the network that the nodes share."


def addresses(survey: Survey) -> Check:
    """Is every node known under an address of its own that others can use?"""
    machines = {facts.machine for _, facts in survey.answers}
    found, names = [], Counter[str]()
    for node, facts in survey.answers:
        name = interface_of(facts, node.address)
        names[name or "?"] += 1
        if _is_loopback(node.address):
            if len(machines) > 1:
                found.append(
                    fail(survey, node, f"is known as {node.address}, which no other machine can reach.", BIND_ADVICE)
                )
        elif name is None:
            text = f"is known as {node.address}, which is no address of its interfaces ({_listed(facts)})."
            found.append(warn(survey, node, text, BIND_ADVICE))
        elif name.startswith(VIRTUAL):
            text = f"is known as {node.address}, which is its virtual interface {name}."
            found.append(warn(survey, node, text, BIND_ADVICE))
    return Check("addresses", ", ".join(f"{count} × {name}" for name, count in names.items()), tuple(found))


def links(survey: Survey) -> Check:
    """Does every node reach every other one, and by which interface?"""
    found = [*_unreachable(survey)]
    of = {node.id: (node, facts) for node, facts in survey.answers}
    for link in survey.links:
        if link.error is not None:
            continue
        (node, facts), (target, there) = of[link.source], of[link.target]
        name = interface_of(facts, link.local_address)
        if facts.machine != there.machine and name is not None and name.startswith((*VIRTUAL, "lo")):
            text = f"reaches {survey.label(target.id)} through {name} ({link.local_address})."
            found.append(warn(survey, node, text, f"Look at the routes of that node: {name} is not its network card."))
        if link.round_trip_s > SLOW_LINK_S:
            text = f"waits {link.round_trip_s * 1e3:.1f} ms for an answer of {survey.label(target.id)}."
            found.append(warn(survey, node, text, "Put tensor-parallel ranks on one node, or fix the network."))
    good = [link.round_trip_s for link in survey.links if link.error is None]
    slowest = f", round trip at most {spent(max(good))}" if good else ""
    return Check("links", f"{counted(len(good), 'link')} of {len(survey.links)}{slowest}", tuple(found))


def clocks(survey: Survey) -> Check:
    """Clocks against the head's. A difference within half a round trip cannot be told from none."""
    head, _ = survey.reference
    found, worst = [], 0.0
    for node, _ in survey.answers:
        ahead = _clock_ahead(survey.links, head.id, node.id)
        if ahead is None:
            continue
        worst = max(worst, abs(ahead))
        if abs(ahead) > CLOCK_WARN_S:
            way = "ahead of" if ahead > 0 else "behind"
            text = f"has a clock {abs(ahead):.1f} s {way} that of {survey.label(head.id)}."
            kind = fail if abs(ahead) > CLOCK_FAIL_S else warn
            found.append(kind(survey, node, text, "Run a time service (chrony) on that node."))
    return Check("clocks", f"within {spent(worst)} of the head's", tuple(found))


def collectives(survey: Survey) -> Check:
    found: list[Finding] = []
    good = []
    for run in survey.collectives:
        if run.skipped is not None:
            advice = "Free a GPU on every node to check NCCL." if run.backend == "nccl" else "See above."
            found.append(Finding(Verdict.WARN, f"{run.backend} was not tried: {run.skipped}.", advice))
        elif run.errors:
            found += [_broken(survey, run, node_id, error) for node_id, error in run.errors]
        else:
            rate = run.num_bytes / run.seconds / 1e9 if run.seconds else 0.0
            good.append(
                f"{run.backend} over {run.num_ranks} ranks: {run.num_bytes >> 20} MiB in {spent(run.seconds)} "
                f"({rate:.1f} GB/s)"
            )
    return Check("all-reduce", ", ".join(good), tuple(found))


def interface_of(facts: NodeFacts, address: str) -> str | None:
    """The node's interface with this address; None = it has none."""
    if _is_loopback(address):
        return "lo"
    return next((item.name for item in facts.interfaces if item.address == address), None)


def _unreachable(survey: Survey) -> Iterable[Finding]:
    """One finding per node that nobody reaches, or that reaches nobody; the rest by pairs."""
    bad = [link for link in survey.links if link.error is not None]
    others = len(survey.answering) - 1
    into, out = Counter(link.target for link in bad), Counter(link.source for link in bad)
    advice = "Open all TCP ports between the nodes, in both directions."
    # Of two nodes neither can be said to be the wrong one, so there the pair is named.
    deaf = {node_id for node_id, count in into.items() if count == others > 1}
    dumb = {node_id for node_id, count in out.items() if count == others > 1}
    whole = deaf | dumb if len(deaf | dumb) < len(survey.answering) else set()
    for node in survey.answering:
        if node.id in whole:
            way = (
                "neither reached by the others nor reaches them"
                if node.id in deaf & dumb
                else ("not reached by any other node" if node.id in deaf else "cannot reach any other node")
            )
            verb = "" if way.startswith("cannot") else "is "
            reason = next(link.error for link in bad if node.id in (link.source, link.target))
            yield fail(survey, node, f"{verb}{way}: {reason}.", advice)
    for link in bad:
        if link.source not in whole and link.target not in whole:
            (node,) = (node for node in survey.nodes if node.id == link.source)
            yield fail(survey, node, f"cannot reach {survey.label(link.target)}: {link.error}.", advice)


def _clock_ahead(links: Sequence[Link], head: str, node: str) -> float | None:
    """How far the node's clock is surely ahead of the head's (below 0: behind); None = not known."""
    good = [link for link in links if link.error is None]
    there = [(link.round_trip_s, link.clock_ahead_s) for link in good if (link.source, link.target) == (head, node)]
    back = [(link.round_trip_s, -link.clock_ahead_s) for link in good if (link.source, link.target) == (node, head)]
    if not there + back:
        return None
    round_trip_s, ahead = min(there + back)
    sure = max(0.0, abs(ahead) - round_trip_s / 2)
    return sure if ahead > 0 else -sure


def _broken(survey: Survey, run: Collective, node_id: str, error: str) -> Finding:
    advice = "Look at the node's firewall and interfaces (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."
    text = f"{survey.label(node_id)}: the {run.backend} all-reduce failed: {error.rstrip('.')}."
    return Finding(Verdict.FAIL, text, advice, node_id)


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def _listed(facts: NodeFacts) -> str:
    return (
        ", ".join(f"{item.name} {item.address}" for item in facts.interfaces if not _is_loopback(item.address))
        or "none"
    )

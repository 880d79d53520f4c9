"""What the facts of a cluster mean: one Check per question, each wrong node named in a sentence. Pure.

Fails: a model will not run. Warns: it will, but not as well, or not always.
"""

from __future__ import annotations

from collections.abc import Callable

from octavo.cluster.doctor import machines, network
from octavo.cluster.doctor.facts import Survey
from octavo.cluster.doctor.verdicts import Check, Finding, Verdict, counted


def judge(survey: Survey) -> tuple[Check, ...]:
    """All checks, in the order in which to look at them."""
    if not survey.answering:
        return (nodes(survey),)
    return tuple(check(survey) for check in CHECKS if not _idle(check, survey))


def nodes(survey: Survey) -> Check:
    found = [
        Finding(
            Verdict.FAIL,
            f"{survey.label(node.id)} does not answer: {node.trouble}.",
            _advice_for_silence(node.trouble or ""),
            node.id,
        )
        for node in survey.present
        if node.facts is None
    ]
    found += [
        Finding(
            Verdict.WARN,
            f"{survey.label(node.id)} was lost: {(node.lost or '').rstrip('.')}.",
            "If it has not come back, look at its machine and start Ray there again.",
            node.id,
        )
        for node in survey.nodes
        if node.lost is not None
    ]
    return Check("nodes", f"{counted(len(survey.answering), 'node')} answered", tuple(found))


CHECKS: tuple[Callable[[Survey], Check], ...] = (
    nodes,
    network.addresses,
    network.links,
    network.clocks,
    network.collectives,
    machines.versions,
    machines.ports,
    machines.models,
    machines.capacity,
    machines.gpus,
    machines.limits,
    machines.kernels,
)


def _idle(check: Callable[[Survey], Check], survey: Survey) -> bool:
    """Questions that were not asked."""
    if check in (machines.models, machines.capacity):
        return not survey.has_config
    return check in (network.links, network.clocks) and len(survey.answering) == 1


def _advice_for_silence(trouble: str) -> str:
    if "No module named" in trouble:
        return "Install octavo there, in the environment that Ray runs in."
    return "Look at its machine and its raylet (`ray status`, /tmp/ray/session_latest/logs/raylet.out)."

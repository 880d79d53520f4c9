"""Verdict, Finding, Check: the words in which a cluster is judged."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from octavo.cluster.doctor.facts import Node, Survey

GIB = 1 << 30
MIB = 1 << 20


class Verdict(IntEnum):
    OK = 0
    WARN = 1
    FAIL = 2


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong. text: one sentence that names the node. advice: what to do. node: its id, if it is of one."""

    verdict: Verdict
    text: str
    advice: str
    node: str | None = None


@dataclass(frozen=True, slots=True)
class Check:
    """One question. summary: the answer in a few words where nothing is wrong."""

    name: str
    summary: str
    findings: tuple[Finding, ...] = ()

    @property
    def verdict(self) -> Verdict:
        return max((finding.verdict for finding in self.findings), default=Verdict.OK)


def fail(survey: Survey, node: Node, text: str, advice: str) -> Finding:
    return Finding(Verdict.FAIL, f"{survey.label(node.id)} {text}", advice, node.id)


def warn(survey: Survey, node: Node, text: str, advice: str) -> Finding:
    return Finding(Verdict.WARN, f"{survey.label(node.id)} {text}", advice, node.id)


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def spent(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"

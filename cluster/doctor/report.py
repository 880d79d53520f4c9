"""Checks as a table for people and as JSON for machines."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from octavo.cluster.doctor.facts import Survey
from octavo.cluster.doctor.verdicts import Check, Verdict, counted

MARKS = {Verdict.OK: "[green]ok[/]", Verdict.WARN: "[yellow]warn[/]", Verdict.FAIL: "[bold red]FAIL[/]"}


def show(console: Console, survey: Survey, checks: Sequence[Check], seconds: float) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for check in checks:
        if not check.findings:
            table.add_row(MARKS[check.verdict], check.name, escape(check.summary))
        for i, finding in enumerate(check.findings):
            text = f"{escape(finding.text)}\n[dim]{escape(finding.advice)}[/]"
            table.add_row(MARKS[finding.verdict], check.name if i == 0 else "", text)
    console.print(table)
    console.print(_conclusion(survey, checks, seconds))


def as_json(survey: Survey, checks: Sequence[Check]) -> str:
    """{ok, checks: [{name, verdict, summary, findings}], nodes, links, collectives}."""
    listed = [
        {
            "name": check.name,
            "verdict": check.verdict.name.lower(),
            "summary": check.summary,
            "findings": [
                {**dataclasses.asdict(finding), "verdict": finding.verdict.name.lower()} for finding in check.findings
            ],
        }
        for check in checks
    ]
    return json.dumps({"ok": passed(checks), "checks": listed, **dataclasses.asdict(survey)}, indent=2)


def passed(checks: Sequence[Check]) -> bool:
    return all(check.verdict < Verdict.FAIL for check in checks)


def _conclusion(survey: Survey, checks: Sequence[Check], seconds: float) -> str:
    counts = {verdict: sum(check.verdict is verdict for check in checks) for verdict in Verdict}
    what = f"{counted(len(checks), 'check')} of {counted(len(survey.present), 'node')} in {seconds:.1f} s"
    if counts[Verdict.FAIL]:
        return f"[bold red]{counts[Verdict.FAIL]} failed[/], {counted(counts[Verdict.WARN], 'warning')}; {what}"
    if counts[Verdict.WARN]:
        return f"[yellow]{counted(counts[Verdict.WARN], 'warning')}[/]; {what}"
    return f"[green]All is well[/]; {what}"

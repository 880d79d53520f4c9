"""What versions, ports, files, GPUs and limits of the nodes mean. Pure."""

from __future__ import annotations

from collections import Counter

from octavo.cluster.doctor.facts import Survey
from octavo.cluster.doctor.verdicts import GIB, MIB, Check, Finding, Verdict, counted, fail, warn

NOFILE_WARN, NOFILE_FAIL = 65536, 4096
SHM_WARN, SHM_FAIL = 2 * GIB, 256 * MIB
DISK_WARN, DISK_FAIL = 0.10, 0.05  # free; Ray refuses work on a node with less than the latter


def versions(survey: Survey) -> Check:
    """Equal on all nodes? Another Python or Ray fails; another patch of Python does not."""
    head, head_facts = survey.reference
    wanted, found = dict(head_facts.versions), []
    for node, facts in survey.answers:
        for name, version in facts.versions:
            if version is None:
                found.append(fail(survey, node, f"lacks {name}.", f"Install {name} {wanted.get(name) or ''} there."))
            elif version != wanted.get(name):
                same = name == "python" and version.split(".")[:2] == (wanted[name] or "").split(".")[:2]
                kind = warn if same else fail
                text = f"has {name} {version}, {survey.label(head.id)} has {wanted.get(name)}."
                found.append(kind(survey, node, text, f"Install the same {name} on all nodes."))
    return Check("versions", ", ".join(f"{name} {version}" for name, version in wanted.items()), tuple(found))


def ports(survey: Survey) -> Check:
    found = []
    for node, facts in survey.answers:
        for port in facts.ports:
            if not port.free and not survey.serving:
                text = f"has another program on port {port.number} ({port.use})."
                found.append(fail(survey, node, text, "End that program, or serve on another port (--port)."))
    numbers = sorted({(port.number, port.use) for _, facts in survey.answers for port in facts.ports})
    listed = ", ".join(f"{number} ({use})" for number, use in numbers)
    state = "used by Ray Serve, which runs" if survey.serving else "free"
    return Check("ports", f"{listed}: {state}" if listed else "none asked for", tuple(found))


def models(survey: Survey) -> Check:
    """Is what the configuration names on every node, and the same?"""
    head, head_facts = survey.reference
    at_head = {files.path: files for files in head_facts.models}
    found = []
    for node, facts in survey.answers:
        for files in facts.models:
            if files.error is not None:
                text = f"cannot read {files.path}: {files.error}."
                found.append(fail(survey, node, text, "Mount or copy the model to the same path on every node."))
            elif (there := at_head[files.path]).error is None and files.digest != there.digest:
                text = f"has other files in {files.path} than {survey.label(head.id)}."
                found.append(fail(survey, node, text, "Copy the same checkpoint to every node."))
    listed = [f"{files.path} ({files.size / GIB:.1f} GiB)" for files in at_head.values() if files.error is None]
    return Check("model files", ", ".join(listed) or "none in a folder of the nodes", tuple(found))


def capacity(survey: Survey) -> Check:
    findings: tuple[Finding, ...] = ()
    if survey.shortage is not None:
        advice = "Add nodes, or lower num_replicas, tensor_parallel_size or pipeline_parallel_size."
        findings = (Finding(Verdict.FAIL, survey.shortage, advice),)
    return Check("capacity", "the cluster has what the configuration needs", findings)


def gpus(survey: Survey) -> Check:
    found, names = [], Counter[str]()
    drivers = Counter(gpu.driver for _, facts in survey.answers for gpu in facts.gpus)
    usual = drivers.most_common(1)[0][0] if drivers else ""
    for node, facts in survey.answers:
        names.update(gpu.name for gpu in facts.gpus)
        if node.gpus > len(facts.gpus):
            text = f"told Ray of {counted(int(node.gpus), 'GPU')}, but nvidia-smi sees {len(facts.gpus)}."
            found.append(fail(survey, node, text, "Look at `nvidia-smi` there; restart Ray with the right --num-gpus."))
        elif node.gpus < len(facts.gpus) and facts.machine not in _shared_machines(survey):
            text = f"has {counted(len(facts.gpus), 'GPU')}, but told Ray of {node.gpus:g}."
            found.append(warn(survey, node, text, "Restart Ray there with the right --num-gpus, if that is not meant."))
        if len({gpu.name for gpu in facts.gpus}) > 1:
            text = f"has GPUs of several kinds: {', '.join(sorted({gpu.name for gpu in facts.gpus}))}."
            found.append(warn(survey, node, text, "Ranks of one replica wait for the slowest."))
        for other in sorted({gpu.driver for gpu in facts.gpus} - {usual}):
            text = f"has NVIDIA driver {other}, most have {usual}."
            found.append(warn(survey, node, text, "Install the same driver on all nodes."))
    listed = ", ".join(f"{count} × {name}" for name, count in names.items())
    return Check("GPUs", f"{listed}, driver {usual}" if listed else "none: models run on CPU", tuple(found))


def limits(survey: Survey) -> Check:
    """Open files, /dev/shm, free disk: what a container or a distribution sets too low."""
    found = []
    for node, facts in survey.answers:
        if 0 <= facts.nofile < NOFILE_WARN:
            kind = fail if facts.nofile < NOFILE_FAIL else warn
            text = f"allows {facts.nofile} open files per process."
            found.append(kind(survey, node, text, f"Run `ulimit -n {NOFILE_WARN}` before `ray start` there."))
        if facts.shm is None or facts.shm < SHM_WARN:
            size = "no /dev/shm" if facts.shm is None else f"{facts.shm / MIB:,.0f} MiB of /dev/shm"
            kind = fail if (facts.shm or 0) < SHM_FAIL else warn
            found.append(kind(survey, node, f"has {size}.", "Give its container more (docker run --shm-size=8g)."))
        for disk in facts.disks:
            free = disk.free / disk.total if disk.total else 1.0
            if free < DISK_WARN:
                kind = fail if free < DISK_FAIL else warn
                text = f"has {disk.free / GIB:.1f} GiB ({free:.0%}) free for {disk.use} ({disk.path})."
                found.append(kind(survey, node, text, "Free some space; below 5 % Ray starts nothing there."))
    least = min(facts.nofile for _, facts in survey.answers)
    shm = min((facts.shm or 0) for _, facts in survey.answers)
    room = min((disk.free for _, facts in survey.answers for disk in facts.disks), default=0)
    text = f"≥ {least:,} open files, {shm / GIB:.1f} GiB of /dev/shm, {room / GIB:.0f} GiB of disk"
    return Check("limits", text, tuple(found))


def kernels(survey: Survey) -> Check:
    """A stream that moves to a node with other instructions may differ in its last bits from there on."""
    best = {node.id: facts.kernels[0] for node, facts in survey.answers if facts.kernels}
    usual = Counter(best.values()).most_common(1)[0][0] if best else ""
    found = []
    for node, facts in survey.answers:
        if not facts.kernels:
            text = "has no native CPU kernels: models on its CPU run several times slower."
            found.append(warn(survey, node, text, "Install octavo there with a C++ compiler at hand."))
        elif best[node.id] != usual:
            text = f"computes with {best[node.id]}, most with {usual}."
            found.append(warn(survey, node, text, "Set OCTAVO_CPU_ISA to what all have, for equal results on all."))
    return Check("CPU kernels", usual, tuple(found))


def _shared_machines(survey: Survey) -> set[str]:
    """Machines of several nodes: each of those nodes sees all GPUs, and is told of its share."""
    counts = Counter(facts.machine for _, facts in survey.answers)
    return {machine for machine, count in counts.items() if count > 1}

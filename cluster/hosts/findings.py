"""Table of what preflight has checked, one line per check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.hosts import checks, needs
from cluster.hosts.checks import GIB
from cluster.hosts.plan import Draft, warn
from cluster.hosts.remote import Answer
from maskvr_ds.training.references import CheckedRun


@dataclass(frozen=True)
class Finding:
    """One check. summary: of one that passed, or why it was skipped. faults: one line each, with a remedy."""

    what: str
    summary: str
    faults: Sequence[str] = ()
    skipped: bool = False

    @property
    def state(self) -> str:
        return "failed" if self.faults else "skipped" if self.skipped else "ok"


def of_configuration(checked: CheckedRun, ranks: int, answers: Mapping[str, Answer]) -> list[Finding]:
    """Settings, and the files that they name. Corpora that this machine does not see, but all hosts do, are not opened:
    the hosts' reports are all that can be known."""
    config, files = checked.config, checked.files
    phases = f"valid, {len(config.phases)} phases" if config.phases else "valid"
    found = [Finding("configuration", f"{phases}; {ranks} rank{'s' * (ranks != 1)}", checked.settings)]
    absent = [path for path in checks.corpora(config) if not (Path(path) / "manifest.json").is_file()]
    values = [answer.value.get("manifests", {}) for answer in answers.values()]
    if absent and values and all(value.get(path) for value in values for path in absent):
        files = [line for line in files if line.startswith("model.initialize_from ")]
        return [*found, Finding("files", "the corpora are not on this machine, only on the hosts", files, skipped=True)]
    return [*found, Finding("files", "corpora, tokenizers and initial model fit the settings", files)]


def of_hosts(draft: Draft, answers: Mapping[str, Answer]) -> list[Finding]:
    """What the hosts report."""
    reports = {host: answer.value for host, answer in answers.items() if answer.error is None}
    hosts, arguments = draft.hosts, draft.arguments
    errors = draft.errors_of_hosts(answers)
    summaries = _summaries(draft, reports)
    found = [Finding(what, summaries.get(what, ""), lines) for what, lines in errors.items()]
    offsets = [abs(answer.clock[0]) for answer in answers.values() if answer.clock is not None]
    apart = f"within {max(offsets, default=0.0):.1f} s of this machine's"
    found.append(Finding("clocks", apart, checks.clock_errors(answers, arguments.clock)))
    if not draft.on_cpus:
        found.append(Finding("drivers", "the same GPUs and drivers on all hosts", checks.driver_errors(answers)))
        found.append(Finding("GPU memory", "not in use", needs.gpu_memory_errors(reports, hosts)))
        shared = _least(reports, "shared_memory")
        found.append(Finding("shared memory", shared, needs.shared_memory_errors(reports, hosts)))
    found += [*_of_model(draft, reports), *_of_compilers(draft, reports)]
    found.append(Finding("interfaces", "as named or automatic", needs.interface_errors(reports, draft.exports)))
    jobs = draft.jobs(answers)
    if arguments.force:
        warn(jobs)
    ignored = f"{len(jobs)} on the hosts, ignored by --force" if jobs else "none on the hosts"
    found.append(Finding("other jobs", ignored, [] if arguments.force else jobs))
    return [as_far_as_answered(one, len(reports), len(hosts)) for one in found]


def as_far_as_answered(finding: Finding, answers: int, hosts: int) -> Finding:
    """A check that no host could fail, as none has answered, is skipped, not passed."""
    if finding.state != "ok" or answers == hosts:
        return finding
    if not answers:
        return replace(finding, summary="not checked: no host has answered", skipped=True)
    return replace(finding, summary=finding.summary.replace("all hosts", "the hosts that answer"))


def _summaries(draft: Draft, reports: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Of checks that passed."""
    first: Mapping[str, Any] = next(iter(reports.values()), {"packages": {}, "python": "-", "manifests": ()})
    versions = {"python": first["python"], **first["packages"]}
    shown = ", ".join(f"{name} {versions[name]}" for name in checks.PACKAGES if versions.get(name))
    return {
        "hosts": f"{len(draft.hosts)} answer{'s' * (len(draft.hosts) == 1)} by {draft.transport}",
        "cores": "enough for the ranks of each host",
        "GPUs": "enough for the ranks of each host",
        "software": shown,
        "output_dir": f"{draft.run}: writable from all hosts",
        "corpora": f"{len(first['manifests'])} with equal manifests, all shards readable from all hosts",
        "port": "free",
        "disk": f"{_least(reports, 'free_bytes')}; --minimum-free {draft.arguments.minimum_free:g} GiB",
    }


def _of_model(draft: Draft, reports: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Room for checkpoints, and memory."""
    config = draft.config
    number = needs.parameters(config)
    if number is None:
        why = "the model's size is not known: no corpus here, or an architecture without sizes (maskvr plan)"
        return [Finding("checkpoints", why, skipped=True), Finding("memory", why, skipped=True)]
    room = needs.room_needed(config, number)
    each = needs.checkpoint_bytes(config, number)
    return [
        Finding(
            "checkpoints",
            f"{each / GIB:.2g} GiB each for {number:,} parameters; {room / GIB:.2g} GiB more needed",
            needs.room_errors(reports, room, draft.run),
        ),
        Finding(
            "memory",
            _least(reports, "memory"),
            needs.memory_errors(reports, draft.hosts, config, number, draft.on_cpus),
        ),
    ]


def _of_compilers(draft: Draft, reports: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    config = draft.config
    phases = [config.phase(index) for index in range(len(config.phases) or 1)]
    compiled = any(phase.training.compile != "none" for phase in phases)
    fused = any(phase.optimizer.fused for phase in phases)
    found = []
    if compiled:
        lines = needs.compiler_errors(reports)
        lines += [] if draft.on_cpus else needs.triton_errors(reports, "training.compile", "none")
        found.append(Finding("compiler", "found on all hosts", lines))
    else:
        found.append(Finding("compiler", "training.compile is none", skipped=True))
    if fused:
        lines = needs.triton_errors(reports, "optimizer.fused", "false")
        if draft.on_cpus:
            lines.append("optimizer.fused is true, and the ranks run on CPUs; set optimizer.fused to false")
        found.append(Finding("Triton", "found on all hosts", lines))
    else:
        found.append(Finding("Triton", "optimizer.fused is false", skipped=True))
    return found


def _least(reports: Mapping[str, Mapping[str, Any]], key: str) -> str:
    values = [value[key] for value in reports.values() if value.get(key) is not None]
    return f"at least {min(values) / GIB:.3g} GiB free on each host" if values else "not known"


def findings_table(findings: Sequence[Finding]) -> str:
    """One line per check; faults are counted here and listed by the caller."""
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        count = len(finding.faults)
        text = f"{count} error{'s' * (count != 1)}, below" if count else finding.summary
        lines.append(f"{finding.state:<7}  {finding.what:{width}}  {text}".rstrip())
    return "\n".join(lines)

"""How each command's answer is shown: a document with --json, tables and lines without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeexport.console import Cell, Console
from edgeexport.core import Finding, ParityResult, Verdict, worst
from edgeexport.errors import EdgeExportError
from edgeexport.units import format_bytes, format_number, format_seconds

if TYPE_CHECKING:
    from edgeexport.parity.text import TextResult
    from edgeexport.pipeline import BuildResult, ExportResult

NOT_RUN_CODE = 9
"""Exit code where nothing is wrong, and what was asked for did not run: neither passed nor failed."""
YES: Cell = ("yes", "green")
NO: Cell = ("no", "red")
ROW_KINDS: Mapping[str, Cell] = {
    "native": ("taken as it is", "green"),
    "lower": ("lowered", "green"),
    "reject": ("refused", "red"),
}


def builds(console: Console, targets: Sequence[str], build: Callable[[str], BuildResult]) -> None:
    """Build for every target; one that fails does not stop the others, and all failures are reported together."""
    done: list[dict[str, Any]] = []
    failures: list[EdgeExportError] = []
    for target in targets:
        try:
            result = build(target)
        except EdgeExportError as error:
            failures.append(error)
            continue
        done.append(_built(target, result))
        _show_build(console, target, result)
    if failures:
        findings = dict.fromkeys(finding for error in failures for finding in error.findings)
        console.failure(type(failures[0])(*findings), {"builds": done})
        raise typer.Exit(failures[0].exit_code)
    console.json({"builds": done})


def _built(target: str, result: BuildResult) -> dict[str, Any]:
    return {
        "target": target,
        "bundle": result.bundle,
        "up_to_date": result.up_to_date,
        "seconds": result.seconds,
        "peak_rss": result.peak_rss,
        "size": result.size,
        "ideal_bytes": result.ideal_bytes,
        "verdict": worst(result.results),
        "results": result.results,
        "answers": result.answers,
        "findings": result.findings,
        "plan": result.plan,
    }


def _show_build(console: Console, target: str, result: BuildResult) -> None:
    console.parity(result.results)
    console.answers(result.answers)
    for finding in result.findings:
        console.finding(finding)
    state = "up to date" if result.up_to_date else "built"
    console.result(
        f"{result.bundle}  {state} for {target}: {format_bytes(result.size)} "
        f"({result.size / max(result.ideal_bytes, 1):.3f} of ideal), {format_seconds(result.seconds)}, "
        f"peak memory {format_bytes(result.peak_rss)}, parity {worst(result.results).value}"
    )


def plans(console: Console, targets: Sequence[str], plan: Callable[[str], dict[str, Any]]) -> None:
    """Plan for every target; the exit code is the first that is not 0."""
    documents = [plan(target) for target in targets]
    for index, document in enumerate(documents):
        if index:
            console.result("")
        _show_plan(console, document)
    console.json({"plans": documents})
    code = next((document["exit_code"] for document in documents if document["exit_code"]), 0)
    raise typer.Exit(code)


def _show_plan(console: Console, plan: Mapping[str, Any]) -> None:
    model, target, sizes, cost = plan["model"], plan["target"], plan["bytes"], plan["build"]
    console.fields(
        {
            "model": f"{model['name']} ({model['model_type']}, {model['format']}, "
            f"{model['parameters'] / 1e6:.4g} million parameters, {format_bytes(model['bytes'])})",
            "target": f"{target['name']}: {target['title']} ({target['backend']}, {target['artifact']})",
            "scheme": plan["scheme"],
            **_carried(plan["carried"]),
            "components": ", ".join(plan["components"]),
            "artifact": format_bytes(sizes["artifact"]),
            "KV cache": f"{format_bytes(sizes['kv_cache'])} for {plan['context']} tokens",
            "build memory": f"about {format_bytes(cost['memory'])}, {format_bytes(cost['memory_with_ladder'])} with "
            f"the whole ladder ({cost['memory_formula']})",
            "build time": f"about {format_seconds(cost['seconds'])} ({cost['seconds_formula']})",
            "calibration": _calibration(plan["calibration"]),
        }
    )
    rows = [
        [
            device["title"],
            format_bytes(device["ram"]),
            format_bytes(device["usable"]),
            format_bytes(device["needed"]),
            YES if device["fits"] else NO,
            _rate(device["tokens_per_second_empty"]),
            _rate(device["tokens_per_second_full"]),
        ]
        for device in plan["devices"]
    ]
    columns = ["device", "RAM", "usable", "needed", "fits", "tok/s at most", "with a full cache"]
    if rows:
        console.table(columns, rows, right=[*columns[1:4], *columns[5:]])
    for finding in plan["findings"]:
        console.finding(Finding(**finding))


def _carried(carried: Mapping[str, Any]) -> dict[str, str]:
    """The line on integers that are the checkpoint's own, where there are any."""
    if not carried["matrices"]:
        return {}
    bits = f"{carried['bits_per_weight']:.2f} bits a weight"
    return {"carried over": f"{carried['matrices']} of {carried['of']} matrices, {bits}"}


def _calibration(cost: Mapping[str, Any]) -> str:
    if cost["default"] is None:
        return "none is needed"
    ways = [
        f"{method} about {format_seconds(cost[method]['seconds'])} and {format_bytes(cost[method]['memory'])}"
        for method in ("search", "gptq")
    ]
    return f"{'; '.join(ways)}; {cost['default']} by default ({cost['formula']})"


def _rate(value: float | None) -> str:
    return "not known" if value is None else format_number(value)


def export(console: Console, result: ExportResult) -> None:
    """Where the canonical graph is and how large it is."""
    console.json(result)
    console.result(f"{result.path}  {result.nodes} nodes, {result.weights} weights, {format_bytes(result.bytes)}")


def parity(console: Console, bundle: Path, results: Sequence[ParityResult]) -> None:
    """The ladder; a FAIL ends with the exit code of a ParityError, and one in which nothing ran with its own."""
    from edgeexport.errors import ParityError

    verdict = worst(results)
    code = {Verdict.FAIL: ParityError.exit_code, Verdict.NOT_RUN: NOT_RUN_CODE}.get(verdict, 0)
    console.json({"bundle": bundle, "verdict": verdict, "results": results, "exit_code": code})
    console.parity(results)
    console.result(f"{bundle}  parity {verdict.value}")
    raise typer.Exit(code)


def parity_text(console: Console, bundle: Path, text: Path, found: TextResult) -> None:
    """How far a bundle is from its original along a text."""
    console.json({"bundle": bundle, "text": text, **asdict(found)})
    console.fields(
        {
            "tokens": str(found.tokens),
            "KL from the original": f"{found.kl:.4f} nats",
            "same best token": f"{100 * found.top1:.1f} %",
            "perplexity": f"{found.perplexity:.3f}, the original's {found.original_perplexity:.3f}",
        }
    )


def verify(console: Console, bundle: Path, *, golden: bool, threads: int | None) -> None:
    """Verify and say what was checked. Golden vectors that were asked for and are not there end with an exit code of
    their own. Raises: BundleError with everything that is wrong."""
    from edgeexport.bundle import verify as verifier

    with console.step(f"Verifying {bundle}"), console.progress("hashing") as progress:
        report = verifier.verify(bundle, golden=golden, threads=threads, progress=progress)
        report.raise_if_bad()
    code = NOT_RUN_CODE if golden and report.golden is Verdict.NOT_RUN else 0
    console.json(
        {
            "bundle": bundle,
            "files": report.files,
            "bytes": report.bytes,
            "golden": report.golden,
            "note": report.note,
            "comparison": report.comparison,
            "remarks": report.remarks,
            "signature": None,
            "proof": report.proof,
            "exit_code": code,
        }
    )
    for remark in report.remarks:
        console.finding(remark)
    note = f" ({report.note})" if report.note else ""
    console.result(
        f"{bundle}  {report.files} files, {format_bytes(report.bytes)}, all as built; "
        f"golden vectors {report.golden.value}{note}"
    )
    console.say(report.proof)
    raise typer.Exit(code)


def inspect(console: Console, document: Mapping[str, Any]) -> None:
    """The description of a bundle, section by section."""
    console.json(document)
    _sections(console, document)


def bench(console: Console, document: Mapping[str, Any]) -> None:
    """The measurements, one a line."""
    console.json(document)
    _sections(console, document)


def _sections(console: Console, document: Mapping[str, Any], heading: str = "") -> None:
    """Nested mappings as headed blocks; lists of mappings as tables; the rest as names and values."""
    plain = {name: _short(value) for name, value in document.items() if not _nested(value)}
    if heading and plain:
        console.result(f"\n{heading}")
    console.fields(plain)
    for name, value in document.items():
        title = f"{heading} / {name}" if heading else name
        if isinstance(value, Mapping) and value:
            _sections(console, value, title)
        elif _nested(value):
            columns = list(dict.fromkeys(key for row in value for key in row))
            console.result(f"\n{title}")
            console.table(columns, [[_short(row.get(column, "")) for column in columns] for row in value])


def _nested(value: Any) -> bool:
    if isinstance(value, Mapping):
        return True
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(item, Mapping) for item in value)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, list | tuple):
        return ", ".join(map(_short, value))
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(item)}" for name, item in value.items())
    return str(value)


def targets(console: Console) -> None:
    """Every target with its backend and defaults."""
    from edgeexport import targets as files

    loaded = [files.load(name) for name in files.names()]
    console.json(
        {
            "targets": [
                {
                    "name": target.name,
                    "title": target.title,
                    "platform": target.platform,
                    "backend": target.backend,
                    "artifact": target.artifact,
                    "quant": target.quant,
                    "context": target.context,
                    "requires": target.requires,
                }
                for target in loaded
            ]
        }
    )
    console.table(
        ["target", "title", "backend", "artifact", "scheme", "context"],
        [[t.name, t.title, t.backend, t.artifact, t.quant, str(t.context)] for t in loaded],
        right=["context"],
    )


def ops(console: Console, backend: str | None) -> None:
    """The op tables, one row per op."""
    from edgeexport import backends

    rows = [
        {"backend": name, "op": row.op, "kind": row.kind, "note": row.note or row.why, "fix": row.fix}
        for name in ([backend] if backend else sorted(backends.known()))
        for row in sorted(backends.load(name).OPS, key=lambda row: str(row.op))
    ]
    console.json({"ops": rows})
    console.table(
        ["backend", "op", "what it does", "note"],
        [[row["backend"], row["op"], ROW_KINDS[row["kind"]], row["note"]] for row in rows],
    )


def doctor(console: Console, report: Mapping[str, Any]) -> None:
    """The machine; exit code 7 where the bare install is broken."""
    console.json(report)
    console.fields({name: str(report[name]) for name in ("edgeexport", "python", "executable", "system")})
    rows: list[list[Cell]] = [
        [name, version or ("missing", "yellow"), "" if version else f"pip install 'edgeexport[{extra}]'"]
        for extra, packages in report["packages"].items()
        for name, version in packages.items()
    ]
    console.result("")
    console.table(["package", "version", "how to install"], rows)
    if "cpu" in report:
        console.result("")
        console.fields(_machine(report))
    for finding in report["findings"]:
        console.finding(finding)
    raise typer.Exit(report["exit_code"])


def _machine(report: Mapping[str, Any]) -> dict[str, str]:
    cpu, memory, disk, cache = report["cpu"], report["memory"], report["disk_free"], report["cache"]
    limit = memory["cgroup_limit"]
    return {
        "processor": f"{cpu['model']}, {cpu['usable_threads']} of {cpu['threads']} threads usable",
        "instructions": ", ".join(cpu["isa"]) or "none of those that speed up quantised kernels",
        "memory": f"{format_bytes(memory['total'])}, {format_bytes(memory['available'])} available"
        + (f", container limit {format_bytes(limit)}" if limit else ""),
        "disk free": f"{format_bytes(disk['here'])} here, {format_bytes(disk['cache'])} at the cache",
        "cache": f"{cache['path']}, {format_bytes(cache['bytes'])}",
        "GPU": ", ".join(report["gpus"]) or "none that an NVIDIA driver reports",
    }

"""The tables of one bundle's tokenizer and chat template, and what could not be put into them."""

from __future__ import annotations

from edgeexport import errors
from edgeexport.core import Finding
from edgeexport.session.chat import ChatTemplate
from edgeexport.text_tables import Unsupported, bpe, chat


def table_files(
    tokenizer_json: bytes, template: ChatTemplate | None, *, pictures: bool
) -> tuple[dict[str, bytes], list[Finding]]:
    """(path in the bundle to content, warnings about the tables that are missing)."""
    files: dict[str, bytes] = {}
    findings: list[Finding] = []
    try:
        files[bpe.FILE] = bpe.bpe_file(tokenizer_json)
    except Unsupported as problem:
        findings.append(errors.tokenizer_without_table(problem.part, problem.kind))
    try:
        if template is not None:
            files[chat.FILE] = chat.to_json(chat.chat_table(template, pictures=pictures))
    except Unsupported as problem:
        findings.append(errors.chat_template_without_table(problem.kind))
    return files, findings

"""The ladder's judgements, apart from the runs that they judge."""

from __future__ import annotations

import pytest

from edgeexport.core import Verdict
from edgeexport.parity import gates, ladder

FEW, ENOUGH = gates.FEWEST_DECIDED - 1, gates.FEWEST_DECIDED

VERDICTS = {
    "all agree": (70, 10, 0.6, Verdict.PASS),
    "enough agree": (48, 0, 0.6, Verdict.PASS),
    "one too few": (47, 0, 0.6, Verdict.FAIL),
    "none agrees": (0, 0, 0.6, Verdict.FAIL),
    "all near a tie": (0, 80, 0.6, Verdict.AMBIGUOUS),
    "few decided, none agrees": (0, 80 - FEW, 0.6, Verdict.AMBIGUOUS),
    "few decided, all agree": (FEW, 80 - FEW, 0.6, Verdict.AMBIGUOUS),
    "just enough decided, none agrees": (0, 80 - ENOUGH, 0.6, Verdict.FAIL),
    "just enough decided, all agree": (ENOUGH, 80 - ENOUGH, 0.6, Verdict.PASS),
    "one decided where all must agree": (0, 79, 1.0, Verdict.FAIL),
    "one decided and agreed where all must": (1, 79, 1.0, Verdict.PASS),
    "none decided where all must agree": (0, 80, 1.0, Verdict.AMBIGUOUS),
}
"""Of 80 tokens: (agreeing, near a tie, least share) and the verdict."""


@pytest.mark.parametrize("name", VERDICTS)
def test_tokens_near_a_tie_are_set_aside_and_too_few_others_judge_nothing(name: str) -> None:
    agree, near, least, verdict = VERDICTS[name]
    row = ladder._tokens_row("L5", "tokens", agree, near, 80, {"top1": least, "near_tie": 1.0})
    assert row.verdict is verdict
    assert row.metrics["ambiguous"] == near and row.metrics["tokens"] == 80

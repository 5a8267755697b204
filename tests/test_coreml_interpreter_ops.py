"""Every operation of the interpreter of ML programs against coremltools' own value inference, torch, or numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cases.mil import MIL, MilCase
from mlpackages import builder, coremltools

from edgeexport.backends.coreml_interpreter import OPS

pytest.importorskip("coremltools")


def inferred(case: MilCase) -> Any:
    """What coremltools computes while it builds the operation of constants."""
    ct, mb = coremltools(), builder()
    from coremltools.converters.mil.mil import Function

    with Function({}, opset_version=ct.target.iOS18):
        made = getattr(mb, case.op)(**case.inputs)
    found = tuple(each.val for each in made) if isinstance(made, list | tuple) else made.val
    missing = found is None or (isinstance(found, tuple) and any(each is None for each in found))
    assert not missing, "coremltools infers no value: the case needs an oracle of its own"
    return found


def test_every_operation_has_a_case_and_no_case_is_of_another() -> None:
    assert {case.op for case in MIL} == set(OPS)


@pytest.mark.parametrize("case", MIL, ids=str)
def test_an_operation_is_what_its_oracle_says(case: MilCase) -> None:
    with np.errstate(all="ignore"):
        expected = case.oracle(**case.inputs) if case.oracle else inferred(case)
        got = OPS[case.op](**case.inputs)
    wanted, found = (each if isinstance(each, tuple) else (each,) for each in (expected, got))
    assert len(found) == len(wanted)
    for want, have in zip(wanted, found, strict=True):
        want = np.asarray(want)
        assert have.shape == want.shape
        np.testing.assert_allclose(have, want, atol=case.tolerance, rtol=1e-5)

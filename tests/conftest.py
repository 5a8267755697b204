"""What all tests share: the switch that rewrites golden texts, and a cache folder of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

settings.register_profile("edgeexport", deadline=None)  # a busy machine is no failure
settings.load_profile("edgeexport")

if TYPE_CHECKING:
    from graphs import Zoo
    from native import Parts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden and docs/errors.md")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test reads or writes the user's cache. All workers share one: what one has traced, none traces again."""
    from sharing import shared

    folder = shared(tmp_path_factory, "cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEEXPORT_CACHE_DIR", str(folder))
        yield folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Tiny models of every family, traced once for all tests."""
    from graphs import Zoo

    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="session")
def asked() -> Iterator[Callable[[Path], int]]:
    """`resolved.ask`, by a process that is forked once for each question: starting Python anew takes seconds."""
    from tokenizers_zoo import asking

    pytest.importorskip("transformers")
    with asking() as ask:
        yield ask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Llama with a tokenizer."""
    from factories import with_tokenizer
    from graphs import write_checkpoint

    from edgeexport import families

    return with_tokenizer(write_checkpoint(tmp_path_factory.mktemp("tiny") / "llama", families.find("llama").tiny))


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """The native loader's parts that need no engine."""
    from native import Parts

    return Parts(tmp_path_factory.mktemp("parts"))

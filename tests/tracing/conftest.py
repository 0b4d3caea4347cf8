"""Fixtures of the tracing tests."""

import pytest
from families import tiny_model
from tracing_help import FACTS, ROOT


@pytest.fixture
def facts():
    return list(FACTS)


@pytest.fixture(scope="session")
def gpt2():
    return tiny_model("gpt2")


@pytest.fixture(scope="session")
def qwen2():
    return tiny_model("qwen2")


@pytest.fixture(scope="session")
def golden():
    folder = ROOT.parent / "shared" / "golden" / "trace"
    if not folder.is_dir():
        pytest.skip("the golden results are not here")
    return folder

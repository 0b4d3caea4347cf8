"""A model to edit, with its second moments."""

import pytest
from editing_help import statistics


@pytest.fixture(scope="module")
def ready(setting):
    """The model, and second moments of it as it is unedited."""
    return setting[0], statistics(*setting)

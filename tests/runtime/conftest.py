import pytest


@pytest.fixture(scope="module", autouse=True)
def quick(quick_runs):
    """All runs in these tests are quick ones, see runs.py."""

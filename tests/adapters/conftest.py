"""The adapters run cases of the contract suite, and leave out what a backend does not have as it does."""

from tests.contract.conftest import pytest_collection_modifyitems

__all__ = ["pytest_collection_modifyitems"]

"""The adapters run the contract suite's cases: they leave out what a backend does not have, and compile ahead, too."""

from tests.contract.conftest import compiled, pytest_collection_modifyitems

__all__ = ["compiled", "pytest_collection_modifyitems"]

"""How ./test.sh deals the tests to its processes: a file is one process's, and so are all tests of what takes minutes to
make once, whichever file they are in; the longest go first, so that no process waits for another at the end."""

import pytest

FIRST = ("everything", "evaluation/tests/test_quickstart.py", "decdec_extension/tests/test_cuda_build.py")


def pytest_collection_modifyitems(items):
    def group(item) -> str:
        return "everything" if "everything" in item.fixturenames else item.nodeid.split("::")[0]

    for item in items:
        item.add_marker(pytest.mark.xdist_group(group(item)))
    items.sort(key=lambda item: FIRST.index(group(item)) if group(item) in FIRST else len(FIRST))

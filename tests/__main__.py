"""Runs all tests of this folder, or those named, and ends with `N passed, N failed, N skipped`.

    python3 tests [test_schedule ...]        status 1 if any failed; skipped ones are named
"""
import os
import sys
import unittest

HERE = os.path.dirname(os.path.abspath(__file__))


class Result(unittest.TextTestResult):
    """Counts what passed, so that the last line can say so."""

    passed = 0

    def addSuccess(self, test):
        super().addSuccess(test)
        self.passed += 1


def main(names):
    sys.path.insert(0, HERE)
    loader = unittest.defaultTestLoader
    suite = loader.loadTestsFromNames(names) if names else loader.discover(HERE)
    result = unittest.TextTestRunner(resultclass=Result, verbosity=1).run(suite)
    for test, reason in result.skipped:
        print("skipped %s: %s" % (test.id(), reason))
    failed = len({test.id() for test, _ in result.failures + result.errors})
    print("%d passed, %d failed, %d skipped" % (result.passed, failed, len(result.skipped)))
    return 0 if result.wasSuccessful() and result.testsRun else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Every kernel path against double precision, and the same bits for any batch, cut and thread count."""
import os
import subprocess
import unittest

import common


class Kernels(unittest.TestCase):
    def test_all_paths(self):
        env = dict(os.environ, OMP_WAIT_POLICY="passive")
        done = subprocess.run([common.build("test_kernels"), "quick"], capture_output=True, text=True,
                              env=env, check=False)
        self.assertEqual(done.returncode, 0, done.stdout[-3000:] + done.stderr[-3000:])


if __name__ == "__main__":
    unittest.main()

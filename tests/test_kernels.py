"""Every kernel path against double precision, and the same bits for any batch, cut and thread count."""
import os
import subprocess
import unittest

import common


class Kernels(unittest.TestCase):
    def check(self, name):
        env = dict(os.environ, OMP_WAIT_POLICY="passive")
        done = subprocess.run([common.build(name), "quick"], capture_output=True, text=True, env=env,
                              check=False)
        if done.returncode == 77:
            self.skipTest("this CPU or compiler lacks AVX-512 with bfloat16")
        self.assertEqual(done.returncode, 0, done.stdout[-3000:] + done.stderr[-3000:])

    def test_all_paths(self):
        self.check("test_kernels")

    def test_amx_emulated(self):
        self.check("test_amx")


if __name__ == "__main__":
    unittest.main()

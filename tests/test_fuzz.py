"""The inputs that fuzzing (fuzzing.py) starts from, damaged ones and all that it ever found."""
import os
import random
import subprocess
import unittest

import common
import fuzzing


class Replay(unittest.TestCase):
    def test_targets(self):
        program, models_in, rng = common.build("fuzz"), fuzzing.folder(), random.Random(5)
        for target in fuzzing.TARGETS:
            with self.subTest(target):
                folder = os.path.join(common.scratch(), "replay-" + target)
                fuzzing.write_seeds(target, models_in, folder)
                paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder))]
                for path in list(paths):
                    data = fuzzing.read(path)
                    for i in range(20):         # cut, or with some bytes changed
                        damaged = bytearray(data[:rng.randrange(len(data) + 1)] if i % 2 else data)
                        for _ in range(i % 5 if damaged else 0):
                            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
                        paths.append("%s-%d" % (path, i))
                        with open(paths[-1], "wb") as file:
                            file.write(damaged)
                found = os.path.join(common.TESTS, "fuzz", target)
                if os.path.isdir(found):
                    paths += [os.path.join(found, name) for name in sorted(os.listdir(found))]
                done = subprocess.run([program, *paths], stderr=subprocess.PIPE, text=True, timeout=300,
                                      errors="replace", check=False,
                                      env=dict(os.environ, FUZZ_TARGET=target, FUZZ_FOLDER=models_in))
                self.assertEqual((done.returncode, done.stderr.splitlines()[-1:]),
                                 (0, ["%d inputs" % len(paths)]), done.stderr[-2000:])


if __name__ == "__main__":
    unittest.main()

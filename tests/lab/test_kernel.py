"""What the kernel under the lab is."""

import os


def test_root_and_kernel():
    assert os.geteuid() == 0

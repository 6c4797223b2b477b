"""A Ray cluster of two workers on this machine, for as long as a test run lasts: `cluster.py RUN ADDRESS`.

RUN: process id of the test run, which several processes may belong to. ADDRESS: the file to write the address to.
"""

import os
import sys
import time
from pathlib import Path

import psutil
import ray

from stepquant.compute.ray import OBJECT_STORE_BYTES
from stepquant.storage.atomic import write_text

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
context = ray.init(
    "local", num_cpus=2, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, logging_level="ERROR"
)
write_text(Path(sys.argv[2]), context.address_info["address"])
while psutil.pid_exists(int(sys.argv[1])):
    time.sleep(0.5)

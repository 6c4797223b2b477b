"""A Ray cluster of two workers on this machine, for as long as its standard input is open; prints its address."""

import sys

import ray

from stepquant.compute.ray import OBJECT_STORE_BYTES

context = ray.init("local", num_cpus=2, object_store_memory=OBJECT_STORE_BYTES, include_dashboard=False, logging_level="ERROR")
print(context.address_info["address"], flush=True)
sys.stdin.read()

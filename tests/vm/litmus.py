"""Runs in a guest: litmus.py REGION LIBRARY ROUNDS; prints the violations without and with fences, as JSON."""

import ctypes
import json
import sys

from guest.ivshmem import open_region
from idc._core import ffi

name, library, rounds = sys.argv[1:]
region = open_region(name)
memory = ffi.from_buffer("uint8_t[]", region.memory, require_writable=True)
base = int(ffi.cast("uintptr_t", memory)) + region.header.parts[0].offset
code = ctypes.CDLL(library)
code.store_buffering.restype = ctypes.c_long
code.store_buffering.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
found = [code.store_buffering(base + 4096 * fenced, region.member, int(rounds), fenced) for fenced in (0, 1)]
sys.stdout.write(json.dumps(found) + "\n")

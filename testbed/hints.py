"""From what QEMU or a guest said to what to try. Pure; a table."""

from __future__ import annotations

import re

BROKER_HINT = ("a line [broker] in the topology file (`testbed config show` prints that of a testbed that has none); "
               "in Python Testbed(broker=True)")
"""For who wants a registry, a device or a control region of a testbed without a broker."""

_HINTS: tuple[tuple[str, str], ...] = (
    (r"emulation failure|KVM internal error", "this machine's KVM cannot run the guest; use --accel tcg"),
    (r"Could not access KVM|failed to initialize kvm", "see `ls -l /dev/kvm` and group kvm, or use --accel tcg"),
    (
        r"could not load kernel|error reading header|invalid kernel header|Error loading uncompressed kernel",
        "the kernel must be a bzImage, or a vmlinux with a PVH entry",
    ),
    (r"cannot set up guest memory|Cannot allocate memory", "give the VM less memory, or stop other VMs"),
    (
        r"unable to map backing store|hugetlb|HugeTLB",
        "reserve huge pages: sysctl vm.nr_hugepages=N (2 MiB each); see HugePages_Free in /proc/meminfo",
    ),
    (r"Failed to get .* lock", "another process writes to this disk image"),
    (
        r"Could not open '.*'|qemu-system-\S+: .*No such file or directory",
        "a file that QEMU was given is missing; is the image complete?",
    ),
    (r"VFS: Unable to mount root|No working init found", "the guest was given no initramfs, or one without /init"),
    (r"erofs|Unable to read block|bad superblock|wrong fs type", "the root file system is damaged; rebuild it"),
    (r"Attempted to kill init", "process 1 ended: the line before the panic says why; the init is ours, see images/"),
    (r"No space left on device", "make room there; a guest's files lie in its memory: give it more"),
    (r"Out of memory|oom-kill", "give the VM more memory"),
    (r"soft lockup|detected stall", "the machine is overloaded, or a CPU of the guest spins"),
)


def hint_for(*texts: str) -> str:
    """The first hint that fits any of the texts, or an empty string."""
    whole = "\n".join(texts)
    return next((hint for pattern, hint in _HINTS if re.search(pattern, whole, re.IGNORECASE)), "")

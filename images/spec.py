"""What goes into an image: packages, kernel modules, options. Plain data; may import the standard library only."""

from __future__ import annotations

from dataclasses import dataclass

#: Part of every key: raise it to have everything made again although no input changed (the builder's code is one).
BUILDER_VERSION = 1

#: usr-is-merged: else its alternative usrmerge comes, with 45 MB of Perl.
PACKAGES = (
    "busybox-static", "e2fsprogs", "fio", "iperf3", "iproute2", "kmod", "mount", "nbd-client", "nbd-server",
    "openssh-server", "openssh-sftp-server", "procps", "python3", "python3-cffi-backend", "sockperf", "usr-is-merged",
)  # fmt: skip

#: For the tree in which the C core is compiled for the guest's Python and libc; extracted, never configured.
DEV_PACKAGES = ("gcc", "libc6-dev", "libpython3-dev", "python3", "python3-cffi", "python3-distutils",
                "python3-setuptools")  # fmt: skip

#: Loaded at boot, by the initramfs: insmod in a known order takes a third of the time that modprobe needs to find it.
#: crc32c: erofs and ext4 ask for it by its crypto name, which no `depends=` shows.
BOOT_MODULES = ("virtio_pci", "virtio_blk", "crc32c_generic", "erofs", "overlay", "virtio_console", "virtio_net",
                "vfio_iommu_type1", "vfio-pci")  # fmt: skip

#: Kept in the root, together with whatever these depend on; all others are dropped.
MODULES = (
    *BOOT_MODULES,
    "9p", "9pnet_fd", "9pnet_virtio", "bridge", "configfs", "crc32c-intel", "dummy", "ext4", "fuse", "loop",
    "nbd", "stp", "target_core_user", "tun", "usbip-core", "usbip-host", "veth", "vhci-hcd", "virtio_balloon",
    "virtio-rng", "virtio_scsi", "virtiofs", "vmw_vsock_virtio_transport", "vsock", "vsock_loopback",
)  # fmt: skip


@dataclass(frozen=True)
class ImageSpec:
    """What an image is made of. Every field is an input of its hash.

    `packages` go into the root, `dev_packages` into the tree that compiles the C core; both follow dependencies, not
    recommendations. `modules` are kernel modules kept in the root, those of `boot_modules` are loaded
    at boot. `compression` is mkfs.erofs' algorithm, or "".
    """

    name: str = "debian12"
    suite: str = "bookworm"
    arch: str = "amd64"
    kernel_package: str = "linux-image-amd64"
    packages: tuple[str, ...] = PACKAGES
    dev_packages: tuple[str, ...] = DEV_PACKAGES
    modules: tuple[str, ...] = MODULES
    boot_modules: tuple[str, ...] = BOOT_MODULES
    compression: str = "lz4"


DEFAULT = ImageSpec()

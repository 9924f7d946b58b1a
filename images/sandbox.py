"""Shell scripts that build in a namespace of their own, as root there, whoever runs the build.

`mmdebstrap --unshare-helper` makes the namespace: for an ordinary user a user namespace with the ids of
/etc/subuid, for root a mount namespace. One program that has to be permitted, not two (Ubuntu permits by program).
The work lies in a tmpfs that ends with the namespace: a kill leaves nothing behind, and it does not matter that the
ids of /etc/subuid cannot enter the user's home. Inputs come in on descriptors, the result goes out on standard output.
"""

from __future__ import annotations

#: Begins every script. $r is the tree. /dev/null is all that compilers and Python want of /dev.
_BEGIN = """\
set -eu
umask 022
mount --make-rprivate /
mount -t tmpfs -o mode=755 tmpfs /tmp
cd /tmp
r=/tmp/root
mkdir $r
tar -C $r -xp --numeric-owner <&3
mkdir -p $r/dev
: > $r/dev/null
mount --bind /dev/null $r/dev/null
"""

#: 3: development tree, 4: sources. Out: the C core as tar of idc/_core*.so.
CORE = _BEGIN + """\
mkdir $r/build
tar -C $r/build -x <&4
chroot $r /usr/bin/python3 -c '
import os, sys
os.chdir("/build")
sys.path.insert(0, "/build")
from idc.core.build import ffibuilder
ffibuilder.compile(tmpdir="/build", verbose=True)
' >&2
cd $r/build
tar -c --owner=0 --group=0 --mtime=@0 idc/_core*.so
"""

#: 3: base tree, 4: overlay, 5: C core, 6: kernel modules. $1: kernel release, $2: UUID, then mkfs.erofs' options.
#: Out: the erofs image. The import shows that the C core fits the Python it will meet.
ROOT = _BEGIN + """\
release=$1 uuid=$2
shift 2
site=usr/lib/python3/dist-packages
tar -C $r -x <&4
tar -C $r/$site -x <&5
tar -C $r -x <&6
chroot $r depmod -a "$release"
chroot $r /usr/bin/python3 -m compileall -q -f --invalidation-mode unchecked-hash $site/idc $site/guest >&2
chroot $r /usr/bin/python3 -c 'import guest.agent, idc._core'
umount $r/dev/null
rm $r/dev/null
mkfs.erofs -T0 -U "$uuid" "$@" /tmp/image $r >&2
cat /tmp/image
"""

#: 3: tree with headers, 4: sources below build/. $1: kernel release. Out: the modules as tar. The tree is unpacked, not
#: installed, so nobody has made awk.
MODULE = _BEGIN + """\
release=$1
tar -C $r -x <&4
ln -sf mawk $r/usr/bin/awk
chroot $r /usr/bin/make -C "/usr/src/linux-headers-$release" M=/build modules >&2
cd $r/build
tar -c --owner=0 --group=0 --mtime=@0 -- *.ko
"""

#: mmdebstrap's customize hook for the base tree; $1 is the tree. Takes away what no guest uses, and compiles Python so
#: that the guest neither compiles nor even looks at the sources' times.
BASE_HOOK = """\
set -eu
rm -rf "$1"/etc/ssh/ssh_host_* "$1"/etc/systemd "$1"/usr/lib/systemd "$1"/usr/lib/python3.11/lib2to3 \
  "$1"/usr/lib/python3.11/pydoc_data "$1"/var/lib/apt "$1"/var/cache/* "$1"/var/log/* "$1"/etc/machine-id
chroot "$1" passwd --quiet --delete root
chroot "$1" python3 -m compileall -q -f -j 2 --invalidation-mode unchecked-hash /usr/lib/python3.11 /usr/lib/python3
"""

#: Never unpacked into the base tree.
EXCLUDED = (
    "/usr/share/doc/*", "/usr/share/info/*", "/usr/share/lintian/*", "/usr/share/locale/*", "/usr/share/man/*",
    "/usr/lib/x86_64-linux-gnu/gconv/*",
)  # fmt: skip

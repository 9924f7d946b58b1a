/* SPDX-License-Identifier: GPL-2.0 */
/* What programs and idc_example.c share: the requests of /dev/ivshmem0, /dev/ivshmem1, ... */
#ifndef IDC_EXAMPLE_H
#define IDC_EXAMPLE_H
#include <linux/ioctl.h>
#include <linux/types.h>

struct idc_example_info {
	__u32 id;      /* this member's id: what the others ring is (id, vector) */
	__u32 vectors; /* own vectors; 0 for a read-only member, which neither rings nor is rung */
	__u64 size;    /* bytes of the region */
};

#define IDC_EXAMPLE_INFO _IOR('I', 0, struct idc_example_info)
/* Ring: peer << 16 | vector, as in QEMU's doorbell register. Who is not there is not told about it. */
#define IDC_EXAMPLE_RING _IO('I', 1)
/* Takes the number of a vector; returns how often it was rung since the last time. */
#define IDC_EXAMPLE_TAKE _IO('I', 2)

#endif

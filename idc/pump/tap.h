/* The shape of a network device: packets between a TAP interface with vnet headers and the peer's, one copy each way.
 *
 * Everything between the two "cdef" marks is also what idc/core/build.py shows to cffi.
 */
#ifndef IDC_TAP_H
#define IDC_TAP_H
#include "pump.h"

/* cdef begin */

/* As linux/virtio_net.h has it, in the byte order of this machine, which is little-endian. */
struct idc_vnet {
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset;
};

/* Parameters of a request: one packet. Its bytes follow (place is IDC_TAP_INLINE), or lie at `place` of the region. */
struct idc_packet {
    uint64_t place;
    uint32_t len;            /* of the packet, from its Ethernet header on */
    uint16_t flags;          /* IDC_TAP_CALM: its sender needs no doorbell for the answer */
    struct idc_vnet vnet;
};
enum {
    IDC_TAP_CALM = 1,
    IDC_TAP_LEAST = 14,      /* an Ethernet header */
    IDC_TAP_LONGEST = 65553, /* 65535 bytes of IP behind an Ethernet header with a VLAN tag */
    IDC_TAP_PACKET = 24,     /* bytes of struct idc_packet as it is sent: packed */
};
/* Why a packet is refused; texts by idc_tap_reason. */
enum idc_tap_fault {
    IDC_TAP_FINE = 0, IDC_TAP_SHORT = 1, IDC_TAP_LENGTH = 2, IDC_TAP_PLACE = 3, IDC_TAP_FLAGS = 4, IDC_TAP_GSO = 5,
    IDC_TAP_CSUM = 6, IDC_TAP_HEADERS = 7,
};

struct idc_tap_counters {
    uint64_t sent, sent_bytes, sent_gso;         /* from the interface to the peer */
    uint64_t received, received_bytes, received_gso;
    uint64_t sent_longest, received_longest;     /* bytes of a packet */
    uint64_t refused;                            /* packets of the peer's that the kernel did not take: dropped */
    uint64_t stale;                              /* that were waiting when a connection began: dropped */
    uint64_t stalls;                             /* times that no buffer or slot was free */
};

/* One queue. Buffers are numbered; which are free is in private memory. */
struct idc_tap {
    int32_t fd;                                  /* non-blocking, IFF_VNET_HDR with headers of 10 bytes */
    uint32_t count, stride;                      /* of my buffers, and bytes from one to the next */
    uint8_t *region;                             /* its start, and bytes of it */
    uint64_t region_bytes;
    uint64_t mine, theirs, theirs_bytes;         /* where my buffers are, and those of the peer may be */
    uint32_t *next;                              /* `count` elements: the list of free buffers */
    uint32_t free, used;
    uint32_t inline_bytes;                       /* longest packet that goes in the request itself */
    int32_t refused_with;                        /* errno of the last one refused */
    struct idc_tap_counters count_of;
};

/* Fills in the pump's functions, context and descriptors. The engine's handler is idc_tap_handle, its context the pump. */
void idc_tap_attach(struct idc_tap *tap, struct idc_pump *pump);
/* A connection begins: all buffers are free, and what the interface had queued before is thrown away. IDC_OK or -errno. */
int idc_tap_begin(struct idc_tap *tap, struct idc_pump *pump);
int64_t idc_tap_handle(void *context, const void *parameters, uint64_t len, void *status, uint64_t room, uint16_t *error);
/* What is wrong with a request: enum idc_tap_fault. */
int idc_tap_judge(const struct idc_tap *tap, const void *parameters, uint64_t len);
const char *idc_tap_reason(int fault);

/* cdef end */
#endif

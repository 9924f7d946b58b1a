/* Packets between a TAP interface and the peer. What the peer says is judged in the private copy of its request: where
 * the packet is, how long, and all that its vnet header promises the kernel. The packet itself is copied once, by the
 * kernel, from the region; what the peer changes meanwhile is its own packet. May depend on inner.h, pump.h, readv(2). */
#include "inner.h"
#include "tap.h"

#include <errno.h>
#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

_Static_assert(sizeof(struct idc_vnet) == 10, "struct virtio_net_hdr has 10 bytes");
_Static_assert(sizeof(struct idc_packet) == IDC_TAP_PACKET, "a request's first part has no holes");

enum { NEEDS_CSUM = 1, DATA_VALID = 2, GSO_NONE = 0, GSO_TCPV4 = 1, GSO_TCPV6 = 4, GSO_ECN = 0x80 }; /* virtio_net.h */
enum { NO_BUFFER = 0xFFFFFFFF, AT_ONCE = 16, MOST_STALE = 1 << 14, SCRATCH = 1024 };

static uint8_t *buffer(const struct idc_tap *tap, uint32_t index)
{
    return tap->region + tap->mine + (uint64_t)index * tap->stride;
}

/* For observers, beside the counters that the driver shows. */
static void drop(const struct idc_pump *pump)
{
    if (pump->engine->trips != NULL)
        idc_dropped(pump->engine->trips, 1);
}

/* --- from the interface to the peer --- */

static ssize_t read_packet(const struct idc_tap *tap, uint32_t index, struct idc_vnet *vnet)
{
    struct iovec parts[2] = {{.iov_base = vnet, .iov_len = sizeof *vnet},
                             {.iov_base = buffer(tap, index), .iov_len = tap->stride}};
    ssize_t n;
    do
        n = readv(tap->fd, parts, 2);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

static int64_t send_packet(struct idc_tap *tap, struct idc_pump *pump, struct idc_packet packet)
{
    struct { struct idc_packet head; uint8_t bytes[SCRATCH]; } request;
    struct idc_engine *e = pump->engine;
    uint32_t index = tap->free;
    uint64_t len = sizeof packet, cookie = NO_BUFFER;
    bool calm = tap->used < tap->count / 2 && e->outstanding < e->most / 2;
    packet.flags = calm ? IDC_TAP_CALM : 0;
    if (packet.len <= tap->inline_bytes) {
        copy_bytes(request.bytes, buffer(tap, index), packet.len);
        len += packet.len;
        packet.place = 0;
    } else {
        packet.place = tap->mine + (uint64_t)index * tap->stride;
        cookie = index;
    }
    request.head = packet;
    int64_t rc = idc_engine_submit(e, &request, len, cookie);
    if (rc == IDC_OK && cookie == index) {
        tap->free = tap->next[index];
        tap->used++;
    }
    return rc;
}

static int64_t from_interface(struct idc_pump *pump, uint32_t which, uint32_t events)
{
    struct idc_tap *tap = pump->context;
    struct idc_engine *e = pump->engine;
    int64_t moved = 0;
    (void)events;
    while (moved < AT_ONCE) {
        if (tap->free == NO_BUFFER || e->outstanding >= e->most) {
            tap->count_of.stalls++;
            pump->fds[which].want = 0; /* until something comes back; meanwhile the interface queues, then drops */
            break;
        }
        struct idc_packet packet = {.place = 0};
        ssize_t n = read_packet(tap, tap->free, &packet.vnet);
        if (n == -EAGAIN)
            break;
        if (n < (ssize_t)sizeof packet.vnet + IDC_TAP_LEAST) {
            pump->error = n < 0 ? (int32_t)-n : EPROTO;
            return -1;
        }
        packet.len = (uint32_t)((size_t)n - sizeof packet.vnet);
        int64_t rc = send_packet(tap, pump, packet);
        if (rc == IDC_OK)
            rc = idc_pump_announce(pump);
        if (rc < 0) {
            pump->error = (int32_t)rc;
            return -1;
        }
        struct idc_tap_counters *count = &tap->count_of;
        count->sent++;
        count->sent_bytes += packet.len;
        count->sent_gso += packet.vnet.gso_type != GSO_NONE;
        count->sent_longest = packet.len > count->sent_longest ? packet.len : count->sent_longest;
        moved++;
    }
    pump->more |= moved == AT_ONCE;
    return moved;
}

static int answered(struct idc_pump *pump, const struct idc_event *event, const uint8_t *status)
{
    struct idc_tap *tap = pump->context;
    (void)status;
    if (event->cookie != NO_BUFFER) {
        tap->next[event->cookie] = tap->free;
        tap->free = (uint32_t)event->cookie;
        tap->used--;
    }
    pump->fds[0].want = POLLIN;
    return 0;
}

/* --- from the peer to the interface --- */

static int judge_header(const struct idc_vnet *v, uint32_t len)
{
    uint32_t type = v->gso_type & ~(uint32_t)GSO_ECN;
    if ((v->flags & ~(NEEDS_CSUM | DATA_VALID)) != 0)
        return IDC_TAP_FLAGS;
    if (type != GSO_NONE && type != GSO_TCPV4 && type != GSO_TCPV6)
        return IDC_TAP_GSO;
    if (v->gso_type != GSO_NONE && (type == GSO_NONE || (v->flags & NEEDS_CSUM) == 0 || v->gso_size == 0))
        return IDC_TAP_GSO;
    if ((v->flags & NEEDS_CSUM) != 0
        && (v->csum_start < IDC_TAP_LEAST || (uint32_t)v->csum_start + v->csum_offset + 2 > len))
        return IDC_TAP_CSUM;
    if (v->hdr_len > len || (v->hdr_len != 0 && v->hdr_len < IDC_TAP_LEAST))
        return IDC_TAP_HEADERS;
    return IDC_TAP_FINE;
}

static int judge(const struct idc_tap *tap, const struct idc_packet *packet, uint64_t len)
{
    uint64_t here = len - sizeof *packet, at = packet->place - tap->theirs;
    if (packet->len < IDC_TAP_LEAST || packet->len > IDC_TAP_LONGEST)
        return IDC_TAP_LENGTH;
    if (here != 0 ? packet->len != here || packet->place != 0
                  : packet->len > tap->theirs_bytes || at > tap->theirs_bytes - packet->len)
        return IDC_TAP_PLACE;
    return judge_header(&packet->vnet, packet->len);
}

int idc_tap_judge(const struct idc_tap *tap, const void *parameters, uint64_t len)
{
    struct idc_packet packet;
    if (len < sizeof packet)
        return IDC_TAP_SHORT;
    memcpy(&packet, parameters, sizeof packet);
    return judge(tap, &packet, len);
}

int64_t idc_tap_handle(void *context, const void *parameters, uint64_t len, void *status, uint64_t room, uint16_t *error)
{
    struct idc_pump *pump = context;
    struct idc_tap *tap = pump->context;
    struct idc_tap_counters *count = &tap->count_of;
    struct idc_packet packet;
    (void)status;
    (void)room;
    (void)error;
    if (len < sizeof packet)
        return IDC_AGAIN; /* Python finds the same fault, and has the words for it */
    memcpy(&packet, parameters, sizeof packet);
    if (judge(tap, &packet, len) != IDC_TAP_FINE)
        return IDC_AGAIN;
    /* Both are only read: writev(2) has no iovec for that. */
    void *bytes = len > sizeof packet ? (uint8_t *)(uintptr_t)parameters + sizeof packet : tap->region + packet.place;
    struct iovec parts[2] = {{.iov_base = &packet.vnet, .iov_len = sizeof packet.vnet},
                             {.iov_base = bytes, .iov_len = packet.len}};
    ssize_t n;
    do
        n = writev(tap->fd, parts, 2);
    while (n < 0 && errno == EINTR);
    if (n < 0) {
        count->refused++;
        tap->refused_with = errno;
        drop(pump);
    } else {
        count->received++;
        count->received_bytes += packet.len;
        count->received_gso += packet.vnet.gso_type != GSO_NONE;
        count->received_longest = packet.len > count->received_longest ? packet.len : count->received_longest;
    }
    if ((packet.flags & IDC_TAP_CALM) != 0)
        idc_pump_hush(pump);
    return 0;
}

const char *idc_tap_reason(int fault)
{
    static const char *const text[] = {
        "nothing", "shorter than the description of a packet", "a length that no packet has",
        "bytes outside of the sender's buffers", "flags that a packet cannot have",
        "segmentation that is unknown, or without size or checksum", "a checksum outside of the packet",
        "headers longer than the packet",
    };
    return fault >= IDC_TAP_FINE && fault <= IDC_TAP_HEADERS ? text[fault] : "unknown";
}

/* --- beginning --- */

void idc_tap_attach(struct idc_tap *tap, struct idc_pump *pump)
{
    pump->ready = from_interface;
    pump->done = answered;
    pump->context = tap;
    pump->lull = 1;
    pump->count = 1;
    pump->fds[0] = (struct idc_pump_fd){.fd = tap->fd, .want = POLLIN};
}

int idc_tap_begin(struct idc_tap *tap, struct idc_pump *pump)
{
    tap->free = NO_BUFFER;
    tap->used = 0;
    for (uint32_t i = tap->count; i-- > 0; tap->free = i)
        tap->next[i] = tap->free;
    pump->fds[0] = (struct idc_pump_fd){.fd = tap->fd, .want = POLLIN};
    for (uint32_t i = 0; i < MOST_STALE; i++) {
        struct idc_vnet ignored;
        ssize_t n = read_packet(tap, 0, &ignored);
        if (n < 0)
            return n == -EAGAIN ? IDC_OK : (int)n;
        tap->count_of.stale++;
        drop(pump);
    }
    return IDC_OK;
}

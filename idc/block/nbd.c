#include "nbd.h"

#include <endian.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PAGE = 4096, REQUEST_MAGIC = 0x25609513, REPLY_MAGIC = 0x67446698, REPLY_BYTES = 16, REPLIES_AT_ONCE = 32,
       BUDGET = 64, HANDLER_FAILED = 0xFFFF };
/* Of requests, from which on more are about to come; bytes that a Unix socket takes in one piece; and for which the only processor is
 * held at a time. */
enum { DEEP = 4, PIECE = 32 << 10, HELD_MOST = 1 << 20 };
/* Of the kernel's <linux/nbd.h>: the wire's numbers. */
enum { CMD_READ = 0, CMD_WRITE = 1, CMD_DISC = 2, CMD_FLUSH = 3, CMD_TRIM = 4, CMD_WRITE_ZEROES = 6, FLAG_FUA = 1 };

struct wire_request {
    uint32_t magic;
    uint16_t flags, type;
    uint8_t handle[8];
    uint64_t from;
    uint32_t length;
} __attribute__((packed));

struct wire_reply {
    uint32_t magic, error;
    uint8_t handle[8];
} __attribute__((packed));

/* --- slots and buffers --- */

static int64_t find_pages(struct idc_nbd *n, uint32_t pages)
{
    uint32_t run = 0, at = n->hint;
    for (uint32_t looked = 0; looked < n->part_pages + pages; looked++, at++) {
        if (at >= n->part_pages)
            at = run = 0;
        run = n->used[at] ? 0 : run + 1;
        if (run == pages) {
            n->hint = at + 1 < n->part_pages ? at + 1 : 0;
            return at + 1 - pages;
        }
    }
    return -1;
}

static struct idc_nbd_slot *take_slot(struct idc_nbd *n, uint32_t length)
{
    uint32_t pages = (length + PAGE - 1) / PAGE;
    if (n->free == 0)
        return NULL;
    int64_t page = pages > 0 ? find_pages(n, pages) : 0;
    if (page < 0)
        return NULL;
    struct idc_nbd_slot *slot = &n->slots[n->free - 1];
    n->free = slot->next;
    slot->page = (uint32_t)page;
    slot->pages = pages;
    slot->length = length;
    slot->error = slot->sent_before = slot->orphan = 0;
    slot->since = idc_now_ns();
    memset(n->used + page, 1, pages);
    n->outstanding++;
    return slot;
}

static uint32_t index_of(const struct idc_nbd *n, const struct idc_nbd_slot *slot)
{
    return (uint32_t)(slot - n->slots);
}

static void give_slot(struct idc_nbd *n, struct idc_nbd_slot *slot)
{
    memset(n->used + slot->page, 0, slot->pages);
    slot->state = IDC_NBD_FREE;
    slot->next = n->free;
    n->free = index_of(n, slot) + 1;
    n->outstanding--;
}

static uint8_t *buffer_of(const struct idc_nbd *n, const struct idc_nbd_slot *slot)
{
    return n->memory + n->part_at + (uint64_t)slot->page * PAGE;
}

/* --- to the kernel --- */

static void reply(struct idc_nbd *n, struct idc_nbd_slot *slot, uint32_t error)
{
    uint32_t s = index_of(n, slot) + 1;
    slot->state = IDC_NBD_REPLYING;
    slot->error = error;
    slot->next = 0;
    n->errors += error != 0;
    if (n->out_last != 0)
        n->slots[n->out_last - 1].next = s;
    else
        n->out_first = s;
    n->out_last = s;
}

static uint32_t reply_bytes(const struct idc_nbd_slot *slot)
{
    bool data = slot->request.op == IDC_BLOCK_READ && slot->error == 0;
    return REPLY_BYTES + (data ? slot->length : 0);
}

static void socket_ended(struct idc_nbd *n, uint32_t why)
{
    if (n->end == IDC_NBD_STANDS)
        n->end = why;
}

/* Sends replies, as many as one call takes. 0: nothing was sent. */
static int64_t send_some(struct idc_nbd *n)
{
    struct wire_reply heads[REPLIES_AT_ONCE];
    struct iovec parts[2 * REPLIES_AT_ONCE];
    struct msghdr message = {.msg_iov = parts};
    uint32_t skip = n->out_done, count = 0;
    for (uint32_t s = n->out_first; s != 0 && count < REPLIES_AT_ONCE; s = n->slots[s - 1].next, count++) {
        struct idc_nbd_slot *slot = &n->slots[s - 1];
        heads[count].magic = htobe32(REPLY_MAGIC);
        heads[count].error = htobe32(slot->error);
        memcpy(heads[count].handle, &slot->handle, sizeof heads[count].handle);
        struct iovec both[2] = {{&heads[count], REPLY_BYTES}, {buffer_of(n, slot), reply_bytes(slot) - REPLY_BYTES}};
        for (int p = 0; p < 2; p++) {
            uint32_t over = skip < both[p].iov_len ? skip : (uint32_t)both[p].iov_len;
            skip -= over;
            if (both[p].iov_len > over)
                parts[message.msg_iovlen++] = (struct iovec){(uint8_t *)both[p].iov_base + over,
                                                             both[p].iov_len - over};
        }
    }
    if (count == 0)
        return 0;
    ssize_t sent = sendmsg(n->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
    if (sent < 0) {
        if (errno != EAGAIN && errno != EINTR)
            socket_ended(n, IDC_NBD_CLOSED);
        return 0;
    }
    n->bytes_out += (uint64_t)sent;
    uint64_t done = n->out_done + (uint64_t)sent;
    while (n->out_first != 0 && done >= reply_bytes(&n->slots[n->out_first - 1])) {
        struct idc_nbd_slot *slot = &n->slots[n->out_first - 1];
        done -= reply_bytes(slot);
        n->out_first = slot->next;
        if (n->out_first == 0)
            n->out_last = 0;
        give_slot(n, slot);
        n->wants_room = 0; /* there may be some now */
    }
    n->out_done = (uint32_t)done;
    return sent;
}

/* --- to the back end --- */

static void wait_for_engine(struct idc_nbd *n, struct idc_nbd_slot *slot)
{
    slot->state = IDC_NBD_READY;
    slot->next = n->waiting;
    n->waiting = index_of(n, slot) + 1;
}

/* By the pump's thread alone: so nobody else may find the queue ready to go. */
static bool submit(struct idc_nbd *n, struct idc_nbd_slot *slot)
{
    if (!n->up || !n->go
        || idc_engine_submit(n->pump->engine, &slot->request, sizeof slot->request, index_of(n, slot)) != IDC_OK)
        return false; /* no slot of the engine, or a connection that is over, of which Python hears in its own time */
    n->replayed += slot->sent_before != 0;
    slot->state = IDC_NBD_SENT;
    return true;
}

static void ready(struct idc_nbd *n, struct idc_nbd_slot *slot)
{
    if (n->failing)
        reply(n, slot, (uint32_t)n->failing);
    else if (n->waiting != 0 || !submit(n, slot))
        wait_for_engine(n, slot);
}

static int64_t submit_waiting(struct idc_nbd *n)
{
    int64_t done = 0;
    while (n->waiting != 0 && n->go) {
        struct idc_nbd_slot *slot = &n->slots[n->waiting - 1];
        if (!submit(n, slot))
            break;
        n->waiting = slot->next;
        done++;
    }
    return done;
}

static void complete(struct idc_nbd *n, uint64_t cookie, bool known, uint32_t error)
{
    if (cookie >= IDC_NBD_SLOTS || n->slots[cookie].state != IDC_NBD_SENT)
        return; /* that cannot be */
    struct idc_nbd_slot *slot = &n->slots[cookie];
    if (slot->orphan) {
        give_slot(n, slot);
        n->wants_room = 0;
    } else if (known) {
        reply(n, slot, error);
    } else {
        slot->sent_before++;
        wait_for_engine(n, slot);
    }
}

/* --- from the kernel --- */

static uint64_t from_socket(struct idc_nbd *n, void *into, uint64_t len)
{
    ssize_t got = n->drained ? 0 : recv(n->fd, into, len, MSG_DONTWAIT);
    if (n->drained || (got < 0 && (errno == EAGAIN || errno == EINTR)))
        return 0;
    if (got <= 0)
        socket_ended(n, IDC_NBD_CLOSED);
    n->drained = got < (ssize_t)len; /* whatever comes later, poll(2) tells */
    return got > 0 ? (uint64_t)got : 0;
}

/* Bytes got; 0: none now, or the socket has ended. What is short is read with what lies behind it: each call on the socket
 * also wakes the kernel's receiver, for nothing, which costs more than the call. */
static uint64_t receive(struct idc_nbd *n, void *into, uint64_t len)
{
    uint64_t got;
    if (n->staged == 0 && len < sizeof n->stage) {
        n->stage_at = 0;
        n->staged = (uint32_t)from_socket(n, n->stage, sizeof n->stage);
    }
    if (n->staged > 0) {
        got = n->staged < len ? n->staged : len;
        memcpy(into, n->stage + n->stage_at, got);
        n->stage_at += (uint32_t)got;
        n->staged -= (uint32_t)got;
    } else {
        got = len < sizeof n->stage ? 0 : from_socket(n, into, len);
    }
    n->bytes_in += got;
    return got;
}

/* What a header asks for. False: no room for it now. */
static bool begin(struct idc_nbd *n)
{
    static const uint8_t ops[] = {[CMD_READ] = IDC_BLOCK_READ, [CMD_WRITE] = IDC_BLOCK_WRITE,
                                  [CMD_FLUSH] = IDC_BLOCK_FLUSH, [CMD_TRIM] = IDC_BLOCK_TRIM,
                                  [CMD_WRITE_ZEROES] = IDC_BLOCK_ZEROES};
    struct wire_request wire;
    memcpy(&wire, n->header, sizeof wire);
    uint32_t type = be16toh(wire.type), flags = be16toh(wire.flags), length = be32toh(wire.length);
    if (be32toh(wire.magic) != REQUEST_MAGIC) {
        socket_ended(n, IDC_NBD_MALFORMED);
        return false;
    }
    if (type == CMD_DISC) {
        socket_ended(n, IDC_NBD_DISCONNECTED);
        return false;
    }
    uint8_t op = type < sizeof ops ? ops[type] : 0;
    bool data = op == IDC_BLOCK_READ || op == IDC_BLOCK_WRITE;
    bool wrong = op == 0 || (data && (length > n->longest || length == 0));
    struct idc_nbd_slot *slot = take_slot(n, data && !wrong ? length : 0);
    if (slot == NULL) {
        n->stalls += n->wants_room == 0;
        n->wants_room = 1;
        return false;
    }
    n->requests++;
    n->got = 0;
    n->writes_much = op == IDC_BLOCK_WRITE && length > PIECE;
    memcpy(&slot->handle, wire.handle, sizeof slot->handle);
    slot->request = (struct idc_block_request){.op = op, .flags = flags & FLAG_FUA && op != IDC_BLOCK_READ
                                                                  && op != IDC_BLOCK_FLUSH ? IDC_BLOCK_FUA : 0};
    if (op != IDC_BLOCK_FLUSH) {
        slot->request.offset = be64toh(wire.from);
        slot->request.length = length;
    }
    if (slot->pages > 0)
        slot->request.buffer = n->part_at + (uint64_t)slot->page * PAGE;
    if (wrong) {
        n->skip = type == CMD_WRITE ? length : 0;
        reply(n, slot, EINVAL);
    } else if (op == IDC_BLOCK_WRITE) {
        slot->state = IDC_NBD_FILLING;
        n->filling = index_of(n, slot) + 1;
        n->filled = 0;
    } else {
        ready(n, slot);
    }
    return true;
}

/* One step. 0: nothing to be had now. */
static uint64_t read_some(struct idc_nbd *n)
{
    uint8_t nowhere[PAGE];
    if (n->skip > 0) {
        uint64_t got = receive(n, nowhere, n->skip < sizeof nowhere ? n->skip : sizeof nowhere);
        n->skip -= got;
        return got;
    }
    if (n->filling != 0) {
        struct idc_nbd_slot *slot = &n->slots[n->filling - 1];
        uint64_t got = receive(n, buffer_of(n, slot) + n->filled, slot->length - n->filled);
        n->filled += got;
        if (n->filled == slot->length) {
            n->filling = 0;
            ready(n, slot);
        }
        return got;
    }
    uint64_t got = n->got < sizeof n->header ? receive(n, n->header + n->got, sizeof n->header - n->got) : 0;
    n->got += (uint32_t)got;
    if (n->got < sizeof n->header)
        return got;
    return begin(n) ? sizeof n->header : 0;
}

/* So much has gone either way while the only processor was held: whoever waits for it has a moment. */
static void breathe(struct idc_nbd *n, uint64_t moved)
{
    n->held += moved;
    if (n->held < HELD_MOST)
        return;
    n->held = 0;
    if (n->holding) {
        idc_pump_let_go(n->pump);
        idc_pump_hold(n->pump);
    }
}

static int64_t send_all(struct idc_nbd *n)
{
    int64_t done = 0, sent;
    while (n->end == IDC_NBD_STANDS && n->out_first != 0 && (sent = send_some(n)) > 0) {
        breathe(n, (uint64_t)sent);
        done++;
    }
    return done;
}

static int64_t work(struct idc_nbd *n)
{
    int64_t done = send_all(n); /* first: somebody waits for it */
    done += submit_waiting(n);
    n->drained = 0;
    uint64_t got;
    for (int turn = 0; turn < BUDGET && n->end == IDC_NBD_STANDS && !n->wants_room && (got = read_some(n)) > 0; turn++) {
        breathe(n, got);
        done++;
    }
    return done + send_all(n);
}

/* What the pump is to look for. A header that found no room is not in the socket any more, so it asks to be called. */
static void set_wants(struct idc_nbd *n)
{
    struct idc_pump_fd *fd = &n->pump->fds[0];
    bool stands = n->fd >= 0 && n->end == IDC_NBD_STANDS;
    fd->fd = n->fd;
    fd->want = !stands ? 0 : (n->wants_room ? 0 : POLLIN) | (n->out_first != 0 ? POLLOUT : 0);
}

/* Whether something is to be done that poll(2) does not tell of. */
static bool goes_on(const struct idc_nbd *n)
{
    bool read = n->staged > 0 || n->got == sizeof n->header; /* nothing of it is in the socket any more */
    return n->fd >= 0 && n->end == IDC_NBD_STANDS && read && !n->wants_room;
}

/* --- what its pump calls --- */

static void lock(const struct idc_nbd *n)
{
    pthread_mutex_lock(n->lock);
}

static void unlock(const struct idc_nbd *n)
{
    pthread_mutex_unlock(n->lock);
}

enum { SOCKET = 0, KICK = 1 };

/* Whether several pieces go either way at once, each of which wakes the kernel's receiver: also one that is read, since the room that
 * it leaves is told on the same queue. */
static bool lengthy(const struct idc_nbd *n)
{
    uint64_t owed = 0;
    int there = 0;
    for (uint32_t s = n->out_first; s != 0 && owed <= PIECE; s = n->slots[s - 1].next)
        owed += reply_bytes(&n->slots[s - 1]);
    return owed > PIECE || (n->pump->gathers && ioctl(n->fd, FIONREAD, &there) == 0 && there > PIECE);
}

/* A program that keeps many requests under way, or writes much, is best left to finish what it is at. A single request is worth
 * interrupting it. */
static void foresee(const struct idc_nbd *n, uint64_t came)
{
    if (n->outstanding >= DEEP || n->writes_much)
        idc_pump_gather(n->pump, 1);
    else if (came == 1 && n->outstanding <= 1)
        idc_pump_gather(n->pump, 0);
}

/* The processor is held for HELD_MOST bytes at a time, or a request more. */
static int64_t exchange(struct idc_nbd *n)
{
    uint64_t before = n->requests;
    n->held = 0;
    n->holding = lengthy(n);
    if (n->holding)
        idc_pump_hold(n->pump);
    int64_t done = work(n);
    idc_pump_let_go(n->pump);
    foresee(n, n->requests - before);
    return done;
}

static int64_t from_kernel(struct idc_pump *pump, uint32_t index, uint32_t events)
{
    struct idc_nbd *n = pump->context;
    uint64_t count;
    if (index == KICK && (events == 0 || read(n->kick_fd, &count, sizeof count) < 0))
        return 0;
    lock(n);
    int64_t done = n->fd >= 0 && n->end == IDC_NBD_STANDS ? exchange(n) : submit_waiting(n);
    set_wants(n);
    pump->more |= goes_on(n);
    unlock(n);
    return done;
}

static int answered(struct idc_pump *pump, const struct idc_event *event, const uint8_t *status)
{
    struct idc_nbd *n = pump->context;
    (void)status;
    lock(n);
    complete(n, event->cookie, true, event->error == HANDLER_FAILED ? EIO : event->error);
    set_wants(n);
    unlock(n);
    return 0;
}

/* --- what everybody calls --- */

int idc_nbd_start(struct idc_nbd *n, struct idc_pump *pump)
{
    if (n->lock == NULL) {
        n->lock = malloc(sizeof(pthread_mutex_t));
        if (n->lock == NULL)
            return ENOMEM;
        pthread_mutex_init(n->lock, NULL);
        n->fd = -1;
        for (uint32_t s = IDC_NBD_SLOTS; s > 0; s--) {
            n->slots[s - 1].next = n->free;
            n->free = s;
        }
    }
    n->pump = pump;
    pump->ready = from_kernel;
    pump->done = answered;
    pump->context = n;
    pump->count = 2;
    pump->fds[KICK] = (struct idc_pump_fd){.fd = n->kick_fd, .want = POLLIN};
    set_wants(n);
    return 0;
}

void idc_nbd_stop(struct idc_nbd *n)
{
    if (n->lock != NULL)
        pthread_mutex_destroy(n->lock);
    free(n->lock);
    n->lock = NULL;
}

static void kick(const struct idc_nbd *n)
{
    uint64_t one = 1;
    ssize_t rc = write(n->kick_fd, &one, sizeof one);
    (void)rc; /* EAGAIN: it is kicked already */
}

void idc_nbd_open(struct idc_nbd *n, int fd)
{
    lock(n);
    n->fd = fd;
    n->end = IDC_NBD_STANDS;
    n->waiting = n->out_first = n->out_last = n->out_done = n->wants_room = n->got = n->filling = 0;
    n->skip = n->staged = 0;
    for (uint32_t s = 0; s < IDC_NBD_SLOTS; s++) {
        struct idc_nbd_slot *slot = &n->slots[s];
        if (slot->state == IDC_NBD_SENT)
            slot->orphan = 1;
        else if (slot->state != IDC_NBD_FREE)
            give_slot(n, slot);
    }
    unlock(n);
    kick(n);
}

void idc_nbd_up(struct idc_nbd *n, int up)
{
    lock(n);
    n->up = up != 0;
    n->go = 0;
    set_wants(n);
    unlock(n);
}

void idc_nbd_go(struct idc_nbd *n)
{
    lock(n);
    n->failing = 0;
    n->go = n->up;
    unlock(n);
    kick(n);
}

int64_t idc_nbd_fail(struct idc_nbd *n, uint32_t error)
{
    int64_t done = 0;
    lock(n);
    if (!n->go) {
        n->failing = (int32_t)error;
        while (n->waiting != 0) {
            struct idc_nbd_slot *slot = &n->slots[n->waiting - 1];
            n->waiting = slot->next;
            reply(n, slot, error);
        }
        do
            done += n->fd >= 0 && n->end == IDC_NBD_STANDS ? work(n) : 0;
        while (goes_on(n));
    }
    unlock(n);
    return done;
}

void idc_nbd_complete(struct idc_nbd *n, uint64_t cookie, int known, uint32_t error)
{
    lock(n);
    complete(n, cookie, known != 0, error);
    unlock(n);
}

uint64_t idc_nbd_oldest(const struct idc_nbd *n)
{
    uint64_t oldest = 0;
    lock(n);
    for (uint32_t s = 0; s < IDC_NBD_SLOTS; s++) {
        const struct idc_nbd_slot *slot = &n->slots[s];
        bool open = (slot->state == IDC_NBD_READY || slot->state == IDC_NBD_SENT) && !slot->orphan;
        if (open && (oldest == 0 || slot->since < oldest))
            oldest = slot->since;
    }
    unlock(n);
    return oldest;
}

int idc_nbd_settle(void)
{
    if (mlockall(MCL_CURRENT) < 0 || mlockall(MCL_FUTURE | MCL_ONFAULT) < 0)
        return errno;
#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif
    return prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) < 0 ? errno : 0;
}

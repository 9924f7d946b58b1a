/* Frames over a stream socket. Lengths are a peer's and believed only within bounds; memory for a long body is its user's, of
 * the length that was announced. May depend on idc_core.h and the system's headers. */
#include "wire.h"

#include <errno.h>
#include <poll.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

enum {
    LENGTH = IDC_WIRE_LENGTH,
    AHEAD = IDC_WIRE_LEAST,  /* bytes read behind a long body: of the next one, what is read here is copied once more */
    PIECES = 64,             /* of memory given to the kernel at a time; it takes 1024 */
    LEAST_SLEEP_NS = 20000000, /* shorter ones are poll(2)'s: a read's own time-out is counted in ticks of the kernel */
};
_Static_assert(IDC_WIRE_LEAST == LENGTH + IDC_WIRE_LONG, "any short frame has room");

/* -- to the kernel */

/* Room for `more` bytes behind `end`, which may move: what was sent is overwritten first. */
static void *room_for(void *base, uint64_t size, uint64_t *room, uint64_t *begin, uint64_t *end, uint64_t more)
{
    if (*begin == *end)
        *begin = *end = 0;
    if (*room - *end >= more)
        return base;
    if (*begin >= (*end - *begin) + more) { /* so that what is moved was paid for by what was sent */
        memmove(base, (uint8_t *)base + *begin * size, (*end - *begin) * size);
        *end -= *begin;
        *begin = 0;
        return base;
    }
    uint64_t wanted = 2 * (*end + more);
    void *moved = realloc(base, wanted * size);
    if (moved != NULL)
        *room = wanted;
    return moved;
}

int idc_wire_post(struct idc_wire *w, const void *head, uint64_t head_len, const void *body, uint64_t body_len)
{
    if (w->ended == IDC_PEER || w->error != 0)
        return IDC_PEER;
    if (w->unsent + head_len + body_len > w->most)
        return IDC_AGAIN;
    uint64_t beside = body_len >= IDC_WIRE_LONG ? body_len : 0, bytes = LENGTH + head_len + body_len - beside;
    uint64_t before = w->out_begin, moved;
    void *out = room_for(w->out, 1, &w->out_room, &w->out_begin, &w->out_end, bytes);
    moved = before - w->out_begin; /* also where there was no memory */
    for (uint64_t i = w->bodies_begin; moved != 0 && i < w->bodies_end; i++)
        w->bodies[i].mark -= moved;
    if (out == NULL)
        return IDC_EINVAL;
    w->out = out;
    if (beside != 0) {
        void *bodies = room_for(w->bodies, sizeof *w->bodies, &w->bodies_room, &w->bodies_begin, &w->bodies_end, 1);
        if (bodies == NULL)
            return IDC_EINVAL;
        w->bodies = bodies;
    }
    uint32_t length = (uint32_t)(head_len + body_len);
    uint8_t *at = w->out + w->out_end;
    memcpy(at, &length, LENGTH);
    memcpy(at + LENGTH, head, head_len);
    if (body_len > beside)
        memcpy(at + LENGTH + head_len, body, body_len);
    w->out_end += bytes;
    if (beside != 0) {
        w->bodies[w->bodies_end++] = (struct idc_wire_body){.base = body, .len = beside, .mark = w->out_end};
        w->lent++;
    }
    w->unsent += bytes + beside;
    return IDC_OK;
}

static size_t gather(const struct idc_wire *w, struct iovec *pieces)
{
    size_t n = 0;
    uint64_t at = w->out_begin, next = w->bodies_begin;
    while (n < PIECES && (at < w->out_end || next < w->bodies_end)) {
        uint64_t until = next < w->bodies_end ? w->bodies[next].mark : w->out_end;
        if (at < until) {
            pieces[n++] = (struct iovec){.iov_base = w->out + at, .iov_len = until - at};
            at = until;
        } else {
            pieces[n++] = (struct iovec){.iov_base = (void *)(uintptr_t)w->bodies[next].base,
                                         .iov_len = w->bodies[next].len};
            next++;
        }
    }
    return n;
}

/* So many bytes are with the kernel. */
static void forget(struct idc_wire *w, uint64_t sent)
{
    w->unsent -= sent;
    while (sent > 0) {
        struct idc_wire_body *body = w->bodies_begin < w->bodies_end ? &w->bodies[w->bodies_begin] : NULL;
        uint64_t until = body != NULL ? body->mark : w->out_end, n = until - w->out_begin;
        n = n < sent ? n : sent;
        w->out_begin += n;
        sent -= n;
        if (body == NULL || w->out_begin < until)
            continue;
        n = body->len < sent ? body->len : sent;
        body->base += n;
        body->len -= n;
        sent -= n;
        w->bodies_begin += body->len == 0;
        w->returned += body->len == 0;
    }
}

/* IDC_OK, IDC_AGAIN, IDC_PEER. */
static int push(struct idc_wire *w)
{
    while (w->unsent > 0 && w->error == 0 && w->ended != IDC_PEER) {
        struct iovec pieces[PIECES];
        struct msghdr message = {.msg_iov = pieces, .msg_iovlen = gather(w, pieces)};
        ssize_t sent = sendmsg(w->fd, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (sent >= 0)
            forget(w, (uint64_t)sent);
        else if (errno == EAGAIN)
            return IDC_AGAIN;
        else if (errno != EINTR)
            w->error = errno; /* what had arrived before is still to be taken, and then the end is met */
    }
    return w->error != 0 || w->ended == IDC_PEER ? IDC_PEER : IDC_OK;
}

/* What there is of `events`, 0 after ns, or IDC_INTR. */
static int look(const struct idc_wire *w, short events, int64_t ns)
{
    struct pollfd p = {.fd = w->fd, .events = events, .revents = 0};
    struct timespec t = {.tv_sec = ns / 1000000000, .tv_nsec = ns % 1000000000};
    return ppoll(&p, 1, ns < 0 ? NULL : &t, NULL) < 0 ? IDC_INTR : p.revents;
}

/* Waits for room, timeout_ns at most, and until there is any of `also`. */
static int flush(struct idc_wire *w, int64_t timeout_ns, short also)
{
    uint64_t start = 0;
    int rc;
    while ((rc = push(w)) == IDC_AGAIN && timeout_ns > 0) {
        uint64_t now = idc_now_ns();
        start = start != 0 ? start : now;
        int64_t left = timeout_ns - (int64_t)(now - start);
        int ready = left > 0 ? look(w, (short)(POLLOUT | also), left) : 0;
        if (ready <= 0 || !(ready & ~also))
            return ready < 0 ? ready : IDC_AGAIN;
    }
    return rc;
}

int idc_wire_flush(struct idc_wire *w, int64_t timeout_ns)
{
    return flush(w, timeout_ns, 0);
}

int idc_wire_send(struct idc_wire *w, const void *head, uint64_t head_len, const void *body, uint64_t body_len)
{
    return idc_wire_send_within(w, head, head_len, body, body_len, 0);
}

int idc_wire_send_within(struct idc_wire *w, const void *head, uint64_t head_len, const void *body, uint64_t body_len,
                         int64_t timeout_ns)
{
    int rc = idc_wire_post(w, head, head_len, body, body_len);
    if (rc == IDC_OK)
        flush(w, timeout_ns, POLLIN); /* a connection that breaks in here is found so by the next call: the frame may have arrived */
    return rc;
}

/* -- from the kernel */

/* Whether there is one more short frame; or `want`, or `ended`, is set. */
static bool next(struct idc_wire *w, uint32_t *len)
{
    uint64_t there = w->end - w->begin;
    const uint8_t *at = w->in + w->begin;
    if (w->body != NULL || w->want != 0 || there < LENGTH)
        return false;
    memcpy(len, at, LENGTH);
    if (*len > w->longest) {
        w->ended = IDC_TOOBIG;
        w->bad = *len;
        return false;
    }
    if (*len >= IDC_WIRE_LONG) {
        if (there < LENGTH + IDC_WIRE_HEAD)
            return false;
        memcpy(w->coming, at + LENGTH, IDC_WIRE_HEAD);
        w->begin += LENGTH + IDC_WIRE_HEAD;
        w->want = *len - IDC_WIRE_HEAD;
        return false;
    }
    if (there - LENGTH < *len)
        return false;
    w->begin += LENGTH + *len;
    return true;
}

void idc_wire_into(struct idc_wire *w, void *body)
{
    uint64_t there = w->end - w->begin;
    w->body = body;
    w->body_len = w->want;
    w->body_got = there < w->want ? there : w->want;
    w->want = 0;
    memcpy(w->body, w->in + w->begin, w->body_got);
    w->begin += w->body_got;
}

int idc_wire_coming(const struct idc_wire *w)
{
    return w->body != NULL || w->want != 0 || w->begin != w->end;
}

int idc_wire_ready(const struct idc_wire *w)
{
    uint64_t there = w->end - w->begin;
    uint32_t len;
    if (w->ended != IDC_OK || w->error != 0 || w->want != 0)
        return 1;
    if (w->body != NULL)
        return w->body_got == w->body_len;
    if (there < LENGTH)
        return 0;
    memcpy(&len, w->in + w->begin, LENGTH);
    return len > w->longest || there - LENGTH >= (len < IDC_WIRE_LONG ? len : IDC_WIRE_HEAD);
}

/* What is whole already. */
static uint32_t whole(struct idc_wire *w, uint32_t *lens, uint32_t n)
{
    uint32_t got = 0;
    w->apart = w->body != NULL && w->body_got == w->body_len;
    if (w->apart) {
        memcpy(w->head, w->coming, IDC_WIRE_HEAD);
        w->body = NULL;
    }
    w->first = w->begin + LENGTH;
    while (got + w->apart < n && w->ended == IDC_OK && next(w, &lens[got]))
        got++;
    return got + w->apart;
}

/* One read. IDC_OK, IDC_AGAIN, IDC_INTR, IDC_PEER. */
static int pull(struct idc_wire *w, int flags)
{
    struct iovec pieces[2];
    struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 0};
    uint64_t rest = w->body != NULL ? w->body_len - w->body_got : 0;
    if (w->begin > 0) { /* at most the beginning of a short frame, or of a long one's head */
        memmove(w->in, w->in + w->begin, w->end - w->begin);
        w->end -= w->begin;
        w->begin = 0;
    }
    if (rest > 0)
        pieces[message.msg_iovlen++] = (struct iovec){.iov_base = w->body + w->body_got, .iov_len = rest};
    uint64_t room = rest > 0 ? AHEAD : w->room - w->end;
    room = room < w->ahead ? room : w->ahead;
    if (room > 0)
        pieces[message.msg_iovlen++] = (struct iovec){.iov_base = w->in + w->end, .iov_len = room};
    ssize_t got = recvmsg(w->fd, &message, flags);
    if (got > 0) {
        uint64_t n = (uint64_t)got < rest ? (uint64_t)got : rest;
        w->body_got += n;
        w->end += (uint64_t)got - n;
        return IDC_OK;
    }
    if (got < 0 && (errno == EAGAIN || errno == EINTR))
        return errno == EAGAIN ? IDC_AGAIN : IDC_INTR;
    if (got < 0 && w->error == 0)
        w->error = errno;
    w->ended = IDC_PEER;
    return IDC_PEER;
}

/* Waits in the read itself: one call of the kernel where poll(2) would be two. */
static int pull_within(struct idc_wire *w, int64_t ns)
{
    /* A read that gives up early is as good, so a time-out that shrinks is told to the kernel only now and then. */
    if (w->patience == 0 || w->patience > ns || w->patience < ns / 2) {
        struct timeval t = {.tv_sec = ns / 1000000000, .tv_usec = ns % 1000000000 / 1000};
        if (setsockopt(w->fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t) < 0)
            return IDC_EINVAL;
        w->patience = ns;
    }
    return pull(w, 0);
}

struct patience {
    int64_t timeout_ns;
    uint64_t start;
    bool waited;
};

/* Waits for something to come, or to go. IDC_OK: look again, at `ended` too; IDC_AGAIN, IDC_TIMEOUT, IDC_INTR, IDC_EINVAL. */
static int await(struct idc_wire *w, struct patience *p)
{
    int rc = IDC_AGAIN;
    bool waited = p->waited;
    p->waited = true;
    if (w->unsent > 0 && idc_wire_coming(w)) /* who sends it needs no answer before that */
        rc = pull(w, MSG_DONTWAIT);
    if (rc != IDC_AGAIN && rc != IDC_PEER)
        return rc == IDC_INTR ? rc : IDC_OK;
    rc = w->unsent > 0 ? push(w) : w->error != 0 ? IDC_PEER : IDC_OK;
    int64_t left = p->timeout_ns;
    if (waited && left > 0) {
        uint64_t now = idc_now_ns();
        p->start = p->start != 0 ? p->start : now; /* the first piece costs no clock: a frame that comes in many has time */
        left -= (int64_t)(now - p->start);
    }
    if (rc == IDC_PEER || left <= 0) {
        int broken = rc;
        rc = pull(w, MSG_DONTWAIT);
        if (rc == IDC_AGAIN && broken == IDC_PEER)
            w->ended = IDC_PEER;
        else if (rc == IDC_AGAIN)
            return p->timeout_ns > 0 ? IDC_TIMEOUT : IDC_AGAIN;
    } else if (rc == IDC_OK && left >= LEAST_SLEEP_NS) {
        rc = pull_within(w, left);
        if (rc == IDC_AGAIN)
            return IDC_TIMEOUT;
    } else { /* more goes out as the peer reads, or it is for a short time */
        int ready = look(w, rc == IDC_OK ? POLLIN : POLLIN | POLLOUT, left);
        if (ready <= 0)
            return ready == 0 ? IDC_TIMEOUT : ready;
        rc = ready & ~POLLOUT ? pull(w, MSG_DONTWAIT) : IDC_OK;
    }
    return rc == IDC_INTR || rc == IDC_EINVAL ? rc : IDC_OK;
}

int64_t idc_wire_take(struct idc_wire *w, uint32_t *lens, uint32_t n, int64_t timeout_ns)
{
    struct patience p = {.timeout_ns = timeout_ns};
    w->ahead = w->room;
    for (;;) {
        uint32_t got = whole(w, lens, n);
        if (got > 0 || w->want != 0)
            return got;
        if (w->ended != IDC_OK)
            return w->ended;
        int rc = await(w, &p);
        if (rc != IDC_OK)
            return rc;
    }
}

int idc_wire_more(struct idc_wire *w, uint64_t least, uint64_t ahead, int64_t timeout_ns)
{
    struct patience p = {.timeout_ns = timeout_ns};
    int rc = IDC_OK;
    w->ahead = least + ahead;
    while (rc == IDC_OK && w->end - w->begin < least)
        rc = w->ended != IDC_OK ? w->ended : await(w, &p);
    return rc;
}

int64_t idc_wire_read(struct idc_wire *w, void *into, uint64_t len, int32_t all, uint64_t ahead, int64_t timeout_ns)
{
    struct patience p = {.timeout_ns = timeout_ns};
    uint64_t there = w->end - w->begin;
    int rc = IDC_OK;
    w->ahead = ahead;
    w->body = into;
    w->body_len = len;
    w->body_got = there < len ? there : len;
    memcpy(w->body, w->in + w->begin, w->body_got);
    w->begin += w->body_got;
    while (rc == IDC_OK && (w->body_got == 0 || (all && w->body_got < len)))
        rc = w->ended != IDC_OK ? w->ended : await(w, &p);
    w->body = NULL; /* it is the caller's */
    return w->body_got > 0 ? (int64_t)w->body_got : rc; /* what went wrong meanwhile is met again */
}

int64_t idc_wire_next(struct idc_wire *w, uint32_t *lens, uint32_t n, int64_t timeout_ns)
{
    int64_t got = idc_wire_take(w, lens, n, timeout_ns);
    return got == 1 && w->apart == 0 && w->want == 0 && w->first == LENGTH ? IDC_WIRE_ONE + lens[0] : got;
}

void idc_wire_free(struct idc_wire *w)
{
    free(w->out);
    free(w->bodies);
    w->out = NULL;
    w->bodies = NULL;
    w->returned = w->lent;
    w->out_room = w->out_begin = w->out_end = w->bodies_room = w->bodies_begin = w->bodies_end = w->unsent = 0;
}

int64_t idc_wire_call(struct idc_wire *w, const void *head, uint64_t head_len, const void *body, uint64_t body_len,
                      uint32_t *lens, int64_t timeout_ns, int32_t *posted)
{
    *posted = 0;
    int64_t rc = idc_wire_send(w, head, head_len, body, body_len);
    if (rc != IDC_OK)
        return rc;
    *posted = 1;
    return w->unsent == 0 ? idc_wire_next(w, lens, 1, timeout_ns) : IDC_AGAIN;
}

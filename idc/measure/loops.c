/* Native loops that measure: the floors (a bare cache line, a bare doorbell, a bare copy pipeline) and the same
 * through rings, so that what the rings and what Python adds can be told apart. Each is bounded by a deadline.
 * May depend on inner.h and the rest of the core. */
#include "inner.h"
#include "measure.h"

#include <stdlib.h>

enum { POLLS_PER_CLOCK = 1024 };

/* ns left until the deadline, 0 when it has passed. */
static int64_t left_until(uint64_t deadline)
{
    uint64_t now = idc_now_ns();
    return now < deadline ? (int64_t)(deadline - now) : 0;
}

/* Waits for *word == value by polling alone, with `gap` loads of another line between two polls: a poll takes the line
 * from a writer who may not be done with it, so which is faster depends on the machine. */
static inline int poll_word(const uint64_t *word, uint64_t value, int gap, uint64_t deadline)
{
    uint64_t other = 0;
    for (uint32_t polls = 1; load_acquire(word) != value; polls++) {
        for (int i = 0; i < gap; i++)
            touch_line((const uint8_t *)&other);
        if (polls % POLLS_PER_CLOCK == 0 && idc_now_ns() >= deadline)
            return IDC_TIMEOUT;
    }
    return IDC_OK;
}

/* Blocks without a look at the clock, which would be part of the round trip: the deadline may be missed by WAIT_NS. A
 * call that polling returns from now and then (IDC_INTR after 50 ms) is made again; a signal ends it only when it
 * sleeps. */
enum { WAIT_NS = 50000000 };

static bool again(int64_t rc, int64_t spin_ns, uint64_t deadline)
{
    return (rc == IDC_TIMEOUT || (rc == IDC_INTR && spin_ns < 0)) && left_until(deadline) > 0;
}

static inline int64_t receive(struct idc_ring *rx, void *buf, uint64_t cap, int64_t spin_ns, uint64_t deadline)
{
    int64_t rc;
    do
        rc = idc_msg_recv(rx, buf, cap, spin_ns, WAIT_NS);
    while (__builtin_expect(rc < 0, 0) && again(rc, spin_ns, deadline));
    return rc == IDC_INTR && spin_ns < 0 ? IDC_TIMEOUT : rc;
}

static inline int64_t transmit(struct idc_ring *tx, const void *buf, uint64_t len, int64_t spin_ns, uint64_t deadline)
{
    int64_t rc;
    do
        rc = idc_msg_send(tx, buf, len, spin_ns, WAIT_NS);
    while (__builtin_expect(rc < 0, 0) && again(rc, spin_ns, deadline));
    return rc == IDC_INTR && spin_ns < 0 ? IDC_TIMEOUT : rc;
}

int64_t idc_loop_echo(struct idc_ring *rx, struct idc_ring *tx, uint64_t rounds, int64_t spin_ns, uint64_t deadline)
{
    uint8_t small[4096], *buf = rx->slot_size <= sizeof small ? small : malloc(rx->slot_size);
    int64_t rc = buf == NULL ? IDC_EINVAL : IDC_OK;
    uint64_t done = 0;
    for (; rc >= 0 && done < rounds; done++) {
        rc = receive(rx, buf, rx->slot_size, spin_ns, deadline);
        if (rc >= 0)
            rc = transmit(tx, buf, (uint64_t)rc, spin_ns, deadline);
        if (rc < 0)
            break;
    }
    if (buf != small)
        free(buf);
    return done > 0 || rc >= 0 ? (int64_t)done : rc;
}

int64_t idc_loop_ping(struct idc_ring *tx, struct idc_ring *rx, uint64_t len, uint64_t *samples, uint64_t n,
                      uint64_t per, int64_t spin_ns, uint64_t deadline)
{
    uint64_t room = rx->slot_size > len ? rx->slot_size : len;
    uint8_t small[4096] = {0}, *buf = room <= sizeof small ? small : calloc(1, room);
    int64_t rc = buf == NULL || per == 0 ? IDC_EINVAL : IDC_OK;
    uint64_t done = 0, before = idc_now_ns();
    for (; rc >= 0 && done < n; done++) {
        for (uint64_t i = 0; rc >= 0 && i < per; i++) {
            rc = transmit(tx, buf, len, spin_ns, deadline);
            if (rc >= 0)
                rc = receive(rx, buf, room, spin_ns, deadline);
        }
        if (rc < 0)
            break;
        uint64_t now = idc_now_ns();
        samples[done] = (now - before) / per;
        before = now;
    }
    if (buf != small)
        free(buf);
    return rc < 0 ? rc : (int64_t)done;
}

static inline int64_t line_ping(void *mine, const void *theirs, uint64_t *samples, uint64_t n, uint64_t per, int gap,
                                uint64_t deadline)
{
    if (per == 0)
        return IDC_EINVAL;
    uint64_t before = idc_now_ns(), turn = 0;
    for (uint64_t done = 0; done < n; done++) {
        for (uint64_t i = 0; i < per; i++) {
            store_release(mine, ++turn);
            int rc = poll_word(theirs, turn, gap, deadline);
            if (rc != IDC_OK)
                return rc;
        }
        uint64_t now = idc_now_ns();
        samples[done] = (now - before) / per;
        before = now;
    }
    return (int64_t)n;
}

static inline int64_t line_pong(void *mine, const void *theirs, uint64_t rounds, int gap, uint64_t deadline)
{
    for (uint64_t turn = 1; turn <= rounds; turn++) {
        int rc = poll_word(theirs, turn, gap, deadline);
        if (rc != IDC_OK)
            return rc;
        store_release(mine, turn);
    }
    return (int64_t)rounds;
}

/* A loop of its own for each way to poll: the one without a gap does not even ask. */
int64_t idc_loop_line_ping(void *mine, const void *theirs, uint64_t *samples, uint64_t n, uint64_t per, int gap,
                           uint64_t deadline)
{
    return gap ? line_ping(mine, theirs, samples, n, per, POLL_GAP, deadline)
               : line_ping(mine, theirs, samples, n, per, 0, deadline);
}

int64_t idc_loop_line_pong(void *mine, const void *theirs, uint64_t rounds, int gap, uint64_t deadline)
{
    return gap ? line_pong(mine, theirs, rounds, POLL_GAP, deadline) : line_pong(mine, theirs, rounds, 0, deadline);
}

int64_t idc_loop_bell_ping(const struct idc_bell *bell, int wake_fd, uint64_t *samples, uint64_t n, uint64_t per,
                           uint64_t deadline)
{
    if (per == 0)
        return IDC_EINVAL;
    uint64_t before = idc_now_ns();
    for (uint64_t done = 0; done < n; done++) {
        for (uint64_t i = 0; i < per; i++) {
            int rc = idc_bell_ring(bell);
            if (rc == IDC_OK)
                rc = idc_bell_wait(wake_fd, left_until(deadline));
            if (rc != IDC_OK)
                return rc;
        }
        uint64_t now = idc_now_ns();
        samples[done] = (now - before) / per;
        before = now;
    }
    return (int64_t)n;
}

int64_t idc_loop_bell_pong(const struct idc_bell *bell, int wake_fd, uint64_t rounds, uint64_t deadline)
{
    for (uint64_t i = 0; i < rounds; i++) {
        int rc = idc_bell_wait(wake_fd, left_until(deadline));
        if (rc == IDC_OK)
            rc = idc_bell_ring(bell);
        if (rc != IDC_OK)
            return rc;
    }
    return (int64_t)rounds;
}

static int64_t stream(struct idc_ring *r, uint64_t total, uint64_t chunk, int64_t spin_ns, uint64_t deadline)
{
    if (chunk == 0)
        return IDC_EINVAL;
    uint8_t *buf = calloc(1, chunk);
    if (buf == NULL)
        return IDC_EINVAL;
    int rc = IDC_OK;
    uint64_t all = 0, asked, part;
    while (all < total && (rc == IDC_OK || (rc == IDC_INTR && spin_ns < 0))) {
        asked = total - all < chunk ? total - all : chunk;
        struct idc_part one = {.base = buf, .len = asked};
        int64_t left = left_until(deadline);
        if (left == 0)
            rc = IDC_TIMEOUT;
        else if (r->role == IDC_PRODUCER)
            rc = idc_bytes_write(r, &one, 1, spin_ns, left, &part);
        else
            rc = idc_bytes_read(r, buf, asked, asked, spin_ns, left, &part);
        all += left == 0 ? 0 : part;
    }
    free(buf);
    return all == total ? (int64_t)all : rc;
}

int64_t idc_loop_stream_out(struct idc_ring *tx, uint64_t total, uint64_t chunk, int64_t spin_ns, uint64_t deadline)
{
    return tx->role == IDC_PRODUCER ? stream(tx, total, chunk, spin_ns, deadline) : IDC_EINVAL;
}

int64_t idc_loop_stream_in(struct idc_ring *rx, uint64_t total, uint64_t chunk, int64_t spin_ns, uint64_t deadline)
{
    return rx->role == IDC_CONSUMER ? stream(rx, total, chunk, spin_ns, deadline) : IDC_EINVAL;
}

/* Waits until *index has moved to at least `want`. */
static int poll_index(const uint64_t *index, uint64_t want, uint64_t *copy, uint64_t deadline)
{
    for (uint32_t polls = 1; *copy < want; polls++) {
        *copy = load_acquire(index);
        cpu_relax();
        if (polls % POLLS_PER_CLOCK == 0 && idc_now_ns() >= deadline)
            return IDC_TIMEOUT;
    }
    return IDC_OK;
}

static int64_t pipeline(uint64_t *mine, const uint64_t *theirs, uint8_t *out, const uint8_t *in, uint64_t slots,
                        uint64_t chunk, uint64_t total, int routine, uint64_t deadline)
{
    if (slots == 0 || chunk == 0 || idc_copy_name(routine) == NULL)
        return IDC_EINVAL;
    uint8_t *buf = calloc(1, chunk);
    if (buf == NULL)
        return IDC_EINVAL;
    uint64_t rounds = total / chunk, seen = 0;
    int rc = IDC_OK;
    for (uint64_t i = 0; i < rounds && rc == IDC_OK; i++) {
        uint64_t at = i % slots * chunk;
        if (out != NULL) {
            rc = poll_index(theirs, i < slots ? 0 : i - slots + 1, &seen, deadline);
            if (rc == IDC_OK)
                idc_copy_run(routine, out + at, buf, chunk);
        } else {
            rc = poll_index(theirs, i + 1, &seen, deadline);
            if (rc == IDC_OK)
                idc_copy_run(routine, buf, in + at, chunk);
        }
        if (rc == IDC_OK)
            store_release(mine, i + 1);
    }
    if (rc == IDC_OK && out != NULL)
        rc = poll_index(theirs, rounds, &seen, deadline);
    free(buf);
    return rc == IDC_OK ? (int64_t)(rounds * chunk) : rc;
}

enum { SECOND_INDEX = 128 / 8 };

int64_t idc_loop_pipe_out(void *indexes, void *data, uint64_t slots, uint64_t chunk, uint64_t total, int routine,
                          uint64_t deadline)
{
    uint64_t *words = indexes;
    return pipeline(words, words + SECOND_INDEX, data, NULL, slots, chunk, total, routine, deadline);
}

int64_t idc_loop_pipe_in(void *indexes, const void *data, uint64_t slots, uint64_t chunk, uint64_t total, int routine,
                         uint64_t deadline)
{
    uint64_t *words = indexes;
    return pipeline(words + SECOND_INDEX, words, NULL, data, slots, chunk, total, routine, deadline);
}

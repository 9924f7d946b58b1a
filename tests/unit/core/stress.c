/* Two threads, two rings, every way of waiting: the core under a sanitizer, with no Python in between.
 * Usage: stress ROUNDS. Prints what it did; exit 0 when all that was sent arrived whole and in order, no wake-up was
 * lost, and (by the sanitizer's own exit code) no address, behaviour or race was wrong.
 */
#include "idc_core.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

enum { PATIENCE_S = 120, MOST = 300 };
static const int64_t patience = PATIENCE_S * 1000000000ll;

struct side {
    struct idc_ring ring;
    uint64_t rounds, seed;
    int64_t spin_ns;
    int style;
};

static uint64_t roll(uint64_t *seed)
{
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    return *seed;
}

static void pause_at_random(uint64_t *seed)
{
    if (roll(seed) % 200 == 0)
        usleep((useconds_t)(roll(seed) % 150));
}

static void must(int ok, const char *what, const struct idc_ring *r, int64_t rc)
{
    if (ok)
        return;
    fprintf(stderr, "%s: %s (%s, %#llx), late %llu\n", what, idc_result_text((int)rc), idc_reason_text(r->reason),
            (unsigned long long)r->bad, (unsigned long long)r->count.late);
    exit(1);
}

/* What message i holds, so that the receiver can tell. */
static uint32_t fill(uint8_t *buf, uint64_t i)
{
    uint32_t len = (uint32_t)(i * 7 % 121);
    memset(buf, (int)(i * 31 % 251), len);
    return len;
}

static void *send_messages(void *arg)
{
    struct side *s = arg;
    uint8_t buf[8 * 120];
    for (uint64_t i = 0; i < s->rounds;) {
        uint32_t lens[8], n = 1;
        int64_t rc;
        pause_at_random(&s->seed);
        lens[0] = fill(buf, i);
        if (s->style == 0) {
            rc = idc_msg_send(&s->ring, buf, lens[0], s->spin_ns, patience);
        } else if (s->style == 1) {
            struct idc_part parts[2] = {{buf, lens[0] / 3}, {buf + lens[0] / 3, lens[0] - lens[0] / 3}};
            rc = idc_msg_sendv(&s->ring, parts, 2, s->spin_ns, patience);
        } else {
            uint32_t at = lens[0];
            for (; n < 8 && i + n < s->rounds; n++)
                at += lens[n] = fill(buf + at, i + n);
            rc = idc_msg_send_batch(&s->ring, buf, lens, n, s->spin_ns, patience);
            n = rc > 0 ? (uint32_t)rc : 0;
        }
        if (rc == IDC_INTR)
            continue;
        must(rc >= 0, "send", &s->ring, rc);
        i += n;
    }
    return NULL;
}

static void *receive_messages(void *arg)
{
    struct side *s = arg;
    uint8_t buf[8 * 120], want[120];
    for (uint64_t i = 0; i < s->rounds;) {
        uint32_t lens[8], n = 1, at = 0;
        int64_t rc;
        pause_at_random(&s->seed);
        if (s->style == 2) {
            rc = idc_msg_recv_batch(&s->ring, buf, sizeof buf, lens, 8, s->spin_ns, patience);
            n = rc > 0 ? (uint32_t)rc : 0;
        } else {
            rc = idc_msg_recv(&s->ring, buf, sizeof buf, s->spin_ns, patience);
            lens[0] = (uint32_t)rc;
        }
        if (rc == IDC_INTR)
            continue;
        must(rc >= 0, "receive", &s->ring, rc);
        for (uint32_t k = 0; k < n; k++, i++) {
            uint32_t len = fill(want, i);
            must(lens[k] == len && memcmp(buf + at, want, len) == 0, "wrong content", &s->ring, (int64_t)i);
            at += len;
        }
    }
    return NULL;
}

static void *send_bytes(void *arg)
{
    struct side *s = arg;
    uint8_t buf[MOST];
    for (uint64_t at = 0; at < s->rounds;) {
        uint64_t len = roll(&s->seed) % MOST + 1, done = 0;
        len = len < s->rounds - at ? len : s->rounds - at;
        int64_t rc;
        pause_at_random(&s->seed);
        if (s->style == 1) {
            struct idc_span span[2];
            rc = idc_bytes_spans(&s->ring, 1, s->spin_ns, patience, span);
            if (rc > 0) {
                done = len < span[0].len ? len : span[0].len;
                for (uint64_t k = 0; k < done; k++)
                    s->ring.data[span[0].offset + k] = (uint8_t)((at + k) * 13);
                rc = idc_bytes_advance(&s->ring, done);
            }
        } else {
            for (uint64_t k = 0; k < len; k++)
                buf[k] = (uint8_t)((at + k) * 13);
            struct idc_part parts[2] = {{buf, len / 2}, {buf + len / 2, len - len / 2}};
            rc = idc_bytes_write(&s->ring, parts, 2, s->spin_ns, patience, &done);
        }
        at += done;
        must(rc == IDC_OK || rc == IDC_INTR, "write", &s->ring, rc);
    }
    return NULL;
}

static void *receive_bytes(void *arg)
{
    struct side *s = arg;
    uint8_t buf[MOST];
    for (uint64_t at = 0; at < s->rounds;) {
        uint64_t len = roll(&s->seed) % MOST + 1, done = 0;
        const uint8_t *got = buf;
        int64_t rc;
        pause_at_random(&s->seed);
        if (s->style == 1) {
            struct idc_span span[2];
            rc = idc_bytes_spans(&s->ring, 1, s->spin_ns, patience, span);
            if (rc > 0) {
                got = s->ring.data + span[0].offset;
                done = span[0].len;
            }
        } else {
            rc = idc_bytes_read(&s->ring, buf, len, 1, s->spin_ns, patience, &done);
        }
        must(rc >= 0 || rc == IDC_INTR, "read", &s->ring, rc);
        for (uint64_t k = 0; k < done; k++)
            must(got[k] == (uint8_t)((at + k) * 13), "wrong byte", &s->ring, (int64_t)(at + k));
        if (s->style == 1 && done > 0)
            must(idc_bytes_advance(&s->ring, done) == IDC_OK, "consume", &s->ring, 0);
        at += done;
    }
    return NULL;
}

static void run(uint32_t kind, uint64_t size, uint64_t rounds, int64_t spin_ns, int style)
{
    static _Alignas(4096) uint8_t memory[4096 + 65536];
    memset(memory, 0, sizeof memory);
    int data = eventfd(0, EFD_NONBLOCK), space = eventfd(0, EFD_NONBLOCK);
    struct side tx = {.rounds = rounds, .seed = 88172645463325252u, .spin_ns = spin_ns, .style = style}, rx = tx;
    rx.seed += 7;
    must(idc_ring_open(&tx.ring, memory, memory + 4096, kind, IDC_PRODUCER, size, 128) == IDC_OK &&
             idc_ring_open(&rx.ring, memory, memory + 4096, kind, IDC_CONSUMER, size, 128) == IDC_OK,
         "open", &tx.ring, 0);
    idc_ring_reset(&tx.ring);
    idc_ring_reset(&rx.ring);
    idc_ring_bell(&tx.ring, NULL, 0, data);
    idc_ring_bell(&rx.ring, NULL, 0, space);
    idc_ring_wake(&tx.ring, space);
    idc_ring_wake(&rx.ring, data);
    pthread_t sender, receiver;
    pthread_create(&sender, NULL, kind == IDC_MESSAGES ? send_messages : send_bytes, &tx);
    pthread_create(&receiver, NULL, kind == IDC_MESSAGES ? receive_messages : receive_bytes, &rx);
    pthread_join(sender, NULL);
    pthread_join(receiver, NULL);
    uint64_t late = tx.ring.count.late + rx.ring.count.late;
    printf("%s size %llu style %d spin %lld: sleeps %llu/%llu doorbells %llu/%llu spurious %llu/%llu late %llu\n",
           kind == IDC_MESSAGES ? "messages" : "bytes", (unsigned long long)size, style, (long long)spin_ns,
           (unsigned long long)tx.ring.count.sleeps, (unsigned long long)rx.ring.count.sleeps,
           (unsigned long long)tx.ring.count.doorbells, (unsigned long long)rx.ring.count.doorbells,
           (unsigned long long)tx.ring.count.spurious, (unsigned long long)rx.ring.count.spurious,
           (unsigned long long)late);
    must(late == 0, "a wake-up was lost", &rx.ring, IDC_OK);
    must(tx.ring.count.bytes == rx.ring.count.bytes, "bytes lost", &rx.ring, IDC_OK);
    close(data);
    close(space);
}

int main(int argc, char **argv)
{
    uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 2000;
    static const int64_t spins[] = {0, 20000, -1};
    /* libc's copies are the ones that sanitizers see into; the others are assembly or tested in test_ring_copy.py */
    for (int size_class = 0; size_class < 3; size_class++)
        idc_copy_force(size_class, 0);
    for (int style = 0; style < 3; style++)
        for (int spin = 0; spin < 3; spin++) {
            run(IDC_MESSAGES, 2, rounds, spins[spin], style);
            run(IDC_MESSAGES, 64, rounds, spins[spin], style);
            run(IDC_BYTES, 64, rounds * 20, spins[spin], style);
            run(IDC_BYTES, 65536, rounds * 200, spins[spin], style);
        }
    return 0;
}

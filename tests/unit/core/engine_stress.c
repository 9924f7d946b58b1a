/* Two engines in two threads, each submitting to the other's handler; then one against frames at random.
 * Usage: engine_stress ROUNDS. Exit 0 when each submission had its own answer, no wake-up was lost, and (by the
 * sanitizer's own exit code) no address, behaviour or race was wrong.
 */
#include "transact.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

enum { SLOTS = 64, SLOT = 128, DEPTH = 16, BODY = 64, EVENTS = 8 };

struct side {
    struct idc_ring tx, rx;
    struct idc_engine engine;
    struct idc_pending slots[DEPTH];
    uint32_t held[DEPTH];
    uint8_t status[BODY], buf[EVENTS * SLOT];
    struct idc_event events[EVENTS];
    uint64_t rounds, handled;
    int64_t spin_ns;
};

/* Answers with each byte plus one; of every seventh request nothing but an error code. */
static int64_t handler(void *context, const void *parameters, uint64_t len, void *status, uint64_t room,
                       uint16_t *error)
{
    struct side *s = context;
    if (++s->handled % 7 == 0) {
        *error = (uint16_t)len;
        return 0;
    }
    for (uint64_t i = 0; i < len && i < room; i++)
        ((uint8_t *)status)[i] = (uint8_t)(((const uint8_t *)parameters)[i] + 1);
    return (int64_t)len;
}

static void must(int ok, const char *what, int64_t rc)
{
    if (!ok) {
        fprintf(stderr, "%s: %s\n", what, idc_result_text((int)rc));
        exit(1);
    }
}

static void make(struct side *s, uint8_t *memory, int producer_first, const int *fds, uint64_t rounds, int64_t spin_ns)
{
    uint8_t *one = memory, *two = memory + 256 + SLOTS * SLOT;
    memset(s, 0, sizeof *s);
    uint8_t *out = producer_first ? one : two, *in = producer_first ? two : one;
    must(idc_ring_open(&s->tx, out, out + 256, IDC_MESSAGES, IDC_PRODUCER, SLOTS, SLOT) == IDC_OK, "open", 0);
    must(idc_ring_open(&s->rx, in, in + 256, IDC_MESSAGES, IDC_CONSUMER, SLOTS, SLOT) == IDC_OK, "open", 0);
    idc_ring_bell(&s->tx, NULL, 0, fds[!producer_first]);
    idc_ring_wake(&s->rx, fds[producer_first]);
    idc_ring_reset(&s->tx);
    idc_ring_reset(&s->rx);
    s->rounds = rounds;
    s->spin_ns = spin_ns;
    s->engine = (struct idc_engine){
        .tx = &s->tx, .rx = &s->rx, .handler = handler, .context = s, .slots = s->slots, .held = s->held,
        .status = s->status, .count = DEPTH, .most = DEPTH, .accepts = DEPTH, .parameter_bytes = BODY,
        .status_bytes = BODY, .peer_parameter_bytes = BODY, .peer_status_bytes = BODY,
    };
    must(idc_engine_start(&s->engine) == IDC_OK, "start", 0);
}

static void *both_roles(void *arg)
{
    struct side *s = arg;
    uint64_t sent = 0, done = 0;
    while (done < s->rounds || s->handled < s->rounds) {
        while (sent < s->rounds) {
            uint8_t parameters[BODY];
            memset(parameters, (int)(sent % 250), sizeof parameters);
            int64_t rc = idc_engine_submit(&s->engine, parameters, sent % (BODY + 1), sent);
            if (rc == IDC_AGAIN)
                break;
            must(rc == IDC_OK, "submit", rc);
            sent++;
        }
        s->engine.budget = s->rounds - s->handled + 1; /* it returns, so that the end of this loop is seen */
        if (done == s->rounds)
            s->engine.budget--;
        int64_t n = idc_engine_run(&s->engine, s->buf, sizeof s->buf, s->events, EVENTS, s->spin_ns, 20000000000);
        must(n >= 0 || n == IDC_INTR, "run", n);
        for (int64_t i = 0; i < n; i++) {
            struct idc_event *event = &s->events[i];
            must(event->kind == IDC_COMPLETED, "a frame that the core should know", 0);
            uint64_t len = event->cookie % (BODY + 1);
            must(event->error == 0 ? event->len == len : event->error == len && event->len == 0, "length", 0);
            for (uint64_t at = 0; at < event->len; at++)
                must(s->buf[event->at + at] == (uint8_t)(event->cookie % 250 + 1), "content", 0);
            done++;
        }
    }
    must(s->engine.outstanding == 0, "all answered", 0);
    return NULL;
}

/* Frames of a peer that means ill, one at a time: whatever they are, each is answered, completes something that was
 * outstanding, or goes up whole. */
static void at_random(uint8_t *memory, const int *fds, uint64_t rounds)
{
    static struct side good, bad;
    make(&good, memory, 1, fds, 0, 0);
    make(&bad, memory, 0, fds, 0, 0);
    uint64_t seed = 88172645463325252u, completed = 0, left = 0;
    for (uint64_t i = 0; i < rounds * 20; i++) {
        uint8_t frame[SLOT], echo[SLOT];
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        uint64_t len = seed % 90;
        for (uint64_t at = 0; at < len; at++)
            frame[at] = (uint8_t)(seed >> (at % 56));
        if (seed >> 60 != 0 && len >= 8) { /* mostly of a kind that is known */
            memset(frame, 0, 8);
            frame[0] = (uint8_t)(4 + (seed >> 20 & 1));
            frame[4] = (uint8_t)(seed >> 24 & 31);
            frame[6] = (uint8_t)(seed >> 32 & 3);
        }
        if (seed >> 40 & 1)
            (void)idc_engine_submit(&good.engine, frame, len % BODY, i);
        good.engine.handler = seed >> 41 & 1 ? handler : NULL;
        if (seed >> 42 & 1)
            idc_engine_answered(&good.engine, (uint32_t)(frame[4] | frame[6] << 16));
        must(idc_msg_send(&bad.tx, frame, len, 0, 0) == (int64_t)len, "send", 0);
        good.engine.budget = 1;
        uint32_t before = good.engine.outstanding;
        int64_t n = idc_engine_run(&good.engine, good.buf, sizeof good.buf, good.events, 1, 0, 0);
        must(n == 0 || n == 1, "one frame", n);
        if (n == 1 && good.events[0].kind == IDC_COMPLETED) {
            must(good.engine.outstanding == before - 1, "one less", 0);
            completed++;
        } else if (n == 1) {
            must(good.events[0].len == len && memcmp(good.buf + good.events[0].at, frame, len) == 0, "whole", 0);
            left++;
        }
        must(good.engine.outstanding <= DEPTH && good.engine.holds <= DEPTH, "counts", 0);
        while (idc_msg_recv(&bad.rx, echo, sizeof echo, 0, 0) >= 0)
            ;
    }
    printf("completed %llu left %llu\n", (unsigned long long)completed, (unsigned long long)left);
    must(completed > 0 && left > 0, "both happen", 0);
}

int main(int argc, char **argv)
{
    uint64_t rounds = argc > 1 ? strtoull(argv[1], NULL, 10) : 1000;
    uint8_t *memory = aligned_alloc(64, 2 * (256 + SLOTS * SLOT));
    int fds[2] = {eventfd(0, EFD_NONBLOCK), eventfd(0, EFD_NONBLOCK)};
    static const int64_t spins[] = {-1, 0, 20000};
    static struct side one, two;
    for (int i = 0; i < 3; i++) {
        pthread_t thread;
        make(&one, memory, 1, fds, rounds, spins[i]);
        make(&two, memory, 0, fds, rounds, spins[i]);
        must(pthread_create(&thread, NULL, both_roles, &two) == 0, "thread", 0);
        both_roles(&one);
        pthread_join(thread, NULL);
        uint64_t late = one.rx.count.late + two.rx.count.late;
        printf("spin %lld late %llu\n", (long long)spins[i], (unsigned long long)late);
        must(late == 0, "a wake-up was lost", 0);
    }
    at_random(memory, fds, rounds);
    free(memory);
    return 0;
}

/* Loops that measure transactions (idc/endpoint/transact.c), and the sum that stands for a consumer who looks
 * at every byte. May depend on inner.h and the rest of the core. */
#include "inner.h"
#include "measure.h"

#include <stdlib.h>

enum { EVENTS = 64 };

/* Memory of one loop: bodies of a batch of frames, and the parameters sent. */
struct work {
    struct idc_event events[EVENTS];
    uint8_t *buf;
    uint64_t cap;
};

static int begin(struct work *w, const struct idc_engine *e)
{
    w->cap = (uint64_t)EVENTS * e->rx->slot_size;
    w->buf = malloc(w->cap);
    return w->buf != NULL ? IDC_OK : IDC_EINVAL;
}

/* idc_engine_run until there are events, the budget is spent or the deadline has passed, which is looked at when nothing has come
 * for WAIT_NS: as in loops.c, the clock is no part of a round trip. */
static int64_t run(struct idc_engine *e, struct work *w, int64_t spin_ns, uint64_t deadline)
{
    enum { WAIT_NS = 50000000 };
    int64_t rc;
    do
        rc = idc_engine_run(e, w->buf, w->cap, w->events, EVENTS, spin_ns, WAIT_NS);
    while ((rc == IDC_TIMEOUT || (rc == IDC_INTR && spin_ns != 0)) && idc_now_ns() < deadline);
    return rc == IDC_INTR && spin_ns != 0 ? IDC_TIMEOUT : rc;
}

int64_t idc_handle_echo(void *context, const void *parameters, uint64_t len, void *status, uint64_t room,
                        uint16_t *error)
{
    (void)context;
    (void)error;
    if (len > room)
        return IDC_TOOBIG;
    if (len <= 64)
        copy_small(status, parameters, len);
    else
        idc_copy(status, parameters, len);
    return (int64_t)len;
}

int64_t idc_loop_serve(struct idc_engine *e, uint64_t requests, int64_t spin_ns, uint64_t deadline)
{
    struct work w;
    int64_t rc = begin(&w, e);
    e->budget = requests;
    if (rc == IDC_OK && requests > 0)
        rc = run(e, &w, spin_ns, deadline);
    free(w.buf);
    return rc == 0 ? (int64_t)requests : rc > 0 ? IDC_EINVAL : rc; /* an event: what came was not only requests */
}

/* Every event must be a good answer: a loop that measures something else is worth nothing. */
static int64_t completed(const struct work *w, int64_t n, uint64_t len)
{
    for (int64_t i = 0; i < n; i++)
        if (w->events[i].kind != IDC_COMPLETED || w->events[i].error != 0 || w->events[i].len != len)
            return IDC_EINVAL;
    return n;
}

int64_t idc_loop_transact(struct idc_engine *e, uint64_t len, uint64_t *samples, uint64_t n, uint64_t per,
                          int64_t spin_ns, uint64_t deadline)
{
    struct work w;
    uint8_t *parameters = calloc(1, len + 1);
    int64_t rc = begin(&w, e);
    if (parameters == NULL || per == 0)
        rc = IDC_EINVAL;
    e->budget = UINT64_MAX;
    uint64_t done = 0, before = idc_now_ns();
    for (; rc >= 0 && done < n; done++) {
        for (uint64_t i = 0; rc >= 0 && i < per; i++) {
            rc = idc_engine_submit(e, parameters, len, 0);
            if (rc >= 0)
                rc = run(e, &w, spin_ns, deadline);
            if (rc >= 0)
                rc = completed(&w, rc, len);
        }
        uint64_t now = idc_now_ns();
        samples[done] = (now - before) / per;
        before = now;
    }
    free(parameters);
    free(w.buf);
    return rc < 0 ? rc : (int64_t)done;
}

int64_t idc_loop_transact_many(struct idc_engine *e, uint64_t len, uint64_t n, uint64_t depth, int64_t spin_ns,
                               uint64_t deadline)
{
    struct work w;
    uint8_t *parameters = calloc(1, len + 1);
    int64_t rc = begin(&w, e);
    if (parameters == NULL || depth == 0)
        rc = IDC_EINVAL;
    e->budget = UINT64_MAX;
    uint64_t sent = 0, done = 0;
    while (rc >= 0 && done < n) {
        while (rc >= 0 && sent < n && sent - done < depth) {
            rc = idc_engine_submit(e, parameters, len, sent);
            sent += rc >= 0;
        }
        if (rc >= 0)
            rc = run(e, &w, spin_ns, deadline);
        if (rc >= 0)
            rc = completed(&w, rc, len);
        done += rc > 0 ? (uint64_t)rc : 0;
    }
    free(parameters);
    free(w.buf);
    return rc < 0 ? rc : (int64_t)done;
}

uint64_t idc_loop_sum(const void *memory, uint64_t len)
{
    const uint8_t *at = memory;
    uint64_t sums[4] = {0}, word[4];
    for (; len >= sizeof word; len -= sizeof word, at += sizeof word) {
        memcpy(word, at, sizeof word); /* plain loads; the pages may be a peer's, and nothing is concluded from them */
        for (int i = 0; i < 4; i++)
            sums[i] += word[i];
    }
    for (; len > 0; len--)
        sums[0] += *at++;
    return sums[0] + sums[1] + sums[2] + sums[3];
}

/* struct ANNOUNCEMENT and struct ANSWER of idc/measure/bulk.py, little-endian and unaligned. */
enum { ANNOUNCEMENT = 17, ANSWER = 16 };

int64_t idc_handle_copy(void *context, const void *parameters, uint64_t len, void *status, uint64_t room,
                        uint16_t *error)
{
    const struct idc_copier *c = context;
    uint64_t run[2], answer[2] = {0};
    (void)error;
    if (len != ANNOUNCEMENT || room < ANSWER)
        return IDC_EINVAL;
    memcpy(run, (const uint8_t *)parameters + 1, sizeof run); /* parameters are private: what is checked is used */
    if (run[0] < c->first || run[1] > c->length || run[0] - c->first > c->length - run[1] || run[1] > c->room)
        return IDC_EINVAL;
    idc_copy(c->target, c->pages + run[0], run[1]);
    answer[0] = run[0];
    answer[1] = c->touched ? idc_loop_sum(c->target, run[1]) : 0;
    memcpy(status, answer, sizeof answer);
    return ANSWER;
}

int64_t idc_loop_announce(struct idc_engine *e, uint64_t first, uint64_t runs, uint64_t size, uint64_t sum, uint64_t n,
                          uint64_t depth, int64_t spin_ns, uint64_t deadline)
{
    struct work w;
    int64_t rc = begin(&w, e);
    if (runs == 0 || depth == 0)
        rc = IDC_EINVAL;
    e->budget = UINT64_MAX;
    uint64_t sent = 0, done = 0;
    while (rc >= 0 && done < n) {
        for (; rc >= 0 && sent < n && sent - done < depth; sent++) {
            uint8_t announcement[ANNOUNCEMENT] = {0};
            uint64_t what[2] = {first + sent % runs * size, size};
            memcpy(announcement + 1, what, sizeof what);
            rc = idc_engine_submit(e, announcement, sizeof announcement, what[0]);
        }
        if (rc >= 0)
            rc = run(e, &w, spin_ns, deadline);
        if (rc >= 0)
            rc = completed(&w, rc, ANSWER);
        for (int64_t i = 0; i < rc; i++) {
            uint64_t answer[2];
            memcpy(answer, w.buf + w.events[i].at, sizeof answer);
            if (answer[0] != w.events[i].cookie || answer[1] != sum)
                rc = IDC_EINVAL; /* not this run, or other bytes than were sent */
        }
        done += rc > 0 ? (uint64_t)rc : 0;
    }
    free(w.buf);
    return rc < 0 ? rc : (int64_t)done;
}

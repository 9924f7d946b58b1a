/* Transactions over a pair of the core's message rings: the REQUEST and REPLY frames of docs/idc.md.
 *
 * It decides nothing. What is beyond doubt it carries out: a reply to an outstanding request, a request within the
 * quotas for which there is a handler. Every other frame goes up whole, and idc/endpoint/session.py judges it: so a
 * peer that breaks the protocol meets one judge, and one wording, whoever handles its frames.
 *
 * Order and fences are the rings'. What is added here: a frame is judged and handled in the private copy that
 * idc_msg_recv made, never in the slot, where the peer could change it between the two. May depend on inner.h. */
#include "inner.h"
#include "transact.h"
#include "wire.h"

#include <stddef.h>

/* Whether moments can be noted at all; see idc/measure/untraced.c. */
#ifndef IDC_TRACED
#define IDC_TRACED 1
#endif

/* On the wire: u8 kind, u8 flags (0), u16 error, u32 tag; little-endian like all that the core reads. */
struct header {
    uint8_t kind, flags;
    uint16_t error;
    uint32_t tag;
};
_Static_assert(sizeof(struct header) == 8, "the header of a frame has 8 bytes");

enum { REQUEST = 4, REPLY = 5, HANDLER_FAILED = 0xFFFF, NONE = 0xFFFFFFFF };
/* One of so many uses of each slot is timed: the clock costs more than the request where it is emulated. */
enum { TIMED_EVERY = 16 };

static void show(const struct idc_trips *t, const uint64_t *word, size_t words)
{
    for (size_t i = 0; t->observed != NULL && i < words; i++)
        store_release(&t->observed[word + i - &t->samples], word[i]);
}

void idc_trips_observe(struct idc_trips *t, void *record)
{
    _Static_assert(offsetof(struct idc_trips, observed) <= 256, "the record of a side has 256 bytes");
    t->observed = record;
    show(t, &t->samples, offsetof(struct idc_trips, observed) / sizeof(uint64_t));
}

void idc_trip(struct idc_trips *t, uint64_t ns)
{
    uint32_t bucket = 0;
    for (uint64_t bound = 1u << 9; ns >= bound && bucket < IDC_TRIP_BUCKETS - 1; bound <<= 1)
        bucket++;
    t->samples++;
    t->total_ns += ns;
    t->buckets[bucket]++;
    show(t, &t->samples, 2);
    show(t, &t->buckets[bucket], 1);
}

void idc_dropped(struct idc_trips *t, uint64_t count)
{
    t->dropped += count;
    show(t, &t->dropped, 1);
}

int idc_engine_start(struct idc_engine *e)
{
    if (e->tx->kind != IDC_MESSAGES || e->rx->kind != IDC_MESSAGES || e->base > 0x8000 || e->count > 0x8000 - e->base)
        return IDC_EINVAL;
    e->outstanding = e->holds = 0;
    e->free = NONE;
    for (uint32_t i = e->count; i-- > 0; e->free = i) {
        struct idc_pending *slot = &e->slots[i];
        /* The high half, how often the slot was used, goes on: an answer from before is not taken for a new one. */
        slot->tag = (slot->tag & 0xFFFF0000) | (e->base + i);
        slot->busy = 0;
        slot->next = e->free;
    }
    return IDC_OK;
}

static inline bool traced(const struct idc_engine *e)
{
    return IDC_TRACED && e->moments != NULL;
}

static inline void note(struct idc_engine *e, uint64_t kind, uint32_t tag, uint64_t when)
{
    if (!traced(e) || e->moments_count == e->moments_room)
        return;
    uint64_t *moment = e->moments + 3 * (uint64_t)e->moments_count++;
    moment[0] = when != 0 ? when : idc_now_ns();
    moment[1] = kind;
    moment[2] = tag;
}

/* Asked for only while something is traced: the clock costs as much as a frame's header. */
static inline uint64_t now(const struct idc_engine *e)
{
    return traced(e) ? idc_now_ns() : 0;
}

/* The slot of a ring's next message. */
static inline uint8_t *next_slot(const struct idc_ring *r)
{
    return r->data + (r->pos & r->mask) * (uint64_t)r->slot_size;
}

/* Whether the next frame is there. No more than a look: whether the connection has ended, or the word is a bad one, says
 * whoever looks closer. */
static inline bool there(const struct idc_ring *r)
{
    return (uint32_t)load_acquire((const uint64_t *)(const void *)next_slot(r)) == (uint32_t)(r->pos + 1);
}

/* A frame with a small body takes a way with nothing in it, as a small message does (idc_msg_send). */
static inline int64_t post(struct idc_ring *r, struct header head, const void *body, uint64_t len)
{
    if (len <= SMALL && r->does == POSTS && len + sizeof head <= r->slot_size - SLOT_HEADER && known(r) > 0) {
        uint8_t *slot = next_slot(r);
        copy_small(slot + SLOT_HEADER + sizeof head, body, len);
        memcpy(slot + SLOT_HEADER, &head, sizeof head);
        return publish(r, slot, len + sizeof head);
    }
    struct idc_part parts[2] = {{.base = &head, .len = sizeof head}, {.base = body, .len = len}};
    return idc_msg_post(r, parts, 2);
}

int64_t idc_engine_submit(struct idc_engine *e, const void *parameters, uint64_t len, uint64_t cookie)
{
    if (len > e->peer_parameter_bytes)
        return IDC_TOOBIG;
    if (e->outstanding >= e->most || e->free == NONE)
        return IDC_AGAIN;
    struct idc_pending *slot = &e->slots[e->free];
    uint32_t tag = slot->tag + 0x10000;
    uint64_t when = now(e); /* before the peer can see it: nothing is handled before it was submitted */
    slot->begun = e->trips != NULL && (tag >> 16) % TIMED_EVERY == 0 ? idc_now_ns() : 0;
    int64_t rc = post(e->tx, (struct header){.kind = REQUEST, .tag = tag}, parameters, len);
    if (rc < 0)
        return rc == IDC_AGAIN ? IDC_CORRUPT : rc; /* the rings have room for every slot, unless the peer stopped taking */
    note(e, REQUEST, tag, when);
    slot->tag = tag;
    slot->cookie = cookie;
    slot->busy = 1;
    e->free = slot->next;
    e->outstanding++;
    return IDC_OK;
}

/* Few are held: those whose handler went to Python. So a list will do. */
static uint32_t find_held(const struct idc_engine *e, uint32_t tag)
{
    uint32_t i = 0;
    while (i < e->holds && e->held[i] != tag)
        i++;
    return i;
}

void idc_engine_answered(struct idc_engine *e, uint32_t tag)
{
    uint32_t i = find_held(e, tag);
    if (i < e->holds)
        e->held[i] = e->held[--e->holds];
}

/* Whether it was an answer to an outstanding request; then the slot is free again. */
static bool completes(struct idc_engine *e, struct header head, uint64_t len, struct idc_event *event)
{
    uint32_t index = (head.tag & 0xFFFF) - e->base; /* below the base it wraps, and is too large */
    if (index >= e->count || len > e->status_bytes)
        return false;
    struct idc_pending *slot = &e->slots[index];
    if (!slot->busy || slot->tag != head.tag)
        return false;
    note(e, IDC_RECEIVED + REPLY, head.tag, 0);
    event->cookie = slot->cookie;
    if (slot->begun != 0)
        idc_trip(e->trips, idc_now_ns() - slot->begun);
    slot->busy = 0;
    slot->next = e->free;
    e->free = index;
    e->outstanding--;
    return true;
}

/* 1: handled and answered; 0: for Python; or a negative result. */
static int64_t handles(struct idc_engine *e, struct header head, const uint8_t *body, uint64_t len)
{
    if (len > e->parameter_bytes || e->holds >= e->accepts || find_held(e, head.tag) < e->holds)
        return 0;
    uint16_t error = 0;
    int64_t rc = IDC_AGAIN;
    uint64_t came = now(e), when;
    /* Before the handler does anything: an answer without room is the peer's fault, for which Python has the words. */
    if (e->handler != NULL && (known(e->tx) > 0 || idc_available(e->tx) > 0))
        rc = e->handler(e->context, body, len, e->status, e->peer_status_bytes, &error);
    if (rc == IDC_AGAIN) {
        e->held[e->holds++] = head.tag;
        return 0; /* the session notes when it came */
    }
    if (rc < 0 || (uint64_t)rc > e->peer_status_bytes || error == HANDLER_FAILED) {
        error = HANDLER_FAILED;
        rc = 0;
    }
    note(e, IDC_RECEIVED + REQUEST, head.tag, came);
    when = now(e);
    rc = post(e->tx, (struct header){.kind = REPLY, .error = error, .tag = head.tag}, e->status, (uint64_t)rc);
    if (rc >= 0)
        note(e, REPLY, head.tag, when);
    return rc < 0 ? rc : 1;
}

/* Polls for a slot's word, if that pays, as long as two sides that are awake need. Whether it came. */
static inline bool comes(struct idc_ring *r, const uint8_t *slot, uint32_t want, int64_t spin_ns)
{
    uint32_t score = r->spin_score;
    if (spin_ns == 0 || (spin_ns > 0 && score < SCORE_SPIN))
        return false;
    const uint8_t *second = r->slot_size > LINE ? slot + LINE : slot;
    r->spin_score = learned(score, true); /* beforehand, as in idc_msg_recv */
    r->count.spins_won++;
    for (int polls = EAGER_POLLS; (uint32_t)load_acquire((const uint64_t *)(const void *)slot) != want;) {
        touch_line(second); /* it travels with the first line, not after it */
        for (int i = 0; i < POLL_GAP; i++)
            touch_line((const uint8_t *)r);
        if (--polls == 0) {
            r->spin_score = score;
            r->count.spins_won--;
            return false;
        }
    }
    return true;
}

/* Copies the next frame to private memory: its length, or a negative result. That it was taken is told by the index alone, and
 * rings nobody: an endpoint never sleeps for room, since the ring has room for all that the quotas allow. */
static inline int64_t receive(struct idc_ring *r, uint8_t *into, uint64_t cap)
{
    const uint8_t *slot = next_slot(r);
    uint64_t word = load_acquire((const uint64_t *)(const void *)slot), len = word >> 32;
    if (r->does != TAKES || (uint32_t)word != (uint32_t)(r->pos + 1) || len - sizeof(struct header) > SMALL
        || len > r->slot_size - SLOT_HEADER || __builtin_expect(idc_fault_armed != 0, 0))
        return idc_msg_recv(r, into, cap, 0, 0);
    memcpy(into, slot + SLOT_HEADER, sizeof(struct header));
    copy_small(into + sizeof(struct header), slot + SLOT_HEADER + sizeof(struct header), len - sizeof(struct header));
    r->pos++;
    r->count.messages++;
    r->count.bytes += len;
    store_release(r->mine, r->pos); /* the payload has been read before the producer may overwrite it */
    return (int64_t)len;
}

/* Receives one frame to `into`. 1: there is an event; 0: it is dealt with; or a negative result. */
static inline int64_t next(struct idc_engine *e, uint8_t *into, uint64_t cap, struct idc_event *event)
{
    int64_t len = receive(e->rx, into, cap), done = 0;
    if (len < 0)
        return len;
    struct header head = {0};
    if (len >= (int64_t)sizeof head)
        memcpy(&head, into, sizeof head);
    uint64_t body = (uint64_t)len - sizeof head;
    if (head.flags == 0 && head.kind == REQUEST)
        done = handles(e, head, into + sizeof head, body);
    if (done != 0) {
        e->budget -= done > 0;
        return done < 0 ? done : 0;
    }
    *event = (struct idc_event){.kind = IDC_FRAME, .len = (uint64_t)len};
    if (head.flags == 0 && head.kind == REPLY && completes(e, head, body, event)) {
        event->kind = IDC_COMPLETED;
        event->error = head.error;
        event->len = body;
        event->at = sizeof head;
    }
    return 1;
}

/* Whether there is room for what a frame makes. Each slot can be submitted once more before its answer is taken; a frame that is
 * taken is two moments. */
static inline bool able(struct idc_engine *e)
{
    if (traced(e) && e->moments_room - e->moments_count < 2 + e->count)
        e->budget = 0;
    return e->budget > 0;
}

int64_t idc_engine_take(struct idc_engine *e, void *buf, uint64_t cap, struct idc_event *events, uint32_t n)
{
    uint64_t at = 0, longest = e->rx->slot_size - SLOT_HEADER;
    uint32_t got = 0;
    int64_t rc = n == 0 || cap < longest ? IDC_EINVAL : IDC_OK;
    for (bool first = true; rc >= 0 && got < n && cap - at >= longest && able(e); first = false) {
        if (!first && !there(e->rx)) {
            rc = IDC_AGAIN;
            break;
        }
        rc = next(e, (uint8_t *)buf + at, longest, &events[got]);
        if (rc == 1) {
            events[got].at += at;
            at = events[got].at + events[got].len;
            got++;
        }
    }
    return got > 0 ? got : rc; /* what came before the end is delivered before the end; the next call finds that again */
}

int64_t idc_engine_run(struct idc_engine *e, void *buf, uint64_t cap, struct idc_event *events, uint32_t n,
                       int64_t spin_ns, int64_t timeout_ns)
{
    int64_t rc;
    do {
        rc = IDC_OK;
        /* Answers are announced only now that there is no request left: one doorbell for all of them. The peer's quota
         * bounds how many can wait for it, and a peer that polls has seen them already. */
        if (timeout_ns != 0 && !there(e->rx) && able(e) && n > 0 && cap >= e->rx->slot_size - SLOT_HEADER) {
            rc = idc_notify(e->tx);
            if (rc == IDC_OK && !comes(e->rx, next_slot(e->rx), (uint32_t)(e->rx->pos + 1), spin_ns))
                rc = idc_wait(e->rx, 1, spin_ns, timeout_ns);
        }
        if (rc == IDC_OK)
            rc = idc_engine_take(e, buf, cap, events, n);
    } while (rc == IDC_AGAIN && timeout_ns != 0);
    /* Nothing is left unannounced on the way out, whatever the reason for it. */
    int told = e->tx->notified != e->tx->pos ? idc_notify(e->tx) : IDC_OK;
    return rc != IDC_OK ? rc : told;
}

/* -- frames that Python makes and judges */

/* Read once in each call: it may be set, or taken away, by another thread meanwhile. */
static inline struct idc_log *log_of(const struct idc_line *l)
{
    return IDC_TRACED ? l->log : NULL;
}

static inline uint64_t unlogged(const struct idc_log *log)
{
    return log->noted - load_acquire(&log->taken); /* acquire: what was there is copied before it is written over */
}

/* Whether `n` moments more find room. */
static inline bool room_for(const struct idc_log *log, uint64_t n)
{
    return log == NULL || log->room - unlogged(log) >= n;
}

static inline void log_moment(struct idc_log *log, uint64_t when, uint64_t kind, uint64_t tag)
{
    uint64_t *moment = log->moments + 3 * (log->noted & (log->room - 1));
    moment[0] = when;
    moment[1] = kind;
    moment[2] = tag;
    store_release(&log->noted, log->noted + 1);
}

/* A frame; what is too short to be one, or of a kind that stands for something else here, the session judges. */
static inline void log_frame(struct idc_log *log, uint64_t when, uint64_t way, const void *frame, uint64_t len)
{
    struct header head = {.kind = IDC_RECEIVED};
    if (len >= sizeof head)
        memcpy(&head, frame, sizeof head);
    if (head.kind < IDC_RECEIVED)
        log_moment(log, when, way + head.kind, head.tag);
}

static inline uint64_t time_of(const struct idc_log *log, uint64_t moment)
{
    return log->moments[3 * (moment & (log->room - 1))];
}

static bool due(const struct idc_log *log)
{
    uint64_t n = log != NULL ? unlogged(log) : 0;
    return n >= IDC_LOG_DUE_AT || (n > 0 && time_of(log, log->noted - 1) - time_of(log, log->noted - n) > IDC_LOG_LONG_NS);
}

/* Whoever noted before left room for one more, since only what was posted rings. */
static int announce(struct idc_line *l, struct idc_log *log)
{
    uint64_t before = l->tx->count.doorbells;
    int rc = idc_notify(l->tx);
    if (log != NULL && l->tx->count.doorbells != before && room_for(log, 1))
        log_moment(log, idc_now_ns(), IDC_RUNG, l->tx->count.doorbells - before);
    return rc;
}

int64_t idc_line_post(struct idc_line *l, const void *frame, uint64_t len)
{
    struct idc_log *log = log_of(l);
    if (log == NULL)
        return idc_msg_post_one(l->tx, frame, len);
    if (!room_for(log, 2)) /* and for the doorbell */
        return IDC_DUE;
    uint64_t when = idc_now_ns(); /* as in idc_engine_submit */
    int64_t rc = idc_msg_post_one(l->tx, frame, len);
    if (rc >= 0)
        log_frame(log, when, 0, frame, len);
    return rc;
}

int64_t idc_line_notify(struct idc_line *l)
{
    struct idc_log *log = log_of(l);
    int rc = announce(l, log);
    return rc == IDC_OK && due(log) ? IDC_DUE : rc;
}

int64_t idc_line_send(struct idc_line *l, const void *frame, uint64_t len)
{
    int64_t rc = idc_line_post(l, frame, len);
    if (rc < 0)
        return rc;
    announce(l, log_of(l));
    return due(log_of(l));
}

int64_t idc_line_take(struct idc_line *l, void *buf, uint64_t cap, uint32_t *lens, uint32_t n, int64_t spin_ns,
                      int64_t timeout_ns)
{
    struct idc_log *log = log_of(l);
    if (!room_for(log, (uint64_t)n + 1))
        return IDC_DUE;
    int64_t got = idc_msg_recv_batch(l->rx, buf, cap, lens, n, spin_ns, timeout_ns);
    if (log == NULL || got <= 0)
        return got;
    /* One reading for all that came together: each had been received by then. */
    uint64_t when = idc_now_ns(), at = 0;
    for (int64_t i = 0; i < got; at += lens[i], i++)
        log_frame(log, when, IDC_RECEIVED, (const uint8_t *)buf + at, lens[i]);
    return got;
}

int64_t idc_line_next(struct idc_line *l, int64_t timeout_ns)
{
    int64_t got = idc_line_take(l, l->many, l->many_cap, l->lens, l->met ? l->most : 1, l->spin_ns, timeout_ns);
    if (got <= 0)
        return got < 0 ? got : IDC_AGAIN;
    l->met = 1;
    return (got - 1) << 32 | l->lens[0];
}

/* Waits for the next frame, and copies it to private memory: its length, or a negative result. */
static inline int64_t await(struct idc_ring *r, void *into, uint64_t cap, int64_t spin_ns, int64_t timeout_ns)
{
    if (!there(r) && (timeout_ns == 0 || !comes(r, next_slot(r), (uint32_t)(r->pos + 1), spin_ns)))
        return idc_msg_recv(r, into, cap, spin_ns, timeout_ns);
    return receive(r, into, cap);
}

int64_t idc_line_call(struct idc_line *l, const void *head, const void *body, uint64_t body_len, int64_t timeout_ns)
{
    struct header answer;
    struct idc_log *log = log_of(l);
    memcpy(&answer, head, sizeof answer);
    l->posted = 0;
    if (!room_for(log, 4) || due(log)) /* before there is anything in hand that could get lost */
        return IDC_DUE;
    uint64_t when = log != NULL ? idc_now_ns() : 0;
    int64_t rc = post(l->tx, answer, body, body_len);
    if (rc < 0)
        return rc;
    l->posted = 1;
    if (log != NULL)
        log_frame(log, when, 0, head, sizeof answer);
    rc = announce(l, log);
    if (rc == IDC_OK)
        rc = await(l->rx, l->buf, l->cap, l->spin_ns, timeout_ns);
    if (rc < 0)
        return rc;
    if (log != NULL)
        log_frame(log, idc_now_ns(), IDC_RECEIVED, l->buf, (uint64_t)rc);
    answer.kind = REPLY;
    if ((uint64_t)rc >= sizeof answer && memcmp(l->buf, &answer, sizeof answer) == 0) {
        l->posted = 0; /* whatever interrupts its user now, nothing is under way */
        return rc - (int64_t)sizeof answer;
    }
    l->len = (uint32_t)rc;
    l->other = 1;
    return IDC_OTHER;
}

/* -- the same by a wire: short frames, that meet no other */

static bool quiet(const struct idc_wire *w)
{
    return w->unsent == 0 && w->ended == IDC_OK && w->error == 0 && !idc_wire_coming(w);
}

/* Waits for one short frame and copies it. Its length; IDC_AGAIN: what comes is long, and for who has the wire; or another negative
 * result. */
static int64_t wire_receive(struct idc_wire *w, void *into, int64_t timeout_ns)
{
    uint32_t len;
    int64_t got = idc_wire_take(w, &len, 1, timeout_ns);
    if (got != 1 || w->apart)
        return got < 0 ? got : IDC_AGAIN;
    memcpy(into, w->in + w->first, len);
    return len;
}

static int64_t wire_call(struct idc_line *l, struct header head, const void *body, uint64_t len)
{
    l->posted = 0;
    if (sizeof head + len >= IDC_WIRE_LONG || !quiet(l->wire))
        return IDC_DUE;
    int64_t rc = idc_wire_send(l->wire, &head, sizeof head, body, len);
    if (rc != IDC_OK)
        return IDC_DUE; /* nothing was sent; who tries again finds out why */
    l->posted = 1;
    rc = wire_receive(l->wire, l->buf, l->patience_ns);
    if (rc < 0)
        return rc;
    head.kind = REPLY;
    if ((uint64_t)rc >= sizeof head && memcmp(l->buf, &head, sizeof head) == 0) {
        l->posted = 0;
        return rc - (int64_t)sizeof head;
    }
    l->len = (uint32_t)rc;
    l->other = 1;
    return IDC_OTHER;
}

/* One at a time is taken here; of several the answers go together, so those are left where they are. */
static int64_t wire_take(struct idc_line *l, int64_t timeout_ns)
{
    if (!quiet(l->wire))
        return IDC_BUSY;
    int64_t rc = wire_receive(l->wire, l->many, timeout_ns);
    if (rc < 0)
        return rc == IDC_AGAIN && idc_wire_coming(l->wire) ? IDC_BUSY : rc;
    if (idc_wire_coming(l->wire)) {
        l->wire->begin = l->wire->first - IDC_WIRE_LENGTH;
        return IDC_BUSY;
    }
    l->lens[0] = (uint32_t)rc;
    return 1;
}

/* One of so many uses of the slot is timed, as in idc/endpoint/session.py. */
enum { CALL_TIMED_EVERY = 8 };

int64_t idc_line_transact(struct idc_line *l, const void *parameters, uint64_t len)
{
    if (l->posted || l->other || l->got || len > l->peer_parameter_bytes)
        return IDC_BUSY;
    struct header head = {.kind = REQUEST, .tag = l->tag + 0x10000};
    l->begun = l->trips != NULL && (head.tag >> 16) % CALL_TIMED_EVERY == 0 ? idc_now_ns() : 0;
    int64_t rc = l->wire != NULL ? wire_call(l, head, parameters, len)
                                 : idc_line_call(l, &head, parameters, len, l->patience_ns);
    if (rc < 0 && !l->posted)
        return rc;
    l->tag = head.tag;
    if (rc > (int64_t)l->status_bytes) { /* for the session to say so */
        l->len = (uint32_t)rc + sizeof head;
        l->posted = l->other = 1;
        rc = IDC_OTHER;
    }
    if (rc < 0)
        return rc + IDC_WENT;
    if (l->begun != 0)
        idc_trip(l->trips, idc_now_ns() - l->begun);
    return rc;
}

int64_t idc_line_request(struct idc_line *l, double seconds)
{
    enum { LONGEST = 1000000000 };
    struct header head;
    if (l->holds || l->other || l->got)
        return IDC_BUSY;
    int64_t timeout_ns = seconds > 0 ? (int64_t)((seconds < LONGEST ? seconds : LONGEST) * 1e9) : 0;
    uint64_t since = timeout_ns > 0 && (l->wire != NULL || !there(l->rx)) ? idc_now_ns() : 0;
    int64_t got = l->wire != NULL
                      ? wire_take(l, timeout_ns)
                      : idc_line_take(l, l->many, l->many_cap, l->lens, l->most, l->spin_ns, timeout_ns);
    if (got == IDC_INTR)
        l->waited_ns = since != 0 ? idc_now_ns() - since : 0;
    if (got <= 0)
        return got < 0 ? got : IDC_AGAIN;
    if (got == 1 && l->lens[0] >= sizeof head && l->lens[0] - sizeof head <= l->parameter_bytes) {
        memcpy(&head, l->many, sizeof head);
        if (head.kind == REQUEST && head.flags == 0) {
            l->request = head.tag;
            l->holds = 1;
            return l->lens[0] - (int64_t)sizeof head;
        }
    }
    l->got = (uint32_t)got;
    return IDC_OTHER;
}

int64_t idc_line_answer(struct idc_line *l, const void *status, uint64_t len, uint16_t error)
{
    struct header head = {.kind = REPLY, .error = error, .tag = l->request};
    struct idc_log *log = log_of(l);
    if (!l->holds || len > l->peer_status_bytes || error == HANDLER_FAILED)
        return IDC_BUSY;
    if (l->wire != NULL) {
        if (sizeof head + len >= IDC_WIRE_LONG || idc_wire_send(l->wire, &head, sizeof head, status, len) != IDC_OK)
            return IDC_BUSY;
        l->holds = 0;
        return IDC_OK;
    }
    if (!room_for(log, 2)) /* and for the doorbell */
        return IDC_DUE;
    uint64_t when = log != NULL ? idc_now_ns() : 0;
    int64_t rc = post(l->tx, head, status, len);
    if (rc < 0)
        return rc;
    l->holds = 0;
    if (log != NULL)
        log_frame(log, when, 0, &head, sizeof head);
    announce(l, log);
    return due(log);
}

/* Rings of messages and of bytes: one producer, one consumer, positions in private memory.
 * The rules for each shared word are in docs/protocol.md. May depend on inner.h and libc. */
#include "inner.h"

#include <pthread.h>

/* Control block: each writer has 128 bytes of its own (processors fetch lines in pairs), and its event word has a
 * line of its own there, so that the peer's look at it costs no transfer while only the index moves. */
enum { PRODUCER_INDEX = 0, PRODUCER_EVENT = 64, CONSUMER_INDEX = 128, CONSUMER_EVENT = 192 };

enum {
    OBSERVE_EVERY = 256, /* notifications without a doorbell between two copies of the counters for observers */
    PIECE = 32768,       /* a large transfer publishes its progress in pieces, so that the other side works at the same time */
};

static pthread_once_t once = PTHREAD_ONCE_INIT;

static void setup(void)
{
    idc_wait_setup();
    idc_copy_setup();
}

int idc_ring_open(struct idc_ring *r, void *control, void *data, uint32_t kind, uint32_t role, uint64_t size,
                  uint32_t slot_size)
{
    bool power = size >= 2 && (size & (size - 1)) == 0;
    bool aligned = (uintptr_t)control % LINE == 0 && (uintptr_t)data % LINE == 0;
    bool slots = kind == IDC_MESSAGES && slot_size >= LINE && slot_size % LINE == 0 && size <= 1u << 31;
    if (control == NULL || data == NULL || !power || !aligned || role > IDC_CONSUMER || (kind != IDC_BYTES && !slots))
        return IDC_EINVAL;
    pthread_once(&once, setup);
    uint8_t *words = control;
    uint32_t mine = role == IDC_PRODUCER ? PRODUCER_INDEX : CONSUMER_INDEX;
    uint32_t theirs = CONSUMER_INDEX - mine;
    *r = (struct idc_ring){
        .mine = (uint64_t *)(void *)(words + mine),
        .theirs = (uint64_t *)(void *)(words + theirs),
        .my_event = (uint64_t *)(void *)(words + mine + PRODUCER_EVENT),
        .their_event = (uint64_t *)(void *)(words + theirs + PRODUCER_EVENT),
        .data = data,
        .size = size,
        .mask = size - 1,
        .slot_size = kind == IDC_MESSAGES ? slot_size : 0,
        .kind = kind,
        .role = role,
        .wake_fd = -1,
        .does = kind == IDC_BYTES ? 0 : role == IDC_PRODUCER ? POSTS : TAKES,
        .spin_score = 8,
        .bell = {.reg = NULL, .value = 0, .eventfd = -1},
    };
    return IDC_OK;
}

void idc_ring_bell(struct idc_ring *r, volatile uint32_t *reg, uint32_t value, int eventfd)
{
    r->bell = (struct idc_bell){.reg = reg, .value = value, .eventfd = eventfd};
}

void idc_ring_wake(struct idc_ring *r, int fd) { r->wake_fd = fd; }

int idc_ring_watch(struct idc_ring *r, const void *word, uint64_t expected)
{
    if (r->nwatch == sizeof r->watch / sizeof r->watch[0] || word == NULL || (uintptr_t)word % 8 != 0)
        return IDC_EINVAL;
    r->watch[r->nwatch++] = (struct idc_watch){.word = word, .expected = expected};
    return IDC_OK;
}

void idc_ring_reset(struct idc_ring *r)
{
    /* Each store is a release: whoever sees one (acquire) also sees the epoch that was stored before this call. */
    r->pos = r->peer = r->notified = 0;
    r->ended = IDC_OK;
    r->does = r->kind == IDC_BYTES ? 0 : r->role == IDC_PRODUCER ? POSTS : TAKES;
    r->reason = IDC_REASON_NONE;
    r->bad = 0;
    store_release(r->mine, 0);
    store_release(r->my_event, 0);
    if (r->kind == IDC_MESSAGES && r->role == IDC_PRODUCER)
        for (uint64_t i = 0; i < r->size; i++)
            store_release((uint64_t *)(void *)slot_at(r, i), 0);
}

void idc_ring_observe(struct idc_ring *r, void *record)
{
    r->observed = record;
    idc_observe(r);
}

void idc_observe(const struct idc_ring *r)
{
    const uint64_t *from = &r->count.doorbells;
    _Static_assert(sizeof r->count <= 128, "the record of a ring's end has 128 bytes");
    for (size_t i = 0; r->observed != NULL && i < sizeof r->count / sizeof *from; i++)
        store_release(&r->observed[i], from[i]); /* one by one: nobody relies on how they fit together */
}

const char *idc_result_text(int result)
{
    static const char *const text[] = {"ok", "back-pressured", "the peer ended the connection", "corrupt shared memory",
                                       "message too big", "timed out", "interrupted", "misuse"};
    return result <= IDC_OK && result >= IDC_EINVAL ? text[-result] : "unknown result";
}

const char *idc_reason_text(uint32_t reason)
{
    static const char *const text[] = {"none", "slot word is neither empty nor next", "message length exceeds its slot",
                                       "producer's index out of bounds", "consumer's index out of bounds"};
    return reason <= IDC_REASON_HEAD ? text[reason] : "unknown reason";
}

static __attribute__((noinline)) int ring_peer(struct idc_ring *r)
{
    r->count.doorbells++;
    idc_observe(r); /* costs nothing beside the doorbell */
    fault_point(r, IDC_AT_RINGING);
    return idc_bell_ring(&r->bell);
}

/* After progress from `old` to `new` was published: rings the peer if it waits for something in between. */
static inline int announce(struct idc_ring *r, uint64_t old, uint64_t new)
{
    /* Orders what I published (slot word or index) before my look at the peer's event word. Pairs with the fence in
     * wait.c between the peer's store of that word and its last look for progress: one of us must see the other. */
    full_fence();
    uint64_t event = load_relaxed(r->their_event);
    if (__builtin_expect(event - old - 1 < new - old, 0)) /* within (old, new] */
        return ring_peer(r);
    if (__builtin_expect(++r->count.suppressed % OBSERVE_EVERY == 0, 0))
        idc_observe(r);
    return IDC_OK;
}

int idc_notify(struct idc_ring *r)
{
    uint64_t old = r->notified, new = r->pos;
    if (old == new)
        return IDC_OK;
    r->notified = new;
    fault_point(r, IDC_AT_STORED);
    if (r->does == POSTS)
        store_release(r->mine, new); /* for observers only: the consumer goes by the slot words */
    return announce(r, old, new);
}

int64_t idc_available(struct idc_ring *r)
{
    if (r->ended != IDC_OK)
        return r->ended;
    int rc = ready_or_ended(r, r->size);
    if (rc < 0 || (r->kind == IDC_MESSAGES && r->role == IDC_CONSUMER))
        return rc;
    return (int64_t)known(r);
}

/* --- messages --- */

int64_t idc_msg_post(struct idc_ring *r, const struct idc_part *parts, uint32_t n)
{
    uint64_t len = 0, most = r->slot_size - SLOT_HEADER;
    if (r->does != POSTS)
        return r->ended != IDC_OK ? r->ended : IDC_EINVAL;
    for (uint32_t i = 0; i < n; i++) {
        if (parts[i].len > most - len)
            return IDC_TOOBIG;
        len += parts[i].len;
    }
    if (known(r) == 0) {
        int rc = ready_or_ended(r, 1);
        if (rc <= 0) {
            r->count.full += rc == 0;
            return rc == 0 ? IDC_AGAIN : rc;
        }
    }
    uint8_t *slot = slot_at(r, r->pos), *to = slot + SLOT_HEADER;
    for (uint32_t i = 0; i < n; i++) {
        copy_bytes(to, parts[i].base, parts[i].len);
        to += parts[i].len;
    }
    return publish(r, slot, len);
}

int64_t idc_msg_post_one(struct idc_ring *r, const void *buf, uint64_t len)
{
    return idc_msg_post(r, &(struct idc_part){.base = buf, .len = len}, 1);
}

static int64_t post_waiting(struct idc_ring *r, const struct idc_part *parts, uint32_t n, int64_t spin_ns, int64_t timeout_ns)
{
    int64_t len = idc_msg_post(r, parts, n);
    if (len != IDC_AGAIN || timeout_ns == 0)
        return len;
    int rc = idc_wait(r, 1, spin_ns, timeout_ns);
    return rc == IDC_OK ? idc_msg_post(r, parts, n) : rc;
}

int64_t idc_msg_sendv(struct idc_ring *r, const struct idc_part *parts, uint32_t n, int64_t spin_ns,
                      int64_t timeout_ns)
{
    int64_t len = post_waiting(r, parts, n, spin_ns, timeout_ns);
    int rc = idc_notify(r); /* also after a refusal: what was posted before must not stay unannounced */
    return len >= 0 && rc != IDC_OK ? rc : len;
}

static __attribute__((noinline)) int64_t send_any(struct idc_ring *r, const void *buf, uint64_t len, int64_t spin_ns,
                                                  int64_t timeout_ns)
{
    return idc_msg_sendv(r, &(struct idc_part){.base = buf, .len = len}, 1, spin_ns, timeout_ns);
}

/* A small message was copied: the rest of sending it, or of receiving it. Release: producer and consumer as in publish() and
 * took(). For a producer `mine` is for observers only: the consumer goes by the slot words. */
static inline int64_t passed(struct idc_ring *r, uint64_t old, uint64_t pos, uint64_t len)
{
    r->pos = r->notified = pos;
    r->count.messages++;
    r->count.bytes += len;
    store_release(r->mine, pos);
    int rc = announce(r, old, pos);
    return rc == IDC_OK ? (int64_t)len : rc;
}

int64_t idc_msg_send(struct idc_ring *r, const void *buf, uint64_t len, int64_t spin_ns, int64_t timeout_ns)
{
    /* The way of a small message in which nothing stands: no call on it, nothing saved for one, and each field of the ring
     * read once, because in an emulated guest that costs more than the work. */
    uint64_t pos = r->pos, slot_size = r->slot_size;
    if (len <= SMALL && r->does == POSTS && len <= slot_size - SLOT_HEADER && pos - r->peer != r->size && r->notified == pos
        && __builtin_expect(idc_fault_armed == 0, 1)) {
        uint8_t *slot = r->data + (pos & r->mask) * slot_size;
        copy_small(slot + SLOT_HEADER, buf, len);
        store_release((uint64_t *)(void *)slot, len << 32 | (uint32_t)(pos + 1)); /* as in publish() */
        return passed(r, pos, pos + 1, len);
    }
    return send_any(r, buf, len, spin_ns, timeout_ns);
}

int64_t idc_msg_send_batch(struct idc_ring *r, const void *buf, const uint32_t *lens, uint32_t n, int64_t spin_ns,
                           int64_t timeout_ns)
{
    const uint8_t *from = buf;
    int64_t rc = IDC_AGAIN;
    uint32_t sent = 0;
    for (; sent < n; sent++) {
        struct idc_part part = {.base = from, .len = lens[sent]};
        rc = post_waiting(r, &part, 1, spin_ns, sent == 0 ? timeout_ns : 0);
        if (rc < 0)
            break;
        from += lens[sent];
    }
    int told = idc_notify(r);
    if (told != IDC_OK)
        return told;
    return sent > 0 ? sent : rc;
}

/* Takes the next message without telling the producer yet. */
static int64_t take(struct idc_ring *r, void *buf, uint64_t cap)
{
    uint32_t len = 0;
    if (r->does != TAKES)
        return r->ended != IDC_OK ? r->ended : IDC_EINVAL;
    int rc = slot_present(r, &len);
    if (rc == 0) {
        rc = ready_or_ended(r, 1);
        if (rc == 1)
            rc = slot_present(r, &len);
    }
    if (rc <= 0)
        return rc == 0 ? IDC_AGAIN : rc;
    if (len > cap)
        return IDC_TOOBIG;
    copy_bytes(buf, slot_at(r, r->pos) + SLOT_HEADER, len);
    fault_point(r, IDC_AT_COPIED);
    r->pos++;
    r->count.messages++;
    r->count.bytes += len;
    return len;
}

static int64_t take_waiting(struct idc_ring *r, void *buf, uint64_t cap, int64_t spin_ns, int64_t timeout_ns)
{
    int64_t len = take(r, buf, cap);
    if (len != IDC_AGAIN || timeout_ns == 0)
        return len;
    int rc = idc_wait(r, 1, spin_ns, timeout_ns);
    return rc == IDC_OK ? take(r, buf, cap) : rc;
}

static inline int64_t took(struct idc_ring *r, int64_t result)
{
    /* Release: the payload has been read before the producer may overwrite it. */
    store_release(r->mine, r->pos);
    int rc = idc_notify(r);
    return rc != IDC_OK ? rc : result;
}

static __attribute__((noinline)) int64_t recv_any(struct idc_ring *r, void *buf, uint64_t cap, int64_t spin_ns,
                                                  int64_t timeout_ns)
{
    int64_t len = take_waiting(r, buf, cap, spin_ns, timeout_ns);
    return len < 0 ? len : took(r, len);
}

/* Polls for a small message as long as two sides that are awake need. What can be done before it comes is done before, and
 * taken back if none comes; what is needed only then waits in memory, where no register has to be given back for it: these
 * polls wait anyway, and each round trip pays for what follows them. */
static __attribute__((noinline)) int64_t recv_polling(struct idc_ring *r, void *buf, uint64_t cap, int64_t spin_ns,
                                                      int64_t timeout_ns)
{
    const volatile int64_t kept[] = {(int64_t)cap, spin_ns, timeout_ns, r->spin_score};
    uint64_t next = r->pos + 1, most = r->slot_size - SLOT_HEADER < SMALL ? r->slot_size - SLOT_HEADER : SMALL, word;
    const uint8_t *slot = slot_at(r, r->pos), *second = r->slot_size > LINE ? slot + LINE : slot;
    most = most < cap ? most : cap;
    if (r->count.suppressed % OBSERVE_EVERY == 0)
        idc_observe(r);
    r->spin_score = learned(r->spin_score, true);
    r->count.spins_won++;
    r->count.suppressed++;
    r->count.messages++;
    int polls = EAGER_POLLS;
    for (; polls > 0; polls--) {
        word = load_acquire((const uint64_t *)(const void *)slot);
        if ((uint32_t)word == (uint32_t)next) {
            uint64_t len = word >> 32, old = r->notified, *mine = r->mine;
            if (len - 1 >= most)
                break;
            copy_small(buf, slot + SLOT_HEADER, len);
            r->pos = r->notified = next;
            r->count.bytes += len;
            store_release(mine, next); /* as in took(), and then as in announce() */
            full_fence();
            if (__builtin_expect(load_relaxed(mine - (CONSUMER_INDEX - PRODUCER_EVENT) / 8) - old - 1 >= next - old, 1))
                return (int64_t)len;
            r->count.suppressed--;
            int rc = ring_peer(r);
            return rc == IDC_OK ? (int64_t)len : rc;
        }
        touch_line(second); /* it travels with the first line, not after it */
        for (int i = 0; i < POLL_GAP; i++)
            touch_line((const uint8_t *)r);
    }
    if (polls == 0) { /* else something came, which is not small: that polling paid stands */
        r->spin_score = (uint32_t)kept[3];
        r->count.spins_won--;
    }
    r->count.suppressed--;
    r->count.messages--;
    return recv_any(r, buf, (uint64_t)kept[0], kept[1], kept[2]);
}

int64_t idc_msg_recv(struct idc_ring *r, void *buf, uint64_t cap, int64_t spin_ns, int64_t timeout_ns)
{
    /* As in idc_msg_send. Whoever looks closer finds out why, if nothing is there, or nothing small. */
    uint64_t pos = r->pos, slot_size = r->slot_size;
    if (r->does != TAKES || __builtin_expect(idc_fault_armed != 0, 0))
        return recv_any(r, buf, cap, spin_ns, timeout_ns);
    const uint8_t *slot = r->data + (pos & r->mask) * slot_size;
    uint64_t word = load_acquire((const uint64_t *)(const void *)slot), len = word >> 32;
    if ((uint32_t)word != (uint32_t)(pos + 1)) {
        if (timeout_ns == 0 || spin_ns == 0 || (spin_ns > 0 && r->spin_score < SCORE_SPIN))
            return recv_any(r, buf, cap, spin_ns, timeout_ns);
        return recv_polling(r, buf, cap, spin_ns, timeout_ns);
    }
    if (len - 1 >= SMALL || len > cap || len > slot_size - SLOT_HEADER)
        return recv_any(r, buf, cap, spin_ns, timeout_ns);
    copy_small(buf, slot + SLOT_HEADER, len);
    return passed(r, r->notified, pos + 1, len);
}

int64_t idc_msg_recv_batch(struct idc_ring *r, void *buf, uint64_t cap, uint32_t *lens, uint32_t n, int64_t spin_ns,
                           int64_t timeout_ns)
{
    uint8_t *to = buf;
    uint32_t got = 0;
    int64_t len = take_waiting(r, to, cap, spin_ns, timeout_ns);
    while (len >= 0) {
        lens[got++] = (uint32_t)len;
        to += len;
        cap -= (uint64_t)len;
        if (got == n)
            break;
        len = take(r, to, cap);
    }
    return got == 0 ? len : took(r, got);
}

/* --- bytes --- */

static int moved(struct idc_ring *r, uint64_t n)
{
    r->pos += n;
    r->count.bytes += n;
    fault_point(r, IDC_AT_COPIED);
    /* Release: a producer's bytes are written before its tail covers them, a consumer's are read before its head
     * gives them back. Pairs with the acquire in refresh(). */
    store_release(r->mine, r->pos);
    return idc_notify(r);
}

/* Copies up to n bytes between buf and the ring, piece by piece, as far as the ring allows. */
static int transfer(struct idc_ring *r, uint8_t *buf, const uint8_t *from, uint64_t n, uint64_t *done)
{
    uint64_t piece = r->size / 4 < PIECE ? r->size / 4 + 1 : PIECE;
    while (n > 0) {
        if (known(r) == 0 || (known(r) < n && known(r) < piece)) {
            int rc = ready_or_ended(r, 1);
            if (rc <= 0) {
                r->count.full += rc == 0 && r->role == IDC_PRODUCER;
                return rc == 0 ? IDC_AGAIN : rc;
            }
            rc = refresh(r);
            if (rc != IDC_OK)
                return rc;
        }
        uint64_t at = r->pos & r->mask, run = known(r);
        run = run < n ? run : n;
        run = run < piece ? run : piece;
        run = run < r->size - at ? run : r->size - at;
        if (from != NULL) {
            copy_bytes(r->data + at, from, run);
            from += run;
        } else {
            copy_bytes(buf, r->data + at, run);
            buf += run;
        }
        n -= run;
        *done += run;
        int rc = moved(r, run);
        if (rc != IDC_OK)
            return rc;
    }
    return IDC_OK;
}

/* Waits until as much of n is possible as makes the wake-up worth while. */
static int wait_some(struct idc_ring *r, uint64_t n, int64_t spin_ns, uint64_t deadline, int64_t timeout_ns)
{
    uint64_t quarter = r->size / 4 > 0 ? r->size / 4 : 1, now;
    if (timeout_ns > 0) {
        now = idc_now_ns();
        if (now >= deadline)
            return IDC_TIMEOUT;
        timeout_ns = (int64_t)(deadline - now);
    }
    return idc_wait(r, n < quarter ? n : quarter, spin_ns, timeout_ns);
}

int idc_bytes_write(struct idc_ring *r, const struct idc_part *parts, uint32_t n, int64_t spin_ns,
                    int64_t timeout_ns, uint64_t *done)
{
    *done = 0;
    if (r->ended != IDC_OK)
        return r->ended;
    if (r->kind != IDC_BYTES || r->role != IDC_PRODUCER)
        return IDC_EINVAL;
    uint64_t deadline = timeout_ns > 0 ? idc_now_ns() + (uint64_t)timeout_ns : 0;
    for (uint32_t i = 0; i < n; i++) {
        uint64_t sent = 0;
        while (sent < parts[i].len) {
            uint64_t step = 0;
            int rc = transfer(r, NULL, (const uint8_t *)parts[i].base + sent, parts[i].len - sent, &step);
            sent += step;
            *done += step;
            if (rc == IDC_AGAIN && timeout_ns != 0)
                rc = wait_some(r, parts[i].len - sent, spin_ns, deadline, timeout_ns);
            if (rc != IDC_OK)
                return rc;
        }
    }
    return IDC_OK;
}

int idc_bytes_read(struct idc_ring *r, void *buf, uint64_t cap, uint64_t min, int64_t spin_ns, int64_t timeout_ns,
                   uint64_t *done)
{
    *done = 0;
    if (r->ended != IDC_OK)
        return r->ended;
    if (r->kind != IDC_BYTES || r->role != IDC_CONSUMER || min > cap)
        return IDC_EINVAL;
    uint64_t deadline = timeout_ns > 0 ? idc_now_ns() + (uint64_t)timeout_ns : 0;
    for (;;) {
        int rc = transfer(r, (uint8_t *)buf + *done, NULL, cap - *done, done);
        if (rc == IDC_PEER && *done > 0 && *done >= min)
            return IDC_OK; /* the last of it; the next call says that the peer is gone */
        if (rc == IDC_AGAIN && *done >= min)
            return *done > 0 ? IDC_OK : IDC_AGAIN;
        if (rc == IDC_AGAIN && timeout_ns != 0)
            rc = wait_some(r, min - *done, spin_ns, deadline, timeout_ns);
        else if (rc == IDC_OK)
            return IDC_OK;
        if (rc != IDC_OK)
            return rc;
    }
}

int64_t idc_bytes_spans(struct idc_ring *r, uint64_t need, int64_t spin_ns, int64_t timeout_ns,
                        struct idc_span *spans)
{
    if (r->ended != IDC_OK)
        return r->ended;
    if (r->kind != IDC_BYTES || need == 0 || need > r->size / 2)
        return IDC_EINVAL;
    int rc = ready_or_ended(r, need);
    if (rc == 0 && timeout_ns != 0) {
        rc = idc_wait(r, need, spin_ns, timeout_ns);
        rc = rc == IDC_OK ? 1 : rc;
    }
    if (rc <= 0) {
        r->count.full += rc == 0 && r->role == IDC_PRODUCER;
        return rc == 0 ? IDC_AGAIN : rc;
    }
    uint64_t at = r->pos & r->mask, total = known(r);
    spans[0].offset = at;
    spans[0].len = total < r->size - at ? total : r->size - at;
    spans[1].offset = 0;
    spans[1].len = total - spans[0].len;
    return (int64_t)total;
}

int idc_bytes_advance(struct idc_ring *r, uint64_t n)
{
    if (r->ended != IDC_OK)
        return r->ended;
    if (r->kind != IDC_BYTES || n > known(r))
        return IDC_EINVAL;
    return n == 0 ? IDC_OK : moved(r, n);
}

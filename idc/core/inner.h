/* What the files of the core share and nobody else sees: atomics on shared words, ring arithmetic, small copies.
 *
 * The shared memory may be a PCI BAR mapping, so shared words see naturally aligned plain loads and stores
 * only: no locked read-modify-write. Every word is loaded once into a local, and the local is checked.
 */
#ifndef IDC_INNER_H
#define IDC_INNER_H
#include "idc_core.h"

#include <stdatomic.h>
#include <stdbool.h>
#include <string.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the shared words are little-endian; this core does not swap them"
#endif

enum { SLOT_HEADER = 8, LINE = 64 };
enum {
    SCORE_MAX = 15, SCORE_SPIN = 4, SCORE_WON = 4, /* whether polling has paid of late: a score */
    EAGER_POLLS = 64,       /* with no PAUSE between, as long as a round trip takes between two sides that are awake */
    POLL_GAP = 7,           /* loads between two of them: each takes the line from a writer who is not done with it */
    POLLS_PER_LOOK = 256,   /* polls between looks at the clock and the watch words: a look costs 20 polls */
    RECHECK_NS = 100000000, /* the safety recheck */
    IN_FLIGHT_NS = 5000000, /* a doorbell this much behind its data was under way, not lost */
    SPIN_MOST_NS = 2000000, /* no wake-up is worth a longer spin */
    SMALL = 64,             /* bytes of a message that are copied without a loop */
};

static inline uint64_t load_acquire(const uint64_t *word)
{
    return atomic_load_explicit((const _Atomic uint64_t *)word, memory_order_acquire);
}

static inline uint64_t load_relaxed(const uint64_t *word)
{
    return atomic_load_explicit((const _Atomic uint64_t *)word, memory_order_relaxed);
}

static inline void store_release(uint64_t *word, uint64_t value)
{
    atomic_store_explicit((_Atomic uint64_t *)word, value, memory_order_release);
}

extern int idc_pause_is_cheap, idc_mfence_is_cheap, idc_cpus; /* set by idc_wait_setup */
extern _Atomic uint64_t idc_wake_ns __attribute__((visibility("hidden"))); /* see idc_wake_learn; 0: not known */
/* Not 0: idc_fault_pass has something to do. Hidden: one load less at each point. */
extern int idc_fault_armed __attribute__((visibility("hidden")));
/* idc_mask_sleep on several descriptors, of which fds[0] may be masked: 1 when that was rung; 0 after ns, or when others are
 * ready (see their revents, which a timeout leaves 0); the rest as there. */
struct pollfd;
int mask_poll(struct idc_mask *m, struct pollfd *fds, uint32_t n, uint64_t progress, uint64_t ns)
    __attribute__((visibility("hidden")));
void idc_wait_setup(void);
void idc_copy_setup(void);

/* PAUSE leaves the translation loop under TCG (hundreds of ns), so it is used only where it costs little. */
static inline void cpu_relax(void)
{
#if defined(__x86_64__) || defined(__i386__)
    if (idc_pause_is_cheap)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Orders all before it against all after it. Compilers make it a locked instruction, the fastest of a real processor's;
 * under TCG that is a call into QEMU, and MFENCE is not. */
static inline void full_fence(void)
{
#if defined(__x86_64__)
    if (idc_mfence_is_cheap) {
        __asm__ volatile("mfence" ::: "memory");
        return;
    }
#endif
    atomic_thread_fence(memory_order_seq_cst);
}

/* Pulls a line towards this CPU without using its value. A real load, because TCG drops prefetches; in assembly,
 * because it races with the peer's stores by design and nothing may be concluded from it. */
static inline void touch_line(const uint8_t *p)
{
#if defined(__x86_64__)
    uint64_t ignored;
    __asm__ volatile("movq (%1), %0" : "=r"(ignored) : "r"(p));
#else
    __builtin_prefetch(p, 0);
#endif
}

/* By two words: to TCG a vector is words too, in memory of its own. */
static inline void copy16(uint8_t *d, const uint8_t *s)
{
    uint64_t low, high;
    memcpy(&low, s, 8);
    memcpy(&high, s + 8, 8);
    memcpy(d, &low, 8);
    memcpy(d + 8, &high, 8);
}

/* Up to 64 bytes with overlapping moves and no loop. From the end: what a peer polls is in a slot's first line, which is
 * written last and at one go, before a poll takes it away. */
static inline void copy_small(void *dst, const void *src, uint64_t n)
{
    uint8_t *d = dst;
    const uint8_t *s = src;
    if (n > 32) {
        copy16(d + n - 16, s + n - 16);
        copy16(d + n - 32, s + n - 32);
        copy16(d + 16, s + 16);
        copy16(d, s);
    } else if (n >= 16) {
        copy16(d, s);
        copy16(d + n - 16, s + n - 16);
    } else if (n >= 8) {
        memcpy(d, s, 8);
        memcpy(d + n - 8, s + n - 8, 8);
    } else {
        for (uint64_t i = 0; i < n; i++)
            d[i] = s[i];
    }
}

static inline void copy_bytes(void *dst, const void *src, uint64_t n)
{
    if (n <= 64)
        copy_small(dst, src, n);
    else
        idc_copy(dst, src, n);
}

static inline void fault_point(const struct idc_ring *r, int point)
{
    if (__builtin_expect(idc_fault_armed != 0, 0))
        idc_fault_pass(point + (int)r->role);
}

static inline bool peer_changed(const struct idc_ring *r)
{
    for (uint32_t i = 0; i < r->nwatch; i++)
        if (load_acquire(r->watch[i].word) != r->watch[i].expected)
            return true;
    return false;
}

static inline int ring_end(struct idc_ring *r, int result)
{
    r->ended = result;
    r->does = 0;
    return result;
}

/* A peer that starts again stores its new epoch before it resets its words, and we load the word (acquire) before
 * the watch words: so a word that looks corrupt only because of a restart is always seen with a changed watch. */
static inline int ring_corrupt(struct idc_ring *r, uint32_t reason, uint64_t value)
{
    if (peer_changed(r))
        return ring_end(r, IDC_PEER);
    r->reason = reason;
    r->bad = value;
    return ring_end(r, IDC_CORRUPT);
}

enum { POSTS = 1, TAKES = 2 }; /* kind, role and not ended, in one test: a small message passes many a second */

/* The score after a wait that polling did for, or would have. It rises faster than it falls: two sides meet only while both
 * poll, so whoever may gain polls in most of its waits. */
static inline uint32_t learned(uint32_t score, bool won)
{
    if (won)
        return score + SCORE_WON < SCORE_MAX ? score + SCORE_WON : SCORE_MAX;
    return score - (score > 0);
}

/* How long a wait may poll, ns: as long as was said, or as two wake-ups cost where those are by way of a hypervisor. */
static inline uint64_t patience(const struct idc_ring *r, int64_t spin_ns)
{
    bool far = r->bell.reg != NULL;
    if (spin_ns <= 0 || (idc_cpus == 1 && !far))
        return 0; /* on one CPU a peer that is a process here cannot move while this one polls */
    uint64_t two = far ? 2 * atomic_load_explicit(&idc_wake_ns, memory_order_relaxed) : 0;
    two = two < SPIN_MOST_NS ? two : SPIN_MOST_NS;
    return two > (uint64_t)spin_ns ? two : (uint64_t)spin_ns;
}

/* A wait that slept so long would have been short enough, had both sides been awake: two wake-ups are in it. */
static inline uint64_t would_do(uint64_t allowed)
{
    return 3 * allowed;
}

static inline uint8_t *slot_at(const struct idc_ring *r, uint64_t index)
{
    return r->data + (index & r->mask) * r->slot_size;
}

/* Free places (producer) or filled ones (byte consumer), by the last good copy of the peer's index. */
static inline uint64_t known(const struct idc_ring *r)
{
    return r->role == IDC_PRODUCER ? r->size - (r->pos - r->peer) : r->peer - r->pos;
}

/* Takes a new copy of the peer's index. An honest one never goes back, a head never passes my tail, and a tail never
 * passes my head by more than the ring's size. Acquire: what the index covers is read or overwritten after it. */
static inline int refresh(struct idc_ring *r)
{
    uint64_t seen = load_acquire(r->theirs);
    uint64_t most = (r->role == IDC_PRODUCER ? r->pos : r->pos + r->size) - r->peer;
    if (seen - r->peer > most)
        return ring_corrupt(r, r->role == IDC_PRODUCER ? IDC_REASON_HEAD : IDC_REASON_TAIL, seen);
    r->peer = seen;
    return IDC_OK;
}

/* Message consumer: 1 and its length when the next slot is present, 0 when not yet, or a negative result.
 * Acquire: the payload is read after the word that says it is complete. */
static inline int slot_present(struct idc_ring *r, uint32_t *len)
{
    uint64_t word = load_acquire((const uint64_t *)slot_at(r, r->pos));
    uint32_t seq = (uint32_t)word, want = (uint32_t)(r->pos + 1);
    if (seq == want) {
        *len = (uint32_t)(word >> 32);
        return *len <= r->slot_size - SLOT_HEADER ? 1 : ring_corrupt(r, IDC_REASON_LEN, word);
    }
    if (seq == (r->pos < r->size ? 0 : want - (uint32_t)r->size))
        return 0;
    return ring_corrupt(r, IDC_REASON_SEQ, word);
}

/* 1 when `need` is there, 0 when not yet, or a negative result. */
static inline int ready(struct idc_ring *r, uint64_t need)
{
    if (r->kind == IDC_MESSAGES && r->role == IDC_CONSUMER) {
        uint32_t len;
        return slot_present(r, &len);
    }
    if (known(r) >= need)
        return 1;
    int rc = refresh(r);
    return rc != IDC_OK ? rc : known(r) >= need;
}

/* ready(), and when not: is the connection over? What was published before the end is delivered first, so a
 * consumer looks again after it saw a watch word change (acquire), and takes less than it needs if that is all. */
static inline int ready_or_ended(struct idc_ring *r, uint64_t need)
{
    int rc = ready(r, need);
    if (rc != 0 || !peer_changed(r))
        return rc;
    if (r->role == IDC_CONSUMER) {
        rc = ready(r, 1);
        if (rc != 0)
            return rc;
    }
    return ring_end(r, IDC_PEER);
}

static inline int64_t publish(struct idc_ring *r, uint8_t *slot, uint64_t len)
{
    fault_point(r, IDC_AT_COPIED);
    /* Release: the payload is complete before the word that says so. One store carries both halves. */
    store_release((uint64_t *)(void *)slot, len << 32 | (uint32_t)(r->pos + 1));
    r->pos++;
    r->count.messages++;
    r->count.bytes += len;
    return (int64_t)len;
}
#endif

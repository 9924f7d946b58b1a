/* The interface of the C core: single-producer single-consumer rings in shared memory, doorbells, adaptive
 * waiting, measured copies. It holds no policy, opens nothing and allocates nothing that outlives a call.
 * Depends on libc only. docs/protocol.md gives the shared words; this file gives the private side of them.
 *
 * Everything between the two "cdef" marks is also what build.py shows to cffi: no preprocessor lines there. What
 * is built on the core has headers of its own: idc/endpoint/transact.h, idc/measure/measure.h.
 */
#ifndef IDC_CORE_H
#define IDC_CORE_H
#include <stddef.h>
#include <stdint.h>

/* cdef begin */

/* The closed set of results. A call that counts returns the count (> 0) in place of IDC_OK. */
enum idc_result {
    IDC_OK = 0,
    IDC_AGAIN = -1,   /* full (producer) or empty (consumer) for now */
    IDC_PEER = -2,    /* a watch word changed: this connection is over, and all that was published is drained */
    IDC_CORRUPT = -3, /* a shared word holds what no honest peer writes; `reason` in the ring says which */
    IDC_TOOBIG = -4,  /* message longer than a slot holds, or than the caller's buffer (it stays in the ring) */
    IDC_TIMEOUT = -5,
    IDC_INTR = -6,    /* a signal came, 50 ms of polling passed, or the peer rings without end: let the interpreter
                       * run, then call again */
    IDC_EINVAL = -7,  /* misuse by the caller, or a doorbell or wake-up descriptor that does not work */
};

enum idc_reason {
    IDC_REASON_NONE = 0,
    IDC_REASON_SEQ = 1,  /* slot word is neither "not yet" nor "present" */
    IDC_REASON_LEN = 2,  /* slot length exceeds the slot */
    IDC_REASON_TAIL = 3, /* producer's index went back, or past the ring's size */
    IDC_REASON_HEAD = 4, /* consumer's index went back, or past what was produced */
};

enum idc_kind { IDC_MESSAGES = 0, IDC_BYTES = 1 };
enum idc_role { IDC_PRODUCER = 0, IDC_CONSUMER = 1 };
/* Points at which a test can stop a side; each is two, of the producer and (+ 1) of the consumer: idc/faults.py. */
enum idc_at { IDC_AT_COPIED = 1, IDC_AT_STORED = 3, IDC_AT_RINGING = 5, IDC_AT_ARMED = 7, IDC_AT_ASLEEP = 9,
              IDC_AT_WOKEN = 11 };

/* How to wake the peer: one 32-bit store to an ivshmem doorbell register, else an eventfd, else (-1) not at all. */
struct idc_bell {
    volatile uint32_t *reg; /* NULL: use eventfd */
    uint32_t value;         /* (peer << 16) | vector */
    int eventfd;
};

struct idc_watch {
    const uint64_t *word;
    uint64_t expected;
};

/* One piece of a gather list; the same shape as struct iovec. */
struct idc_part {
    const void *base;
    uint64_t len;
};

/* A run of bytes in the data area of a byte ring: offset from its start. */
struct idc_span {
    uint64_t offset, len;
};

/* Whether a wake-up descriptor is polled, or masked because the peer rings it without end. Zeroed before its first use;
 * one for each descriptor and whoever sleeps on it. */
struct idc_mask {
    uint64_t period_ns; /* 0: polled. Else masked, and looked at this often */
    uint64_t at;        /* masked: the last look; else the last time that debt was forgiven */
    uint64_t progress;  /* of the sleeper, at its last sleep */
    uint64_t masked;    /* how often it was masked */
    uint64_t looks;     /* at the descriptor, by the timer */
    uint32_t debt, woken;
};

struct idc_counters {
    uint64_t doorbells;  /* rung */
    uint64_t suppressed; /* progress published with no doorbell, because the peer had not asked for one */
    uint64_t sleeps;     /* times blocked in poll(2) */
    uint64_t wakeups;    /* woken by the descriptor */
    uint64_t spurious;   /* of those, woken to nothing */
    uint64_t late;       /* progress or the end, found by the 100 ms safety recheck with no doorbell: should be 0 */
    uint64_t masked;     /* times the descriptor was masked, because the peer rang without end */
    uint64_t full;       /* producer found no room */
    uint64_t spins_won;  /* waits that ended while spinning */
    uint64_t messages;
    uint64_t bytes;
};

/* One end of a ring. Private memory of one process, used by one thread at a time. */
struct idc_ring {
    uint64_t *mine, *theirs;             /* shared: my index, the peer's index */
    uint64_t *my_event, *their_event;    /* shared: when the peer should ring me, when I should ring it */
    uint8_t *data;                       /* shared: slots or bytes */
    uint64_t size, mask;                 /* slots or bytes; power of two */
    uint64_t pos, peer, notified;        /* my index; last good copy of the peer's; my index at the last notify */
    uint32_t slot_size, kind, role;
    uint32_t does;                       /* 1: posts messages, 2: takes them; 0: neither, or it ended */
    int32_t ended;                       /* 0, or the result that ended this ring, for good */
    uint32_t reason;                     /* enum idc_reason, when ended is IDC_CORRUPT */
    uint64_t bad;                        /* the offending value */
    int32_t wake_fd;                     /* eventfd that the peer's bell makes readable; -1: none, poll only */
    uint32_t nwatch;
    uint32_t spin_score;                 /* whether spinning has paid, or would have, of late */
    struct idc_bell bell;
    struct idc_watch watch[4];
    struct idc_mask mask_state;
    uint64_t *observed;                  /* shared: a copy of the counters for observers; NULL: none */
    struct idc_counters count;
};

/* --- ring.c: opening ---
 * control: 256 bytes, 64-byte aligned. data: size bytes, or size slots of slot_size (a multiple of 64) bytes,
 * 64-byte aligned. size: power of two, at least 2. Touches no shared word. IDC_OK or IDC_EINVAL. */
int idc_ring_open(struct idc_ring *r, void *control, void *data, uint32_t kind, uint32_t role, uint64_t size,
                  uint32_t slot_size);
void idc_ring_bell(struct idc_ring *r, volatile uint32_t *reg, uint32_t value, int eventfd);
void idc_ring_wake(struct idc_ring *r, int fd);
int idc_ring_watch(struct idc_ring *r, const void *word, uint64_t expected);
/* Back to the start: positions, and the shared words that this role alone writes. */
void idc_ring_reset(struct idc_ring *r);
/* Keeps a copy of the counters in 128 shared bytes, 8-byte aligned, for observers (docs/protocol.md, section 3.1): brought
 * up to date before each sleep and doorbell, at each 256th notification without one, and by idc_observe. */
void idc_ring_observe(struct idc_ring *r, void *record);
void idc_observe(const struct idc_ring *r);
const char *idc_result_text(int result);
const char *idc_reason_text(uint32_t reason);
/* Publishes what was posted and rings the peer if it asked for that. IDC_OK or IDC_EINVAL. */
int idc_notify(struct idc_ring *r);
/* Bytes, messages or free places there for certain (a message consumer: 0 or 1), or a negative result. */
int64_t idc_available(struct idc_ring *r);

/* --- messages ---
 * Sends return the length (0 for an empty message) or a negative result; receives likewise. */
int64_t idc_msg_post(struct idc_ring *r, const struct idc_part *parts, uint32_t n);
int64_t idc_msg_post_one(struct idc_ring *r, const void *buf, uint64_t len);
int64_t idc_msg_send(struct idc_ring *r, const void *buf, uint64_t len, int64_t spin_ns, int64_t timeout_ns);
int64_t idc_msg_sendv(struct idc_ring *r, const struct idc_part *parts, uint32_t n, int64_t spin_ns,
                      int64_t timeout_ns);
/* Posts messages laid end to end in buf, one notify for all; returns how many went (> 0). */
int64_t idc_msg_send_batch(struct idc_ring *r, const void *buf, const uint32_t *lens, uint32_t n, int64_t spin_ns,
                           int64_t timeout_ns);
int64_t idc_msg_recv(struct idc_ring *r, void *buf, uint64_t cap, int64_t spin_ns, int64_t timeout_ns);
/* Waits for one, then takes what is there, end to end in buf, lengths in lens; returns how many (> 0). */
int64_t idc_msg_recv_batch(struct idc_ring *r, void *buf, uint64_t cap, uint32_t *lens, uint32_t n, int64_t spin_ns,
                           int64_t timeout_ns);

/* --- bytes ---
 * write: all of the parts or until the timeout; read: at least `min` bytes, at most cap. `done` says how far it
 * got, whatever the result. timeout_ns 0 tries once (IDC_AGAIN when not all could be done), < 0 waits for ever. */
int idc_bytes_write(struct idc_ring *r, const struct idc_part *parts, uint32_t n, int64_t spin_ns,
                    int64_t timeout_ns, uint64_t *done);
int idc_bytes_read(struct idc_ring *r, void *buf, uint64_t cap, uint64_t min, int64_t spin_ns, int64_t timeout_ns,
                   uint64_t *done);
/* The free (producer) or filled (consumer) part of the ring as one or two spans, of at least `need` bytes
 * (fewer only if the peer is gone); returns their total. advance() commits or consumes n of them. */
int64_t idc_bytes_spans(struct idc_ring *r, uint64_t need, int64_t spin_ns, int64_t timeout_ns,
                        struct idc_span *spans);
int idc_bytes_advance(struct idc_ring *r, uint64_t n);

/* --- wait.c ---
 * Until `need` (<= size / 2; 1 for messages) bytes, messages or free places are there. spin_ns: 0 arms and sleeps
 * at once, > 0 polls that long first when that has paid of late, < 0 only polls. */
int idc_wait(struct idc_ring *r, uint64_t need, int64_t spin_ns, int64_t timeout_ns);
int idc_bell_ring(const struct idc_bell *bell);
/* IDC_OK once fd was readable (and is emptied), IDC_TIMEOUT, IDC_INTR or IDC_EINVAL. */
int idc_bell_wait(int fd, int64_t timeout_ns);
/* Finds out what a wake-up by way of the hypervisor costs, for all rings of this process: `mine` rings fd, of this side. Leaves
 * it readable. IDC_OK; IDC_TIMEOUT: rings get lost; IDC_INTR, IDC_EINVAL. */
int idc_wake_learn(const struct idc_bell *mine, int fd);
/* Sleeps until fd is readable, and empties it: 1; 0 after ns. While masked, 2 at the next look that is due or after ns.
 * Or IDC_INTR, IDC_EINVAL. `progress` is any number that changes when the sleeper got something done; fd is non-blocking. */
int idc_mask_sleep(struct idc_mask *m, int fd, uint64_t progress, uint64_t ns);
uint64_t idc_now_ns(void);

/* --- fault.c: point 0 takes it back. IDC_OK or IDC_EINVAL --- */
int idc_fault_set(int point, uint64_t nth, int signal_number);
void idc_fault_pass(int point);

/* --- copy.c: size classes 0: <= 1 KiB, 1: <= 16 KiB, 2: above --- */
int idc_copy_count(void);
const char *idc_copy_name(int routine);
void idc_copy_run(int routine, void *dst, const void *src, uint64_t n);
int idc_copy_chosen(int size_class);
int idc_copy_force(int size_class, int routine); /* routine -1: measure again. IDC_OK or IDC_EINVAL */
void idc_copy(void *dst, const void *src, uint64_t n);
int idc_copy_apart(void *dst, const void *src, uint64_t n); /* IDC_EINVAL, and nothing done, if the two overlap */
/* ns for `rounds` copies of `chunk` bytes that walk through both areas of `span` bytes. */
int64_t idc_loop_copy(int routine, void *dst, const void *src, uint64_t span, uint64_t chunk, uint64_t rounds);

/* --- words of a handshake, naturally aligned --- */
uint64_t idc_load64(const void *word);
void idc_store64(void *word, uint64_t value);
uint32_t idc_load32(const void *word);
void idc_store32(void *word, uint32_t value);
void idc_fence(void);

/* cdef end */
#endif

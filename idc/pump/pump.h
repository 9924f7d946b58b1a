/* The data pump: the engine of one queue and descriptors of the kernel's, in one loop without an interpreter. Built on
 * the core and transact.h. What is particular to a class is its shape, a few functions in C (tap.h); what to do when a
 * connection ends, or a peer breaks the rules, stays in Python (docs/pump.md).
 *
 * Everything between the two "cdef" marks is also what idc/core/build.py shows to cffi.
 */
#ifndef IDC_PUMP_H
#define IDC_PUMP_H
#include "transact.h"

/* cdef begin */

enum { IDC_PUMP_FDS = 14 };
struct idc_pump;

/* Descriptor `index` may have something: do what can be done without blocking, for a while (then set pump->more).
 * `events` are poll(2)'s, 0 where nobody has asked the kernel. How much was done, 0 for nothing; negative ends
 * idc_pump_run: pump->error says why. */
typedef int64_t idc_pump_ready(struct idc_pump *pump, uint32_t index, uint32_t events);
/* A request of this side's was answered; `status` is private memory. 0, or 1: Python has this completion. */
typedef int idc_pump_done(struct idc_pump *pump, const struct idc_event *event, const uint8_t *status);

struct idc_pump_fd {
    int32_t fd;             /* -1: none for now */
    uint32_t want;          /* poll(2)'s events; 0: it is not looked at. The shape may change both */
};

struct idc_pump_counters {
    uint64_t turns;         /* through the loop */
    uint64_t frames;        /* requests handled and answers taken */
    uint64_t moved;         /* what `ready` said */
    uint64_t sleeps, wakeups; /* times blocked in poll(2), and woken by the doorbell */
    uint64_t doorbells;     /* rung */
    uint64_t spins, spins_won; /* waits that polled first, and those that ended so */
    uint64_t late;          /* progress found by the 100 ms safety recheck with no doorbell: should be 0 */
    uint64_t holds, unheld; /* times the only processor was held, and would have been if that were allowed */
    uint64_t yielded;       /* times that polling for `poll_ns` was broken off, because others wanted the CPU */
};

/* Used by one thread at a time. The first part is its user's to fill. */
struct idc_pump {
    struct idc_engine *engine;
    idc_pump_ready *ready;
    idc_pump_done *done;    /* NULL: Python has all completions */
    void *context;          /* the shape's */
    struct idc_pump_fd fds[IDC_PUMP_FDS];
    uint32_t count;
    int32_t stop_fd;        /* eventfd: idc_pump_run returns 0 while it is readable; -1: none */
    uint64_t poll_ns;       /* polls for so long after it last had something to do; 0: as long as that has paid of late */
    uint32_t lull;          /* the peer may keep quiet about answers (idc_pump_hush): what the recheck finds is not late */
    uint32_t more;          /* `ready` stopped before all was done: it is called again without asking the kernel */
    int32_t error;          /* `ready` failed: errno, or a negative result of the core's */
    uint32_t score;         /* whether polling has paid, or would have, of late */
    uint64_t since;         /* ns: when the wait began that goes on; 0: none does; all ones: it teaches nothing */
    uint64_t quiet, quiet_at;
    int32_t processors;     /* of this machine; 0: not looked yet, as for each new thread; -1: its thread is left alone */
    int32_t policy;         /* of its thread, as it was set last: sched(7) */
    uint32_t gathers, refused; /* see idc_pump_gather; the processor may not be held */
    uint64_t shy_until, shy_ns; /* others want the CPU: polling is put off until then; for how long */
    uint64_t calm_ns;       /* polled since they did */
    struct idc_pump_counters count_of;
};

/* As idc_engine_run, and moves what the descriptors have meanwhile. The events are frames for Python, and completions that
 * the shape left to it. 0: the engine's budget is spent, stop_fd is readable, or a descriptor failed (error > 0). */
int64_t idc_pump_run(struct idc_pump *p, void *buf, uint64_t cap, struct idc_event *events, uint32_t n, int64_t spin_ns,
                     int64_t timeout_ns);
/* For a shape. Rings the peer, if it sleeps, for all that was posted: between two pieces of work that take long. Anyway it
 * is rung before this side waits. IDC_OK, IDC_EINVAL. */
int idc_pump_announce(struct idc_pump *p);
/* For a shape's handler: the answer that it is about to give is not worth a doorbell by itself. */
void idc_pump_hush(struct idc_pump *p);

/* For a shape's `ready`, in the pump's thread, on a machine with one processor; elsewhere they do nothing. */
/* More is about to come (1), so that whoever sends it is not interrupted by each piece of it; or a single thing that somebody
 * waits for (0). */
void idc_pump_gather(struct idc_pump *p, int gathers);
/* Nobody else runs until idc_pump_let_go: for a few system calls that take or give what is there, of bounded length, and never
 * for waiting. Needs CAP_SYS_NICE; without, it is counted as `unheld`, and all goes on as without the call. */
void idc_pump_hold(struct idc_pump *p);
void idc_pump_let_go(struct idc_pump *p);

/* cdef end */
#endif

/* The transactions of an endpoint, moved without an interpreter: built on the core, and no part of it, since it knows
 * frames. Everything between the two "cdef" marks is also what idc/core/build.py shows to cffi: no preprocessor lines
 * there.
 */
#ifndef IDC_TRANSACT_H
#define IDC_TRANSACT_H
#include "idc_core.h"

/* cdef begin */

/* Handles a request; `parameters` is private memory. Returns the length of the status that it wrote, at most room;
 * IDC_AGAIN to leave the request to Python, or another negative number when it failed. */
typedef int64_t idc_handler(void *context, const void *parameters, uint64_t len, void *status, uint64_t room,
                            uint16_t *error);

enum { IDC_TRIP_BUCKETS = 24 };
/* How long transactions took, a sample of them, and what had to be dropped. Private memory, with a copy for observers. */
struct idc_trips {
    uint64_t samples, total_ns, dropped;
    uint64_t buckets[IDC_TRIP_BUCKETS]; /* bucket k: shorter than 2^(k + 9) ns, and in no bucket before; the last: the rest */
    uint64_t *observed;                 /* shared; NULL: nobody can look */
};

/* record: 256 shared bytes, 8-byte aligned (docs/protocol.md, section 3.1). */
void idc_trips_observe(struct idc_trips *t, void *record);
void idc_trip(struct idc_trips *t, uint64_t ns); /* one took so long */
void idc_dropped(struct idc_trips *t, uint64_t count);

/* A slot for a request of this side. Zeroed before its first use. */
struct idc_pending {
    uint64_t cookie;         /* the submitter's own */
    uint64_t begun;          /* when, ns; 0: it is not timed */
    uint32_t tag, next, busy;
};

enum idc_event_kind { IDC_COMPLETED = 1, IDC_FRAME = 2 };
struct idc_event {
    uint64_t cookie;         /* IDC_COMPLETED: as submitted */
    uint64_t at, len;        /* where in the buffer: the status, or the whole frame */
    uint32_t kind, error;
};

/* One side of one connection, with memory of its user's: `slots` has `count`, `held` has `accepts`, and `status` has
 * peer_status_bytes elements. Used by one thread at a time. */
struct idc_engine {
    struct idc_ring *tx, *rx;
    struct idc_trips *trips; /* how long a sample of the requests took; NULL: nobody wants to know */
    idc_handler *handler;    /* NULL: every request goes to Python */
    void *context;
    struct idc_pending *slots;
    uint32_t *held;          /* tags of requests that went to Python and are not answered */
    uint8_t *status;
    uint32_t base, count;    /* tags' low halves: from base on; below it they are Python's */
    uint32_t most;           /* outstanding ones that the peer accepts of these */
    uint32_t accepts, parameter_bytes, status_bytes;
    uint32_t peer_parameter_bytes, peer_status_bytes;
    uint32_t outstanding, holds, free;
    uint64_t budget;         /* requests to handle before idc_engine_run returns 0: counted down */
    /* What is traced: triples of time (CLOCK_MONOTONIC, ns), kind of the frame (and IDC_RECEIVED), and tag. Its user
     * empties it, before anything else if there are more than moments_room - 2 - count after a run: with less room
     * nothing is taken, and the budget is spent. So all of them are noted. NULL: nothing is traced. */
    uint64_t *moments;
    uint32_t moments_room, moments_count;
};
enum { IDC_RECEIVED = 64 };

int idc_engine_start(struct idc_engine *e); /* a new connection. IDC_OK or IDC_EINVAL */
/* Posts a request without notifying. IDC_AGAIN: no slot; IDC_CORRUPT: the peer lets the ring be full; IDC_TOOBIG. */
int64_t idc_engine_submit(struct idc_engine *e, const void *parameters, uint64_t len, uint64_t cookie);
void idc_engine_answered(struct idc_engine *e, uint32_t tag); /* Python has answered that request */
/* Handles what is there, and neither waits nor announces what it posted: how many events, or a negative result (IDC_AGAIN
 * when the ring is empty). 0: the budget is spent. `buf` as below. */
int64_t idc_engine_take(struct idc_engine *e, void *buf, uint64_t cap, struct idc_event *events, uint32_t n);
/* Handles what is there and returns as soon as there are events (> 0); waits for one, timeout_ns at most since the last
 * request, else negative. 0: the budget is spent. Announces what was posted before it waits and before it returns.
 * `buf` takes copies of frames, `cap` at least the longest. */
int64_t idc_engine_run(struct idc_engine *e, void *buf, uint64_t cap, struct idc_event *events, uint32_t n,
                       int64_t spin_ns, int64_t timeout_ns);

/* Moments of a trace, as above, in a ring: one thread notes, and another may be the one that takes them out. `room` is a
 * power of two and at least IDC_LOG_DUE_AT plus the frames of one idc_line_take. Nothing is noted over: see IDC_DUE. */
struct idc_log {
    uint64_t *moments;
    uint64_t noted;          /* so many so far; stored with release */
    uint64_t taken;          /* by who takes them out, the same */
    uint32_t room;
};
enum { IDC_RUNG = 128, IDC_LOG_DUE_AT = 160, IDC_LOG_LONG_NS = 10000000 };
/* Beside the core's results: moments are to be taken out now, since there are many, or old ones, or no room. Each function
 * says what it has done before. */
enum { IDC_DUE = -64 };
/* idc_line_call: what came is not the answer. Bytes of a frame's header. */
enum { IDC_OTHER = -65, IDC_HEAD = 8 };
/* idc_line_transact, idc_line_request and idc_line_answer: the session has to do it. Nothing was done. */
enum { IDC_BUSY = -66 };
/* idc_line_transact: added to another result, if the request went. */
enum { IDC_WENT = -128 };

struct idc_wire;

/* One side of one connection, whose frames Python makes and judges. */
struct idc_line {
    struct idc_ring *tx, *rx;
    struct idc_log *log;     /* NULL: nothing is traced */
    void *buf;               /* for what idc_line_call receives */
    uint64_t cap;            /* of it */
    void *many;              /* for what idc_line_next receives, many_cap bytes; their lengths, `most` of them */
    uint64_t many_cap;
    uint32_t *lens;
    uint32_t most;
    int64_t spin_ns;
    int32_t posted;          /* whether the frame of idc_line_call went, and its answer did not come; its user's to clear */
    uint32_t len;            /* of what it received, if that is no answer: */
    int32_t other;           /* whether that is in buf; its user's to clear, so that nothing that interrupts it loses a frame */
    int32_t met;             /* a frame was received by idc_line_next */
    /* For idc_line_transact, _request and _answer; set while they may be called. */
    struct idc_trips *trips; /* how long a sample of the transactions took; NULL: nobody wants to know */
    int64_t patience_ns;     /* how long idc_line_transact waits */
    uint64_t begun;          /* when the last one was, if it is timed; 0: it is not */
    uint32_t tag;            /* of the last one: its slot, and how often that was used */
    uint32_t parameter_bytes, status_bytes, peer_parameter_bytes, peer_status_bytes;
    uint32_t request;        /* tag of what idc_line_request found */
    uint32_t got;            /* frames in `many`, where it found something else; its user's to clear */
    uint64_t waited_ns;      /* before it said IDC_INTR */
    int32_t holds;           /* whether that request is not answered; its user's to clear */
    /* NULL, or what frames go by in place of rings. Only those three functions may be called then, buf and many are of IDC_WIRE_LONG
     * bytes, and nothing is traced. What does not go into so short a frame, or finds others under way, is left to who has the wire. */
    struct idc_wire *wire;
};

/* As idc_msg_post_one. IDC_DUE: nothing was posted. */
int64_t idc_line_post(struct idc_line *l, const void *frame, uint64_t len);
/* As idc_notify. IDC_DUE: that was done. */
int64_t idc_line_notify(struct idc_line *l);
/* idc_line_post and idc_line_notify. 0; 1: that was done, and moments are due; or as idc_line_post, and nothing was posted. What breaks
 * after that is left to the next call to say. */
int64_t idc_line_send(struct idc_line *l, const void *frame, uint64_t len);
/* As idc_msg_recv_batch; n at most 64. IDC_DUE: nothing was taken. */
int64_t idc_line_take(struct idc_line *l, void *buf, uint64_t cap, uint32_t *lens, uint32_t n, int64_t spin_ns,
                      int64_t timeout_ns);
/* The same into l->many, in few words for what comes most often: the length of the first, and how many more above bit 32. The
 * very first frame comes alone, see idc/transport/shared.py. */
int64_t idc_line_next(struct idc_line *l, int64_t timeout_ns);
/* Sends a request, its header (8 bytes) apart, and waits for the next frame: what a transaction is for who waits for its
 * answer. The length of its status, in l->buf behind the header, if the next frame is the answer and no error; IDC_OTHER: l->len bytes
 * in l->buf that are not; or another negative result. IDC_DUE: nothing was done. */
int64_t idc_line_call(struct idc_line *l, const void *head, const void *body, uint64_t body_len, int64_t timeout_ns);
/* The same of the slot in l->tag, used once more; no longer than the peer accepts, and so is the status. IDC_BUSY: also where the one
 * before is under way yet, or there are frames that its user has not taken. After IDC_WENT and IDC_OTHER the frame is in l->buf. */
int64_t idc_line_transact(struct idc_line *l, const void *parameters, uint64_t len);
/* idc_line_next, for who handles one request at a time. If there is one frame, and that is a request within the quota: its length, the
 * parameters in l->many behind the header, and l->holds. IDC_OTHER: l->got frames in l->many that are something else.
 * IDC_BUSY: the one before is not answered, or there are frames that its user has not taken. */
int64_t idc_line_request(struct idc_line *l, double seconds);
/* Answers that request, and wakes its submitter: as idc_line_send. IDC_BUSY: there is none, or the peer does not accept so long a
 * status, or a client has no such error. */
int64_t idc_line_answer(struct idc_line *l, const void *status, uint64_t len, uint16_t error);

/* cdef end */
#endif

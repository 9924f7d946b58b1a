/* The loops that measure, beside the core and no part of it. Everything between the two "cdef" marks is also what
 * idc/core/build.py shows to cffi: no preprocessor lines there.
 */
#ifndef IDC_MEASURE_H
#define IDC_MEASURE_H
#include "transact.h"

/* cdef begin */

/* --- idc/measure/loops.c: each runs inside one call, ends at the deadline (absolute, idc_now_ns) at the latest, and
 * returns how many rounds or bytes it did, or a negative result. A sample is the mean of `per` round trips in ns. --- */
int64_t idc_loop_echo(struct idc_ring *rx, struct idc_ring *tx, uint64_t rounds, int64_t spin_ns, uint64_t deadline);
int64_t idc_loop_ping(struct idc_ring *tx, struct idc_ring *rx, uint64_t len, uint64_t *samples, uint64_t n,
                      uint64_t per, int64_t spin_ns, uint64_t deadline);
int64_t idc_loop_line_ping(void *mine, const void *theirs, uint64_t *samples, uint64_t n, uint64_t per, int gap,
                           uint64_t deadline); /* `gap` not 0: with something between two polls */
int64_t idc_loop_line_pong(void *mine, const void *theirs, uint64_t rounds, int gap, uint64_t deadline);
int64_t idc_loop_bell_ping(const struct idc_bell *bell, int wake_fd, uint64_t *samples, uint64_t n, uint64_t per,
                           uint64_t deadline);
int64_t idc_loop_bell_pong(const struct idc_bell *bell, int wake_fd, uint64_t rounds, uint64_t deadline);
/* `total` bytes through a byte ring in writes or reads of `chunk`, copied from and to private memory. */
int64_t idc_loop_stream_out(struct idc_ring *tx, uint64_t total, uint64_t chunk, int64_t spin_ns, uint64_t deadline);
int64_t idc_loop_stream_in(struct idc_ring *rx, uint64_t total, uint64_t chunk, int64_t spin_ns, uint64_t deadline);
/* The floor of a stream: slots of `chunk` bytes between two indexes (128 bytes apart), and nothing else. */
int64_t idc_loop_pipe_out(void *indexes, void *data, uint64_t slots, uint64_t chunk, uint64_t total, int routine,
                          uint64_t deadline);
int64_t idc_loop_pipe_in(void *indexes, const void *data, uint64_t slots, uint64_t chunk, uint64_t total, int routine,
                         uint64_t deadline);

/* --- idc/measure/paced.c --- */
int64_t idc_loop_clock(uint64_t n); /* ns for n readings of the clock */
void idc_sleep_until(uint64_t due); /* idc_now_ns; asleep for most of it, polling at the end */
/* n messages one way, as fast as they go. */
int64_t idc_loop_send(struct idc_ring *tx, uint64_t len, uint64_t n, int64_t spin_ns, uint64_t deadline);
int64_t idc_loop_receive(struct idc_ring *rx, uint64_t n, int64_t spin_ns, uint64_t deadline);
/* Round trips due every interval_ns, each measured from when it was due. The other end: idc_loop_echo. */
int64_t idc_loop_paced(struct idc_ring *tx, struct idc_ring *rx, uint64_t len, uint64_t *samples, uint64_t n,
                       uint64_t interval_ns, int64_t spin_ns, uint64_t deadline);
/* --- idc/measure/sockets.c --- */
int64_t idc_loop_fd_ping(int fd, uint64_t len, uint64_t *samples, uint64_t n, uint64_t per, int polls,
                         uint64_t deadline);
/* Round trips due every interval_ns, each measured from when it was due; the next is sent when the last is back. */
int64_t idc_loop_fd_paced(int fd, uint64_t len, uint64_t *samples, uint64_t n, uint64_t interval_ns, uint64_t deadline);
int64_t idc_loop_fd_echo(int fd, uint64_t len, uint64_t rounds, int polls, uint64_t deadline);
int64_t idc_loop_fd_out(int fd, uint64_t total, uint64_t chunk, uint64_t deadline);
int64_t idc_loop_fd_in(int fd, uint64_t total, uint64_t chunk, uint64_t deadline);

/* --- idc/measure/transact.c --- */
/* A handler: the status is the parameters. */
int64_t idc_handle_echo(void *context, const void *parameters, uint64_t len, void *status, uint64_t room,
                        uint16_t *error);
int64_t idc_loop_serve(struct idc_engine *e, uint64_t requests, int64_t spin_ns, uint64_t deadline);
/* One at a time; a sample is the mean of `per`. */
int64_t idc_loop_transact(struct idc_engine *e, uint64_t len, uint64_t *samples, uint64_t n, uint64_t per,
                          int64_t spin_ns, uint64_t deadline);
/* n of them, `depth` outstanding: as many as there is room for, one notify, then whatever has completed. */
int64_t idc_loop_transact_many(struct idc_engine *e, uint64_t len, uint64_t n, uint64_t depth, int64_t spin_ns,
                               uint64_t deadline);
/* What idc_handle_copy may read, and where it copies to. */
struct idc_copier {
    const uint8_t *pages;   /* the region's start, as mapped here */
    uint64_t first, length; /* the peer's part of it */
    uint8_t *target;
    uint64_t room;
    int32_t touched;        /* sum what was copied */
};
/* A handler, `context` a struct idc_copier: parameters and status are those of idc/measure/bulk.py. */
int64_t idc_handle_copy(void *context, const void *parameters, uint64_t len, void *status, uint64_t room,
                        uint16_t *error);
/* Announces n runs of `size` bytes, `depth` under way, one after the other of the `runs` that lie from `first` on. */
int64_t idc_loop_announce(struct idc_engine *e, uint64_t first, uint64_t runs, uint64_t size, uint64_t sum, uint64_t n,
                          uint64_t depth, int64_t spin_ns, uint64_t deadline);
uint64_t idc_loop_sum(const void *memory, uint64_t len); /* of all bytes, in 64-bit words */

/* --- idc/measure/untraced.c: as idc_engine_... and idc_line_... --- */
int idc_untraced_start(struct idc_engine *e);
int64_t idc_untraced_submit(struct idc_engine *e, const void *parameters, uint64_t len, uint64_t cookie);
void idc_untraced_answered(struct idc_engine *e, uint32_t tag);
int64_t idc_untraced_line_post(struct idc_line *l, const void *frame, uint64_t len);
int64_t idc_untraced_line_send(struct idc_line *l, const void *frame, uint64_t len);
int64_t idc_untraced_line_next(struct idc_line *l, int64_t timeout_ns);
int64_t idc_untraced_line_call(struct idc_line *l, const void *head, const void *body, uint64_t body_len, int64_t timeout_ns);
int64_t idc_untraced_line_transact(struct idc_line *l, const void *parameters, uint64_t len);
int64_t idc_untraced_line_request(struct idc_line *l, double seconds);
int64_t idc_untraced_line_answer(struct idc_line *l, const void *status, uint64_t len, uint16_t error);
int64_t idc_untraced_run(struct idc_engine *e, void *buf, uint64_t cap, struct idc_event *events, uint32_t n,
                         int64_t spin_ns, int64_t timeout_ns);

/* cdef end */
#endif

/* Messages of an endpoint over a wire, moved without the interpreter's bookkeeping: for the stream face, which takes them in
 * order and completes them in order. Everything between the two "cdef" marks is also what idc/core/build.py shows to cffi.
 */
#ifndef IDC_LANE_H
#define IDC_LANE_H
#include "wire.h"

/* cdef begin */

/* What idc_lane_take found: a long frame whose body wants a place (see idc_wire_take); a frame for the session, or a message,
 * long ones apart; a notice that a message of this side was received. */
enum idc_lane_found { IDC_LANE_WANT = 0, IDC_LANE_OTHER = 1, IDC_LANE_MESSAGE = 2, IDC_LANE_DONE = 3 };

/* Zeroed, but for wire to quota, which its user sets: `tags` has `most`, `held` has `quota` elements. */
struct idc_lane {
    struct idc_wire *wire;
    uint32_t *tags;              /* of this side's messages, 0 in the place of one that is free */
    uint32_t *held;              /* of the peer's, those that are not completed: a ring, the oldest at `first` */
    uint32_t base, most;         /* tags' low halves: from base on; how many at a time */
    uint32_t longest;            /* message that this side accepts */
    uint32_t quota;              /* how many of them at a time */
    uint32_t outstanding, uses, next;
    uint32_t first, holds;
    uint32_t unsaid;             /* completed, and the peer not told */
    uint32_t len;                /* of the short frame that was found, at `first` of the wire */
};

/* Sends a message. IDC_AGAIN: none is free; or as idc_wire_send, and nothing was sent. */
int idc_lane_send(struct idc_lane *l, const void *body, uint64_t len);
/* `body`: where the body goes that the call before wanted, see idc_wire_into; NULL if none was. What comes next, within timeout_ns; or a negative result of idc_wire_take. Several notices count as one. */
int64_t idc_lane_take(struct idc_lane *l, void *body, int64_t timeout_ns);
/* Completes the oldest message. The sender is told as soon as nothing more is on its way, or it is short of half its quota:
 * so one notice will do for many. IDC_OK or IDC_PEER, IDC_AGAIN, IDC_EINVAL. */
int idc_lane_done(struct idc_lane *l);

/* cdef end */
#endif

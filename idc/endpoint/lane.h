/* Messages of an endpoint over a wire, moved without the interpreter's bookkeeping: for the stream face, which takes them in
 * order and completes them in order. Everything between the two "cdef" marks is also what idc/core/build.py shows to cffi.
 */
#ifndef IDC_LANE_H
#define IDC_LANE_H
#include "wire.h"

/* cdef begin */

/* idc_lane_read: as many bytes as there are to be, unless the time is up before; do not complete it, as its user keeps what is read. */
enum { IDC_LANE_ALL = 1, IDC_LANE_KEEP = 2 };
/* Beside the core's results. */
enum { IDC_LANE_ELSE = -96 };

/* What idc_lane_take found: a long frame whose body wants a place (see idc_wire_take); a frame for the session, or a message,
 * long ones apart; a notice that a message of this side was received. */
enum idc_lane_found { IDC_LANE_WANT = 0, IDC_LANE_OTHER = 1, IDC_LANE_MESSAGE = 2, IDC_LANE_DONE = 3 };

/* Zeroed, but for wire to quota, which its user sets: `tags` has `most`, `held` has `quota` elements. */
struct idc_lane {
    struct idc_wire *wire;
    uint32_t *tags;              /* of this side's messages, 0 in the place of one that is free */
    uint32_t *held;              /* of the peer's, those that are not completed: a ring, the oldest at `first` */
    uint32_t base, most;         /* tags' low halves: from base on; how many at a time */
    uint32_t most_bytes;         /* of one */
    uint32_t longest;            /* message that this side accepts */
    uint32_t quota;              /* how many of them at a time */
    uint32_t outstanding, uses, next;
    uint32_t first, holds;
    uint32_t unsaid;             /* completed, and the peer not told */
    uint32_t len;                /* of the short frame that was found, at `first` of the wire */
    uint32_t left;               /* bytes of a message that is read in pieces: the newest of those held */
    uint32_t whole;              /* bytes of all of it, or of the last that was */
    uint32_t got;                /* bytes that the last call of idc_lane_read gave: for who was interrupted as it returned */
    int32_t found;               /* an idc_lane_found of which idc_lane_take says again and again what it is, until its user sets 0 */
    int32_t kept;                /* some of it was read to be kept, so that is to go on, until its user sets 0 */
    int32_t owed;                /* it was read to its end, and could not be completed */
};

/* Sends a message. 0; 1: the same, but the kernel has not taken all of it yet, see idc_wire_post; IDC_AGAIN: none is free; IDC_TOOBIG:
 * the peer accepts no message of that length; or as idc_wire_send, and nothing was sent. */
int idc_lane_send(struct idc_lane *l, const void *body, uint64_t len);
/* Bytes of the message that is next, one at least and `most` at most; `how` as above. `most` 0: waits until one has begun, and says nothing
 * but 0; `left` bytes of it are to come. What is read to its end is completed as by idc_lane_done, so nothing else must be held then.
 * Notices are taken on the way. IDC_LANE_ELSE: what is next is for idc_lane_take, or it is kept; or a negative result of idc_wire_take,
 * or of idc_lane_done. */
int64_t idc_lane_read(struct idc_lane *l, void *into, uint64_t most, int32_t how, int64_t timeout_ns);
/* `body`: where the body goes that the call before wanted, see idc_wire_into; NULL if none was. What comes next, within timeout_ns,
 * to be taken before anything else is read, and then `found` set to 0; or a negative result of idc_wire_take; IDC_LANE_ELSE: the
 * rest of a message is idc_lane_read's. Several notices count as one. */
int64_t idc_lane_take(struct idc_lane *l, void *body, int64_t timeout_ns);
/* Completes the oldest message. The sender is told as soon as no other is on its way, or it is short of half its quota:
 * so one notice will do for many. IDC_OK or IDC_PEER, IDC_AGAIN, IDC_EINVAL. */
int idc_lane_done(struct idc_lane *l);

/* cdef end */
#endif

/* Frames over a connected stream socket: u32 length (little-endian), then the frame. Moved by as few calls of the kernel as
 * there can be, and copied once: a long body is sent from where it lies, and received where it is to stay.
 *
 * It knows no frame from another, only their lengths; what is in them is for the session to judge. Everything between the
 * two "cdef" marks is also what idc/core/build.py shows to cffi: no preprocessor lines there.
 */
#ifndef IDC_WIRE_H
#define IDC_WIRE_H
#include "idc_core.h"

/* cdef begin */

enum {
    IDC_WIRE_HEAD = 8,        /* bytes of a long frame that come apart from the rest, its body */
    IDC_WIRE_LONG = 4096,     /* a frame of so many bytes is long */
    IDC_WIRE_LEAST = 4100,    /* bytes of `in` at least: its length and a frame that is not long */
    IDC_WIRE_LENGTH = 4,      /* bytes of a length */
    IDC_WIRE_ONE = 1 << 24,   /* see idc_wire_next */
};

/* A body that lies elsewhere, and goes out once all before `mark` has. */
struct idc_wire_body {
    const uint8_t *base;
    uint64_t len, mark;
};

/* One end of one connection, used by one thread at a time. Its user sets the first five, zeroes the rest, and frees what is
 * to be sent by idc_wire_free. The socket must be a blocking one; nobody else reads or writes it. */
struct idc_wire {
    int32_t fd;
    uint8_t *in;              /* `room` bytes */
    uint64_t room;
    uint64_t longest;         /* frame that the peer may send */
    uint64_t most;            /* bytes that may wait for a peer that does not read */

    int32_t ended;            /* 0; IDC_PEER: over, see `error`; IDC_TOOBIG: a frame of `bad` bytes is announced */
    int32_t error;            /* errno of what broke it; 0: the peer closed it, or nothing did */
    uint64_t bad;
    int64_t patience;         /* what the kernel has been told that a read may wait, ns */

    uint64_t begin, end;      /* of what is in `in` and not taken */
    uint64_t want;            /* the body of a long frame has so many bytes, and nowhere to go: idc_wire_into */
    uint8_t *body;            /* where it goes */
    uint64_t body_len, body_got;
    uint64_t ahead;           /* bytes to read beyond what is wanted, at most */
    uint8_t coming[8];        /* the head of that frame */
    uint8_t head[8];          /* of the last that was taken */
    uint32_t apart;           /* idc_wire_take: the first frame is a long one */
    uint64_t first;           /* idc_wire_take: where in `in` the first of the others is; each is behind its length */

    uint8_t *out;             /* lengths, short frames and heads, [out_begin, out_end) of it not sent */
    uint64_t out_room, out_begin, out_end;
    struct idc_wire_body *bodies;
    uint64_t bodies_room, bodies_begin, bodies_end;
    uint64_t lent, returned;  /* how many bodies there ever were, and how many of them are not among them any more */
    uint64_t unsent;          /* bytes, all together */
};

/* Takes a frame to be sent, in two pieces. A second of IDC_WIRE_LONG bytes or more must stay as it is while it is among the
 * bodies, [bodies_begin, bodies_end); all else is copied. IDC_OK; IDC_AGAIN: more than `most` would wait; IDC_PEER; IDC_EINVAL: no memory. */
int idc_wire_post(struct idc_wire *w, const void *head, uint64_t head_len, const void *body, uint64_t body_len);
/* Gives the kernel what was posted, waiting for room timeout_ns at most. IDC_OK; IDC_AGAIN: some is left; IDC_PEER: it broke,
 * but there may be frames to take; IDC_INTR. */
int idc_wire_flush(struct idc_wire *w, int64_t timeout_ns);
/* Both: takes a frame to be sent, and gives the kernel all there is. IDC_OK; IDC_AGAIN, IDC_PEER, IDC_EINVAL: as idc_wire_post,
 * nothing was taken. What the kernel does not take is `unsent`. */
int idc_wire_send(struct idc_wire *w, const void *head, uint64_t head_len, const void *body, uint64_t body_len);
/* The same, and waits timeout_ns at most for the kernel to take all of it, as long as there is nothing to read. */
int idc_wire_send_within(struct idc_wire *w, const void *head, uint64_t head_len, const void *body, uint64_t body_len,
                         int64_t timeout_ns);
/* Frames that are there, n at most, waiting timeout_ns at most for the first; what was posted goes out meanwhile, as the
 * kernel takes it. How many: a long one first if `apart` (its head in `head`, its body where it was to go), then short ones,
 * in `in` from `first` on; `lens` has the length of each short one. 0: a long one begins, see `want`, which may be set beside
 * a count too. Or IDC_AGAIN, IDC_TIMEOUT, IDC_INTR, or what ended it, after all that came before. */
int64_t idc_wire_take(struct idc_wire *w, uint32_t *lens, uint32_t n, int64_t timeout_ns);
/* The same, in few words for what comes most often: a single short frame, at the start of `in` behind its length, and nothing
 * else: IDC_WIRE_ONE and its length. */
int64_t idc_wire_next(struct idc_wire *w, uint32_t *lens, uint32_t n, int64_t timeout_ns);
/* idc_wire_send, then idc_wire_next of one frame. *posted: whether the first was done. */
int64_t idc_wire_call(struct idc_wire *w, const void *head, uint64_t head_len, const void *body, uint64_t body_len,
                      uint32_t *lens, int64_t timeout_ns, int32_t *posted);
/* Where the body that is wanted goes: `want` bytes, to stay there until it is taken. */
void idc_wire_into(struct idc_wire *w, void *body);
/* Whether the beginning of a frame is here: whoever sent it will not be quiet before the rest has come. */
int idc_wire_coming(const struct idc_wire *w);
/* Whether idc_wire_take has something to say without a read. */
int idc_wire_ready(const struct idc_wire *w);
/* For who takes a frame apart itself, where it begins at `begin`, and no long one is wanted or on its way. At least `least` bytes
 * (24 at most) of it are in `in` after that, and at most so many and `ahead` more are read. IDC_OK, or as idc_wire_take. */
int idc_wire_more(struct idc_wire *w, uint64_t least, uint64_t ahead, int64_t timeout_ns);
/* The next bytes of it, to `into`: one at least, `len` at most; if `all`, so many unless the time is up before. At most `ahead` of
 * what is behind them are read. How many, or as idc_wire_take. */
int64_t idc_wire_read(struct idc_wire *w, void *into, uint64_t len, int32_t all, uint64_t ahead, int64_t timeout_ns);
void idc_wire_free(struct idc_wire *w); /* what was not sent is lost */

/* cdef end */
#endif

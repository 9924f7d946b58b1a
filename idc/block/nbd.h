/* The kernel's side of a block device: one connection of its nbd, a stream socket, turned into requests of an engine.
 * Payload goes straight between socket and region. It decides nothing about failure: what is to become of requests
 * whose connection was lost is told by Python (idc/block/front.py).
 *
 *     socket ──▶ slot: FILLING ──▶ READY ──▶ SENT ──▶ REPLYING ──▶ socket
 *                                    ▲─────────┘ lost, to be sent again
 */
#ifndef IDC_NBD_H
#define IDC_NBD_H
#include "image.h"
#include "pump.h"

/* cdef begin */

enum { IDC_NBD_SLOTS = 128 }; /* requests that the kernel has outstanding for one connection, at most */
enum idc_nbd_state { IDC_NBD_FREE = 0, IDC_NBD_FILLING = 1, IDC_NBD_READY = 2, IDC_NBD_SENT = 3,
                     IDC_NBD_REPLYING = 4 };
enum idc_nbd_end { IDC_NBD_STANDS = 0, IDC_NBD_CLOSED = 1, IDC_NBD_DISCONNECTED = 2, IDC_NBD_MALFORMED = 3 };

struct idc_nbd_slot {
    uint64_t handle;         /* the kernel's, as it came */
    uint64_t since;          /* ns: when it came */
    struct idc_block_request request;
    uint32_t length;         /* bytes of the buffer in use */
    uint32_t page, pages;    /* of the part; pages 0: no buffer */
    uint32_t state, error, next;
    uint32_t orphan;         /* SENT, and its socket is gone: the back end may still use the buffer */
    uint32_t sent_before;    /* how often it was at the back end and its outcome is unknown */
};

/* One connection. Zeroed before its first use but for the descriptors, -1; memory is its user's. Its pump's thread moves
 * its data; everybody else may call what is below at any time. */
struct idc_nbd {
    int32_t kick_fd;         /* eventfd: makes the pump look again */
    uint8_t *memory;         /* the region */
    uint64_t part_at;        /* of it: where buffers are allocated, whole pages */
    uint32_t part_pages, longest;
    uint8_t *used;           /* a byte for each page */
    struct idc_nbd_slot slots[128];
    /* ---- */
    void *lock;
    struct idc_pump *pump;
    int32_t fd;              /* non-blocking stream socket; -1: none */
    uint32_t up, go;         /* the queue has a connection; requests may be sent by it */
    int32_t failing;         /* 0, or the errno that every request is answered with */
    uint32_t end;            /* why the socket is of no more use; enum idc_nbd_end */
    uint32_t free, waiting;  /* lists of slots, by index + 1 */
    uint32_t out_first, out_last, out_done; /* replies in order; bytes of the first that are sent */
    uint32_t wants_room;     /* a header is there whose request finds no slot or buffer */
    uint32_t got, filling;   /* bytes of the header; slot + 1 whose payload is being read */
    uint64_t filled, skip;   /* bytes of that; bytes of a payload to be thrown away */
    uint8_t header[28];
    uint8_t stage[896];      /* what one call has read, of 32 requests at most: see receive() */
    uint32_t staged, stage_at, drained; /* bytes left of it; the socket had no more */
    uint32_t hint, outstanding;
    uint32_t writes_much;    /* the last request's payload is a long one */
    uint32_t holding;        /* the only processor is held for what goes either way now */
    uint64_t held;           /* bytes that did since others could last run */
    uint64_t requests, errors, replayed, bytes_in, bytes_out, stalls;
};

int idc_nbd_start(struct idc_nbd *n, struct idc_pump *pump); /* attaches it to its pump. 0 or an errno */
void idc_nbd_stop(struct idc_nbd *n);            /* nobody uses it any more; closes nothing. Idempotent */
void idc_nbd_open(struct idc_nbd *n, int fd);    /* a new socket: the kernel sends again what the last one had; or -1 */
void idc_nbd_up(struct idc_nbd *n, int up);      /* the queue's connection has begun, or is over: requests wait */
void idc_nbd_go(struct idc_nbd *n);              /* send what waits, and what comes */
/* Where there is no connection: answers what waits, and what has come meanwhile, with an error. How much was done. */
int64_t idc_nbd_fail(struct idc_nbd *n, uint32_t error);
/* A transaction has completed: cookie is the slot. known 0: its outcome is unknown, and it is READY again. */
void idc_nbd_complete(struct idc_nbd *n, uint64_t cookie, int known, uint32_t error);
uint64_t idc_nbd_oldest(const struct idc_nbd *n); /* ns, when the oldest came that is not answered; 0: there is none */
/* Stays in memory, and writes back no other's pages for its own: mlockall and PR_SET_IO_FLUSHER. 0 or an errno. */
int idc_nbd_settle(void);

/* cdef end */
#endif

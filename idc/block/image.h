/* Images of block devices: requests carried out between a file and shared memory, one copy each, by pread(2) and
 * pwrite(2). An image is one file or block device; or an overlay, a sparse file with a bitmap of what it has itself, over
 * a base that is only read. docs/block.md gives the bytes. Used by any number of threads at a time; opened in Python.
 */
#ifndef IDC_IMAGE_H
#define IDC_IMAGE_H
#include "pump.h"

/* cdef begin */

enum idc_block_op { IDC_BLOCK_GEOMETRY = 0, IDC_BLOCK_READ = 1, IDC_BLOCK_WRITE = 2, IDC_BLOCK_FLUSH = 3,
                    IDC_BLOCK_TRIM = 4, IDC_BLOCK_ZEROES = 5 };
enum idc_block_flag { IDC_BLOCK_FUA = 1 };

/* The parameters of a transaction, little-endian as everything in shared memory. */
struct idc_block_request {
    uint8_t op, flags;
    uint16_t zero;
    uint32_t zero_too;
    uint64_t offset, length; /* bytes of the image */
    uint64_t buffer;         /* READ, WRITE: where in the region */
};

/* Zeroed before its first use; what is below the line is the core's. */
struct idc_image {
    int32_t fd, base;        /* base -1: there is none, and the fields of overlays mean nothing */
    uint32_t read_only, is_device;
    uint64_t size;           /* bytes that the other side sees */
    uint64_t longest;        /* bytes of one READ or WRITE */
    uint64_t base_size, bitmap_at, data_at;
    uint32_t cluster_bits;
    uint64_t *live;          /* a bit for each cluster that the overlay has; memory that outlives this process */
    uint8_t *dirty;          /* a byte for each page of the bitmap: it differs from that in the file */
    uint64_t bitmap_pages;
    uint8_t *memory;         /* the region; NULL: every READ and WRITE fails */
    uint64_t part_at, part_bytes; /* of it, what the other side may name */
    /* ---- */
    void *locks;
    int32_t failed;          /* errno: a flush failed or the file shrank, so nothing more is promised */
    uint32_t shrank;
    uint32_t error;          /* errno of the last request that could not be carried out */
    uint64_t requests, refused, broken, read_bytes, written_bytes, flushes;
    uint64_t copied;         /* bytes copied between image and region */
    uint64_t copied_up;      /* bytes copied from base to overlay */
};

int idc_image_start(struct idc_image *i); /* 0 or an errno */
void idc_image_stop(struct idc_image *i); /* nobody uses it any more. Idempotent; closes no descriptor */
/* Carries out a request, after checking every field of it: 0 or an errno. */
int idc_image_do(struct idc_image *i, const struct idc_block_request *request);
/* Whether the file still has all its bytes: 0, or EIO, and then for ever. */
int idc_image_check(struct idc_image *i);
int idc_image_can_punch(int fd); /* a file: 0 or an errno. Tries it beyond the file's end, so it changes nothing */
/* An idc_handler; context is the pump, and the image that pump's. What has another length goes to Python. */
int64_t idc_image_handle(void *context, const void *parameters, uint64_t len, void *status, uint64_t room,
                         uint16_t *error);

/* cdef end */
#endif

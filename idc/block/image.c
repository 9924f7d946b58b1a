#include "image.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { PAGE = 4096, BITS_OF_PAGE = 8 * PAGE, ZEROES_AT_ONCE = 64 << 10, TAKES_LONG = 64 << 10 };

struct locks {
    pthread_mutex_t allocate; /* of clusters: a cluster is brought up from the base once */
    pthread_mutex_t flush;    /* a flush that finds nothing to do waits for the one that has it in hand */
    uint8_t *staging;         /* the pages of the bitmap, as a flush writes them */
    uint8_t *cluster;         /* one, on its way from the base */
};

static const uint8_t zeroes[ZEROES_AT_ONCE];

int idc_image_start(struct idc_image *i)
{
    struct locks *l = calloc(1, sizeof *l);
    if (l == NULL)
        return ENOMEM;
    pthread_mutex_init(&l->allocate, NULL);
    pthread_mutex_init(&l->flush, NULL);
    i->locks = l;
    if (i->base >= 0) {
        l->staging = malloc(i->bitmap_pages * PAGE);
        l->cluster = malloc((size_t)1 << i->cluster_bits);
        if (l->staging == NULL || l->cluster == NULL) {
            idc_image_stop(i);
            return ENOMEM;
        }
    }
    return 0;
}

void idc_image_stop(struct idc_image *i)
{
    struct locks *l = i->locks;
    if (l == NULL)
        return;
    i->locks = NULL;
    pthread_mutex_destroy(&l->allocate);
    pthread_mutex_destroy(&l->flush);
    free(l->staging);
    free(l->cluster);
    free(l);
}

/* --- the file --- */

static void count(uint64_t *counter, uint64_t n)
{
    __atomic_fetch_add(counter, n, __ATOMIC_RELAXED); /* private memory, several threads */
}

static int fail(struct idc_image *i, int error)
{
    __atomic_store_n(&i->failed, error, __ATOMIC_RELEASE);
    return error;
}

/* A file that ends too early was cut: what is beyond its end is lost, and no write may make it look whole again. */
static int shrank(struct idc_image *i)
{
    __atomic_store_n(&i->shrank, 1, __ATOMIC_RELAXED);
    return fail(i, EIO);
}

static int get(struct idc_image *i, int fd, void *into, uint64_t n, uint64_t at)
{
    while (n > 0) {
        ssize_t got = pread(fd, into, n, (off_t)at);
        if (got == 0)
            return shrank(i);
        if (got < 0 && errno != EINTR)
            return errno;
        if (got > 0) {
            into = (uint8_t *)into + got;
            n -= (uint64_t)got;
            at += (uint64_t)got;
        }
    }
    return 0;
}

static int put(int fd, const void *from, uint64_t n, uint64_t at, int flags)
{
    while (n > 0) {
        struct iovec part = {.iov_base = (void *)(uintptr_t)from, .iov_len = n};
        ssize_t put_now = pwritev2(fd, &part, 1, (off_t)at, flags);
        if (put_now == 0)
            return EIO;
        if (put_now < 0 && errno != EINTR)
            return errno;
        if (put_now > 0) {
            from = (const uint8_t *)from + put_now;
            n -= (uint64_t)put_now;
            at += (uint64_t)put_now;
        }
    }
    return 0;
}

static int put_zeroes(int fd, uint64_t n, uint64_t at)
{
    int rc = 0;
    while (rc == 0 && n > 0) {
        uint64_t now = n < sizeof zeroes ? n : sizeof zeroes;
        rc = put(fd, zeroes, now, at, 0);
        n -= now;
        at += now;
    }
    return rc;
}

int idc_image_check(struct idc_image *i)
{
    struct stat about;
    if (i->failed)
        return i->failed;
    if (fstat(i->fd, &about) < 0)
        return errno;
    uint64_t needed = i->base >= 0 ? i->data_at + i->size : i->size;
    if (S_ISREG(about.st_mode) && (uint64_t)about.st_size < needed)
        return shrank(i);
    return 0;
}

/* After a failed fdatasync the kernel may have dropped what it could not write, and says so once: so it is for ever. */
static int sync_data(struct idc_image *i)
{
    int rc;
    do
        rc = fdatasync(i->fd);
    while (rc < 0 && errno == EINTR);
    return rc < 0 ? fail(i, EIO) : 0;
}

/* Zeroes, and gives the space back, or keeps it (`keep`). */
static int hole(int fd, uint64_t n, uint64_t at, bool keep)
{
    if (n == 0)
        return 0;
    if (keep && fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)n) == 0)
        return 0;
    if (fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)at, (off_t)n) == 0)
        return 0;
    if (errno == ENOSPC)
        return ENOSPC;
    return put_zeroes(fd, n, at); /* not aligned to a device's blocks, or not supported: slower, and the same bytes */
}

int idc_image_can_punch(int fd)
{
    struct stat about;
    if (fstat(fd, &about) < 0)
        return errno;
    off_t beyond = (about.st_size + PAGE - 1) / PAGE * PAGE;
    return fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, beyond, PAGE) < 0 ? errno : 0;
}

/* --- overlays --- */

static bool has(const struct idc_image *i, uint64_t cluster)
{
    return __atomic_load_n(&i->live[cluster / 64], __ATOMIC_ACQUIRE) >> cluster % 64 & 1;
}

/* Whether all of them, or, for the first of them, how many in a row are alike. */
static uint64_t alike(const struct idc_image *i, uint64_t first, uint64_t last)
{
    bool there = has(i, first);
    uint64_t c = first + 1;
    while (c <= last && has(i, c) == there)
        c++;
    return c - first;
}

/* Only once the bytes of the clusters are in the file. */
static void mark(struct idc_image *i, uint64_t first, uint64_t last)
{
    for (uint64_t c = first; c <= last; c++) {
        __atomic_fetch_or(&i->live[c / 64], (uint64_t)1 << c % 64, __ATOMIC_RELEASE);
        if (c == last || c % BITS_OF_PAGE == BITS_OF_PAGE - 1)
            __atomic_store_n(&i->dirty[c / BITS_OF_PAGE], 1, __ATOMIC_RELEASE);
    }
}

static int get_base(struct idc_image *i, uint8_t *into, uint64_t n, uint64_t at)
{
    uint64_t there = at >= i->base_size ? 0 : i->base_size - at < n ? i->base_size - at : n;
    int rc = get(i, i->base, into, there, at);
    if (rc == 0)
        memset(into + there, 0, n - there);
    return rc;
}

static int overlay_read(struct idc_image *i, uint8_t *into, uint64_t n, uint64_t at)
{
    int rc = 0;
    while (rc == 0 && n > 0) {
        uint64_t first = at >> i->cluster_bits, last = (at + n - 1) >> i->cluster_bits;
        uint64_t end = (first + alike(i, first, last)) << i->cluster_bits;
        uint64_t now = end - at < n ? end - at : n;
        rc = has(i, first) ? get(i, i->fd, into, now, i->data_at + at) : get_base(i, into, now, at);
        into += now;
        n -= now;
        at += now;
    }
    return rc;
}

static int bring_up(struct idc_image *i, uint64_t cluster)
{
    struct locks *l = i->locks;
    uint64_t at = cluster << i->cluster_bits, n = (uint64_t)1 << i->cluster_bits;
    if (n > i->size - at)
        n = i->size - at;
    int rc = get_base(i, l->cluster, n, at);
    if (rc == 0)
        rc = put(i->fd, l->cluster, n, i->data_at + at, 0);
    count(&i->copied_up, n);
    return rc;
}

/* `from` NULL: zeroes, in place of clusters a hole. */
static int overlay_put(struct idc_image *i, const uint8_t *from, uint64_t n, uint64_t at)
{
    return from != NULL ? put(i->fd, from, n, i->data_at + at, 0) : hole(i->fd, n, i->data_at + at, false);
}

static int overlay_write(struct idc_image *i, const uint8_t *from, uint64_t n, uint64_t at)
{
    struct locks *l = i->locks;
    uint64_t bytes = (uint64_t)1 << i->cluster_bits, end = at + n;
    uint64_t first = at >> i->cluster_bits, last = (end - 1) >> i->cluster_bits;
    if (has(i, first) && alike(i, first, last) == last - first + 1)
        return overlay_put(i, from, n, at); /* a bit that is set stays set */
    int rc = 0;
    pthread_mutex_lock(&l->allocate);
    if (at % bytes != 0 && !has(i, first))
        rc = bring_up(i, first);
    /* the same cluster, written in the middle, is brought up once */
    if (rc == 0 && end % bytes != 0 && end != i->size && !has(i, last) && (last != first || at % bytes == 0))
        rc = bring_up(i, last);
    if (rc == 0)
        rc = overlay_put(i, from, n, at);
    if (rc == 0)
        mark(i, first, last);
    pthread_mutex_unlock(&l->allocate);
    return rc;
}

/* Data first, then the bits that say so: whenever it ends, the file has no bit without its data. */
static int overlay_flush(struct idc_image *i)
{
    struct locks *l = i->locks;
    uint64_t taken = 0;
    pthread_mutex_lock(&l->flush);
    int rc = i->failed;
    for (uint64_t page = 0; rc == 0 && page < i->bitmap_pages; page++)
        if (__atomic_exchange_n(&i->dirty[page], 0, __ATOMIC_ACQ_REL)) {
            /* After the exchange: a bit that comes later than this look makes the page dirty again. */
            for (uint64_t w = 0; w < PAGE / 8; w++) {
                uint64_t word = __atomic_load_n(&i->live[page * (PAGE / 8) + w], __ATOMIC_ACQUIRE);
                memcpy(l->staging + page * PAGE + 8 * w, &word, 8);
            }
            __atomic_fetch_or(&i->dirty[page], 2, __ATOMIC_RELAXED); /* this flush writes it */
            taken++;
        }
    if (rc == 0)
        rc = sync_data(i);
    for (uint64_t page = 0; taken > 0 && page < i->bitmap_pages; page++)
        if (__atomic_fetch_and(&i->dirty[page], (uint8_t)~2, __ATOMIC_ACQ_REL) & 2 && rc == 0) {
            rc = put(i->fd, l->staging + page * PAGE, PAGE, i->bitmap_at + page * PAGE, 0);
            if (rc != 0)
                fail(i, rc);
        }
    if (taken > 0 && rc == 0)
        rc = sync_data(i);
    pthread_mutex_unlock(&l->flush);
    return rc;
}

/* --- requests --- */

static int flush(struct idc_image *i)
{
    count(&i->flushes, 1);
    int rc = idc_image_check(i);
    if (rc == 0)
        rc = i->base >= 0 ? overlay_flush(i) : sync_data(i);
    return rc;
}

static int refusal(const struct idc_image *i, const struct idc_block_request *r)
{
    bool data = r->op == IDC_BLOCK_READ || r->op == IDC_BLOCK_WRITE, reads = r->op == IDC_BLOCK_READ;
    if (r->op < IDC_BLOCK_READ || r->op > IDC_BLOCK_ZEROES || r->zero != 0 || r->zero_too != 0)
        return EINVAL;
    if (r->flags & ~IDC_BLOCK_FUA || (r->flags && reads))
        return EINVAL;
    if (r->op == IDC_BLOCK_FLUSH)
        return r->offset || r->length || r->buffer ? EINVAL : 0;
    if (r->length == 0 || r->offset > i->size || r->length > i->size - r->offset)
        return EINVAL;
    if (!data)
        return r->buffer ? EINVAL : i->read_only ? EROFS : 0;
    if (r->length > i->longest || r->buffer < i->part_at || r->length > i->part_bytes
        || r->buffer - i->part_at > i->part_bytes - r->length)
        return EINVAL;
    return !reads && i->read_only ? EROFS : i->memory == NULL ? EIO : 0;
}

static int carry_out(struct idc_image *i, const struct idc_block_request *r)
{
    uint8_t *at = i->memory + r->buffer;
    bool over = i->base >= 0, fua = r->flags & IDC_BLOCK_FUA;
    int rc = EINVAL;
    switch (r->op) {
    case IDC_BLOCK_READ:
        rc = over ? overlay_read(i, at, r->length, r->offset) : get(i, i->fd, at, r->length, r->offset);
        count(&i->read_bytes, r->length);
        break;
    case IDC_BLOCK_WRITE:
        count(&i->written_bytes, r->length);
        rc = over ? overlay_write(i, at, r->length, r->offset)
                  : put(i->fd, at, r->length, r->offset, fua ? RWF_DSYNC : 0);
        if (fua && !over && rc != 0)
            fail(i, rc); /* as of a flush: nobody knows what has reached the disk */
        if (fua && !over && rc == 0) {
            rc = idc_image_check(i);
            fua = false;
        }
        break;
    case IDC_BLOCK_TRIM:
    case IDC_BLOCK_ZEROES:
        if (over)
            rc = overlay_write(i, NULL, r->length, r->offset);
        else
            rc = hole(i->fd, r->length, r->offset, r->op == IDC_BLOCK_ZEROES);
        break;
    case IDC_BLOCK_FLUSH:
        return flush(i);
    }
    if (r->op == IDC_BLOCK_READ || r->op == IDC_BLOCK_WRITE)
        count(&i->copied, rc == 0 ? r->length : 0);
    return rc == 0 && fua ? flush(i) : rc;
}

int idc_image_do(struct idc_image *i, const struct idc_block_request *request)
{
    int failed = __atomic_load_n(&i->failed, __ATOMIC_ACQUIRE), rc = refusal(i, request);
    count(&i->requests, 1);
    if (rc != 0) {
        count(&i->refused, 1);
        return rc;
    }
    rc = failed && request->op != IDC_BLOCK_READ ? failed : carry_out(i, request);
    if (rc != 0) {
        __atomic_store_n(&i->error, (uint32_t)rc, __ATOMIC_RELAXED);
        count(&i->broken, 1);
    }
    return rc;
}

int64_t idc_image_handle(void *context, const void *parameters, uint64_t len, void *status, uint64_t room,
                         uint16_t *error)
{
    struct idc_pump *pump = context;
    struct idc_block_request request;
    (void)status;
    (void)room;
    if (len != sizeof request)
        return IDC_AGAIN;
    memcpy(&request, parameters, sizeof request);
    if (request.op != IDC_BLOCK_READ || request.length >= TAKES_LONG)
        idc_pump_announce(pump); /* what was answered before this one need not wait for it */
    *error = (uint16_t)idc_image_do(pump->context, &request);
    return 0;
}

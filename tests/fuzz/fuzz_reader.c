/* libFuzzer target: one end of a ring against a peer that writes whatever the input says, mixed with honest traffic so
 * that deep states are reached. Memory is allocated to the byte, so AddressSanitizer sees a step outside; the checks
 * below see a result outside the closed set, a corruption without a reason, and an end that does not last.
 */
#include "idc_core.h"

#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>

enum { CONTROL = 256 };

struct input {
    const uint8_t *at, *end;
};

static uint64_t take(struct input *in, size_t n)
{
    uint64_t value = 0;
    for (size_t i = 0; i < n && in->at < in->end; i++)
        value |= (uint64_t)*in->at++ << (8 * i);
    return value;
}

static void check(int ok)
{
    if (!ok)
        abort();
}

static void check_result(const struct idc_ring *r, int64_t rc, int64_t most)
{
    check(rc >= IDC_EINVAL && rc <= most);
    if (rc == IDC_CORRUPT)
        check(r->ended == IDC_CORRUPT && r->reason != IDC_REASON_NONE && idc_reason_text(r->reason)[0] != 'u');
    if (rc == IDC_PEER)
        check(r->ended == IDC_PEER);
    if (r->ended != IDC_OK && rc < 0 && rc != IDC_EINVAL)
        check(rc == r->ended);
    check(r->kind == IDC_MESSAGES || r->ended != IDC_OK ||
          (r->role == IDC_PRODUCER ? r->pos - r->peer : r->peer - r->pos) <= r->size);
}

/* Each buffer is malloc'ed at its exact size: a write past it is seen. */
static void use_messages(struct idc_ring *r, struct input *in)
{
    uint64_t what = take(in, 1), cap = take(in, 1) * 2, room = r->slot_size - 8;
    uint8_t *buf = malloc(cap + 1);
    if (r->role == IDC_CONSUMER && what % 2 == 0) {
        int64_t rc = idc_msg_recv(r, buf, cap, 0, what % 4 == 0 ? 0 : 1);
        check_result(r, rc, (int64_t)(cap < room ? cap : room));
    } else if (r->role == IDC_CONSUMER) {
        uint32_t n = (uint32_t)(what / 2 % 8 + 1), *lens = malloc(n * sizeof *lens);
        uint64_t sum = 0;
        int64_t rc = idc_msg_recv_batch(r, buf, cap, lens, n, 0, 0);
        check_result(r, rc, n);
        for (int64_t i = 0; i < rc; i++)
            sum += lens[i];
        check(rc <= 0 || sum <= cap);
        free(lens);
    } else if (what % 3 == 0) {
        memset(buf, 1, cap + 1);
        check_result(r, idc_msg_send(r, buf, cap, 0, what % 2), (int64_t)room);
    } else if (what % 3 == 1) {
        struct idc_part parts[2] = {{buf, cap / 2}, {buf, cap - cap / 2}};
        memset(buf, 2, cap + 1);
        check_result(r, idc_msg_post(r, parts, 2), (int64_t)room);
    } else {
        uint32_t lens[4] = {(uint32_t)cap / 4, (uint32_t)cap / 2, 0, (uint32_t)cap / 4};
        memset(buf, 3, cap + 1);
        check_result(r, idc_msg_send_batch(r, buf, lens, 4, 0, what % 2), 4);
    }
    free(buf);
}

static void use_bytes(struct idc_ring *r, struct input *in)
{
    uint64_t what = take(in, 1), cap = take(in, 1) * 2 + 1, done = 0;
    uint8_t *buf = calloc(1, cap);
    struct idc_part part = {.base = buf, .len = cap};
    struct idc_span span[2];
    if (what % 3 == 0 && r->role == IDC_CONSUMER) {
        check_result(r, idc_bytes_read(r, buf, cap, what / 3 % 2 ? cap : 0, 0, what / 6 % 2, &done), 0);
        check(done <= cap);
    } else if (what % 3 == 0) {
        check_result(r, idc_bytes_write(r, &part, 1, 0, what / 3 % 2, &done), 0);
        check(done <= cap);
    } else if (what % 3 == 1) {
        int64_t rc = idc_bytes_spans(r, cap % r->size, 0, what / 3 % 2, span);
        check_result(r, rc, (int64_t)r->size);
        for (int i = 0; i < 2 && rc > 0; i++) {
            check(span[i].offset <= r->size && span[i].len <= r->size - span[i].offset);
            if (r->role == IDC_PRODUCER)
                memset(r->data + span[i].offset, 2, span[i].len);
            else
                for (uint64_t k = 0; k < span[i].len; k++)
                    buf[0] ^= r->data[span[i].offset + k];
        }
        if (rc > 0)
            check(idc_bytes_advance(r, cap < (uint64_t)rc ? cap : (uint64_t)rc) == IDC_OK);
    } else {
        check_result(r, idc_bytes_advance(r, cap * 64), 0);
    }
    free(buf);
}

static void use(struct idc_ring *r, struct input *in)
{
    if (r->kind == IDC_MESSAGES)
        use_messages(r, in);
    else
        use_bytes(r, in);
}

/* A word that an honest peer also writes: with any value, one near an honest one, or (the next slot) an honest sequence
 * and any length. */
static void be_hostile(const struct idc_ring *r, uint8_t *control, struct input *in)
{
    static const uint32_t words[] = {0, 64, 128, 192};
    uint64_t how = take(in, 1), where = how / 8, value;
    if (how % 8 >= 6 && r->kind == IDC_MESSAGES) {
        value = (uint32_t)(r->pos + 1) | take(in, how % 2 ? 1 : 4) << 32;
        memcpy(r->data + (r->pos & r->mask) * r->slot_size, &value, sizeof value);
        return;
    }
    value = take(in, how % 8 == 0 ? 8 : 1);
    if (how % 8 >= 2)
        value = r->pos + (uint64_t)(int64_t)(int8_t)value;
    if (where % 2 == 0 || r->kind == IDC_BYTES)
        memcpy(control + words[where / 2 % 4], &value, sizeof value);
    else
        memcpy(r->data + where / 2 % r->size * r->slot_size, &value, sizeof value);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t n)
{
    static int bell = -1;
    if (bell < 0)
        bell = eventfd(0, EFD_NONBLOCK);
    struct input in = {.at = bytes, .end = bytes + n};
    uint64_t shape = take(&in, 1);
    uint32_t kind = shape & 1, role = shape >> 1 & 1, slot_size = 64u << (shape >> 2 & 1);
    uint64_t size = (kind == IDC_BYTES ? 64u : 2u) << (shape >> 3 & 3);
    size_t data_size = kind == IDC_BYTES ? size : size * slot_size;
    uint64_t *word = calloc(1, sizeof *word);
    uint8_t *control = aligned_alloc(64, CONTROL), *data = aligned_alloc(64, data_size);
    struct idc_ring mine, other;
    memset(control, 0, CONTROL);
    memset(data, 0, data_size);
    check(idc_ring_open(&mine, control, data, kind, role, size, slot_size) == IDC_OK);
    check(idc_ring_open(&other, control, data, kind, !role, size, slot_size) == IDC_OK);
    for (int size_class = 0; size_class < 3; size_class++)
        check(idc_copy_force(size_class, 0) == IDC_OK); /* libc's, which AddressSanitizer sees into */
    check(idc_ring_watch(&mine, word, 0) == IDC_OK);
    if (shape >> 5 & 1) { /* mine sleeps (for microseconds) and is rung by the other; else it only polls */
        idc_ring_wake(&mine, bell);
        idc_ring_bell(&other, NULL, 0, bell);
    }
    while (in.at < in.end) {
        switch (take(&in, 1) % 8) {
        case 0:
        case 1:
        case 2:
            use(&mine, &in);
            break;
        case 3:
        case 4:
            use(&other, &in);
            break;
        case 5:
            be_hostile(&mine, control, &in);
            break;
        case 6:
            check_result(&mine, idc_available(&mine), (int64_t)size);
            check_result(&mine, idc_wait(&mine, take(&in, 1), 0, 5000), 0);
            break;
        default:
            if (take(&in, 1) % 4 == 0)
                *word = take(&in, 1);
            else
                check_result(&mine, idc_notify(&mine), 0);
            break;
        }
    }
    free(word);
    free(control);
    free(data);
    return 0;
}

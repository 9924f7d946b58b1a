/* Two threads, each with one end of a socket and messages both ways, as many at a time as the other accepts: all arrive whole, in
 * order, and are said to have; the one end reads them in place. Then frames of a peer that means ill, of which nothing may come but what the session judges. Prints what it moved. */
#include "lane.h"

#include <assert.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>

enum { ROOM = 8192, UNSENT = 1 << 20, KINDS = 7, LONGEST = 70000, QUOTA = 5, HEAD = IDC_WIRE_HEAD };
static const uint32_t lengths[KINDS] = {0, 1, 56, 3000, IDC_WIRE_LONG - 1, IDC_WIRE_LONG, LONGEST};
static uint8_t bodies[256][LONGEST];
static uint32_t rounds;

struct end {
    struct idc_wire wire;
    struct idc_lane lane;
    uint32_t tags[QUOTA], held[QUOTA];
    uint8_t in[ROOM];
    uint64_t bytes;
    bool reads;      /* in place; else it takes messages whole */
};

static struct end *make(int fd)
{
    struct end *e = calloc(1, sizeof *e);
    e->wire = (struct idc_wire){.fd = fd, .in = e->in, .room = ROOM, .longest = LONGEST + HEAD, .most = UNSENT};
    e->lane = (struct idc_lane){.wire = &e->wire, .tags = e->tags, .held = e->held, .base = 9, .most = QUOTA,
                                .most_bytes = LONGEST, .longest = LONGEST, .quota = QUOTA};
    return e;
}

static uint32_t length_of(uint32_t i)
{
    return lengths[(i * 2654435761u >> 16) % KINDS];
}

static void check(struct end *e, const uint8_t *body, uint32_t i)
{
    uint64_t len = e->wire.apart ? e->wire.body_len : e->lane.len - HEAD, expected = length_of(i);
    const uint8_t *at = e->wire.apart ? body : e->in + e->wire.first + HEAD;
    assert(len == expected && (len == 0 || (at[0] == i % 256 && at[len - 1] == i % 256)));
    e->bytes += len;
}

/* The rest of the message that was begun, in as many pieces as it comes in: 1, or why nothing came. Nothing else is read before. */
static int64_t keep(struct end *e, uint32_t i, int64_t timeout_ns)
{
    uint32_t left = e->lane.left;
    uint8_t *into = malloc(left);
    int64_t got = idc_lane_read(&e->lane, into, left, IDC_LANE_ALL | IDC_LANE_KEEP, timeout_ns);
    assert(e->lane.got == (got > 0 ? got : 0) && e->lane.left == left - e->lane.got);
    if (got > 0) {
        assert(into[0] == i % 256 && into[got - 1] == i % 256 && e->lane.kept);
        assert(idc_lane_take(&e->lane, NULL, 0) == IDC_LANE_ELSE);
        assert(idc_lane_read(&e->lane, into, left, 0, 0) == IDC_LANE_ELSE);
        e->bytes += (uint64_t)got;
    }
    free(into);
    if (got <= 0 || e->lane.left > 0)
        return got > 0 ? IDC_AGAIN : got;
    e->lane.kept = 0;
    assert(idc_lane_done(&e->lane) == IDC_OK);
    return 1;
}

/* Pieces of odd lengths, to memory of just that length, until a message is at its end: 1; IDC_LANE_ELSE: it is to be taken. */
static int64_t read_in_place(struct end *e, uint32_t i, uint32_t *at, int64_t timeout_ns)
{
    static const uint64_t most[] = {1, 12, 100, 5000, LONGEST};
    int64_t got = idc_lane_read(&e->lane, NULL, 0, 0, timeout_ns);
    if (got != 0)
        return got;
    assert(e->lane.left + *at == length_of(i) && e->lane.whole == length_of(i));
    uint64_t len = most[(i + *at) % 5];
    if (i % 7 == 3) { /* to be kept, all that is left of it; completed by its user */
        got = keep(e, i, timeout_ns);
        *at = got == 1 ? 0 : length_of(i) - e->lane.left;
        return got;
    }
    uint8_t *into = malloc(len);
    got = idc_lane_read(&e->lane, into, len, (int32_t)((i >> 3) & IDC_LANE_ALL), timeout_ns);
    if (got > 0) {
        assert(into[0] == i % 256 && into[got - 1] == i % 256 && (uint64_t)got <= len);
        *at += (uint32_t)got;
        e->bytes += (uint64_t)got;
    }
    free(into);
    if (got <= 0 || *at < length_of(i))
        return got > 0 ? IDC_AGAIN : got;
    *at = 0;
    return 1;
}

static void *both_ways(void *end)
{
    struct end *e = end;
    uint8_t *body = NULL;
    uint32_t at = 0;
    for (uint32_t sent = 0, received = 0; sent < rounds || received < rounds || e->lane.outstanding > 0;) {
        int rc = sent < rounds ? idc_lane_send(&e->lane, bodies[sent % 256], length_of(sent)) : IDC_AGAIN;
        assert(rc >= 0 || rc == IDC_AGAIN);
        sent += rc >= 0;
        int64_t timeout_ns = rc >= 0 ? 0 : 10000000;
        if (e->reads && received < rounds) {
            int64_t got = e->lane.kept ? keep(e, received, timeout_ns) : read_in_place(e, received, &at, timeout_ns);
            at = got == 1 ? 0 : at;
            received += got == 1;
            assert(got == 1 || got == IDC_LANE_ELSE || got == IDC_AGAIN || got == IDC_TIMEOUT || got == IDC_INTR);
            if (got != IDC_LANE_ELSE)
                continue;
        }
        int64_t got = idc_lane_take(&e->lane, NULL, timeout_ns);
        if (got == IDC_LANE_WANT) {
            assert(body == NULL && e->wire.want <= LONGEST);
            body = malloc(e->wire.want);
            got = idc_lane_take(&e->lane, body, 0);
        }
        assert(got == IDC_LANE_MESSAGE || got == IDC_LANE_DONE || got == IDC_AGAIN || got == IDC_TIMEOUT || got == IDC_INTR);
        if (got != IDC_LANE_MESSAGE)
            continue;
        assert(idc_lane_take(&e->lane, NULL, 0) == IDC_LANE_MESSAGE); /* as often as asked, */
        assert(!e->reads || idc_lane_read(&e->lane, &at, 1, 0, 0) == IDC_LANE_ELSE);
        check(e, body, received++);
        e->lane.found = 0; /* until it is taken */
        if (e->wire.apart) {
            free(body);
            body = NULL;
        }
        assert(idc_lane_done(&e->lane) == IDC_OK);
    }
    while (e->wire.unsent > 0)
        assert(idc_wire_flush(&e->wire, 1000000000) != IDC_PEER);
    return NULL;
}

/* Frames of both kinds whose tags and lengths nobody agreed on, and some that are none. */
static void ill(uint32_t seed)
{
    int fds[2];
    assert(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    srand(seed);
    for (int i = 0; i < 12; i++) {
        uint8_t frame[4 + HEAD + 64] = {0};
        uint32_t len = (uint32_t)rand() % (rand() % 4 ? 16 : HEAD + 64);
        memcpy(frame, &len, 4);
        frame[4] = (uint8_t)(rand() % 16 ? 2 + rand() % 2 : rand());
        frame[5] = (uint8_t)(rand() % 16 ? 0 : rand());
        frame[8] = (uint8_t)(rand() % 4 ? 9 + rand() % (QUOTA + 1) : rand());
        frame[10] = (uint8_t)(rand() % 3);
        assert(send(fds[0], frame, 4 + len, 0) == 4 + (ssize_t)len);
    }
    assert(shutdown(fds[0], SHUT_WR) == 0);
    struct end *e = make(fds[1]);
    assert(idc_lane_send(&e->lane, bodies[1], 20) == IDC_OK);
    assert(idc_lane_send(&e->lane, bodies[1], LONGEST + 1) == IDC_TOOBIG);
    int64_t got;
    uint8_t some[20];
    while (seed % 2 && (got = idc_lane_read(&e->lane, some, 1 + (uint64_t)rand() % sizeof some, rand() % 2, 1000000000)) > 0)
        assert(e->lane.holds <= 1 && e->lane.outstanding <= 1);
    if (seed % 2)
        assert(got == IDC_LANE_ELSE || got == IDC_PEER);
    while ((got = idc_lane_take(&e->lane, NULL, 1000000000)) == IDC_LANE_MESSAGE || got == IDC_LANE_DONE) {
        assert(e->lane.holds <= QUOTA && e->lane.outstanding <= 1);
        e->lane.found = 0;
        if (got == IDC_LANE_MESSAGE && rand() % 2)
            assert(idc_lane_done(&e->lane) == IDC_OK);
    }
    assert(got == IDC_LANE_OTHER || got == IDC_PEER);
    idc_wire_free(&e->wire);
    free(e);
}

int main(int argc, char **argv)
{
    rounds = argc > 1 ? (uint32_t)atoi(argv[1]) : 1000;
    for (uint32_t i = 0; i < 256; i++)
        memset(bodies[i], (int)i, LONGEST);
    int fds[2];
    assert(socketpair(AF_UNIX, SOCK_STREAM, 0, fds) == 0);
    struct end *one = make(fds[0]), *two = make(fds[1]);
    one->reads = true;
    pthread_t other;
    pthread_create(&other, NULL, both_ways, one);
    both_ways(two);
    pthread_join(other, NULL);
    printf("%u messages each way, %llu bytes\n", rounds, (unsigned long long)(one->bytes + two->bytes));
    idc_wire_free(&one->wire);
    idc_wire_free(&two->wire);
    free(one);
    free(two);
    for (uint32_t seed = 0; seed < 200; seed++)
        ill(seed);
    return 0;
}
